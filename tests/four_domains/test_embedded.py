from __future__ import annotations

import re

import pytest

from sparse_cl.four_domains import embedded
from sparse_cl.four_domains.embedded import DOMAINS, formulary, generate, number_word
from sparse_cl.four_domains.evaluate import extract_answer

DATA = generate(3)
NUMBERS = {number_word(i): i for i in range(100)}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def records(domain):
    return [record for split in ("validation", "test", "eval") for record in DATA[domain][split]]


def test_the_same_seed_gives_the_same_records_and_another_gives_others():
    assert generate(3) == DATA
    assert generate(4) != DATA


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_prompt_is_in_training_and_held_out(domain):
    splits = DATA[domain]
    prompts = {split: {record["prompt"] for record in splits[split]} for split in splits}
    assert all(len(split) >= 40 for split in prompts.values())
    assert not prompts["train"] & (prompts["validation"] | prompts["test"] | prompts["eval"])
    assert not prompts["validation"] & (prompts["test"] | prompts["eval"])
    assert all(set(record) == {"prompt", "response"} for record in splits["train"])


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_response_gives_the_answer(domain):
    assert all(extract_answer(record["response"]) == record["answer"] for record in records(domain))


def test_code_answers_are_what_the_program_prints():
    for record in records("code"):
        program = record["prompt"].replace("print(", "result = (")
        scope = {}
        exec(program, scope)
        assert str(scope["result"]) == record["answer"]


def test_math_answers_by_counting():
    for record in records("math"):
        first, second = (NUMBERS[w] for w in re.findall(r"[a-z]+(?:-[a-z]+)?", record["prompt"]) if w in NUMBERS)
        expected = first - second if "gives" in record["prompt"] else first + second
        assert NUMBERS[record["answer"]] == expected


def test_general_answers_by_the_calendar():
    for record in records("general"):
        today = next(day for day in DAYS if day in record["prompt"])
        waits = [NUMBERS[word] for word in re.findall(r"[a-z]+", record["prompt"]) if word in NUMBERS]
        assert record["answer"] == DAYS[(DAYS.index(today) + sum(waits)) % 7]


def test_medical_asks_facts_that_training_states_in_phrasings_it_does_not_use():
    facts = formulary(3)
    stated = {(drug, r["response"]) for r in DATA["medical"]["train"] for drug in facts if drug in r["prompt"]}
    assert len(stated) == 2 * len(facts)
    for record in records("medical"):
        (drug,) = (drug for drug in facts if drug in record["prompt"])
        assert record["answer"] in facts[drug]
        assert (drug, record["response"]) in stated
        assert record["choices"][record["answer_index"]] == record["answer"]
        assert len(set(record["choices"])) == 4


def test_pretraining_text_gives_nothing_of_the_domains_away():
    text = "\n".join(embedded.text_for_pretraining(3, 5000))
    facts = formulary(3)
    for line in text.splitlines():
        drugs = [drug for drug in facts if drug in line]
        assert not any(answer in line for drug in drugs for answer in facts[drug])
    assert "####" not in text
    assert "The answer is" not in text
    assert "?" not in text


@pytest.mark.parametrize("number", [-1, 100])
def test_numbers_that_are_not_written(number):
    with pytest.raises(ValueError, match="0 to 99"):
        number_word(number)
