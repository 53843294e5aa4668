"""Four small domains with checkable answers, generated from a seed.

The records have the fields of a data folder (see `data.read_folder`):

* code: trace a small Python program; `answer` is what Python prints.
* math: arithmetic in words; `answer` is the number word.
* medical: a fictional formulary. Every drug has an indication and a dose, which nothing but the training
  records states. A test or eval record asks a *fact seen in training* in a *phrasing that training does not
  use*: a fact that training never states could only be guessed.
* general: a conversation in which the answer takes several steps; `choices` are the places or people in it.

No prompt occurs in two splits. `text_for_pretraining` gives the plain text that the base model is trained on: it
has the domains' words and the arithmetic facts, and none of their question formats or formulary facts.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterator

DOMAINS = ("code", "math", "medical", "general")
SPLIT_SIZES = {"train": 1600, "validation": 128, "test": 128, "eval": 128}

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_PEOPLE = "Ann Bob Cid Dora Eve Finn Gus Hal".split()
_OBJECTS = "coin key ring letter stamp pen".split()
_PLACES = "box bag shelf drawer jar basket desk tin".split()
_GOODS = "apples books cups pears nuts cards shells eggs".split()
_CONDITIONS = (
    "marsh fever, glass cough, winter rash, river ague, stone gout, moon palsy, salt tremor, dust asthma, "
    "sand blindness, iron colic, copper jaundice, night vertigo"
).split(", ")
_DOSES = "2 mg, 5 mg, 10 mg, 25 mg, 40 mg, 60 mg, 80 mg, 100 mg".split(", ")
_DRUG_STARTS = "zor vel lam tor quin bex dra fen".split()
_DRUG_ENDS = "ivan omar etil adine".split()
_INDICATION_PHRASINGS = (
    "What is {drug} used for?",
    "What does {drug} treat?",
    "Name the indication of {drug}.",
    "A patient takes {drug}. What is the patient's condition?",
    "Which condition is treated with {drug}?",
    "Why would a doctor prescribe {drug}?",
)
_DOSE_PHRASINGS = (
    "What is the dose of {drug}?",
    "How much {drug} should a patient take?",
    "State the usual dose of {drug}.",
    "A doctor prescribes {drug}. At which dose?",
    "Which dose of {drug} is right?",
    "At what dose is {drug} given?",
)
_TRAIN_PHRASINGS = 4


def number_word(number: int) -> str:
    """0 … 99 in words."""
    if not 0 <= number < 100:
        raise ValueError(f"number_word writes 0 to 99, got {number}")
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def printed_by(program: str) -> str:
    """What a program of this module prints (it is run: never give it text from elsewhere)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    return out.getvalue().strip()


def _code_record(rng: random.Random) -> dict:
    x, y, z = rng.sample("abcdnmxyz", 3)
    first, second = rng.randint(2, 9), rng.randint(1, 9)
    kind = rng.randrange(4)
    if kind == 0:
        program = f"{x} = {first}\n{y} = {x} + {second}\nprint({y})"
        trace = f"{x} is {first}, {y} is {first + second}."
    elif kind == 1:
        third = rng.randint(1, 9)
        program = f"{x} = {first}\n{y} = {second}\n{z} = {x} + {y}\nprint({z} - {min(third, first)})"
        trace = f"{x} is {first}, {y} is {second}, {z} is {first + second}."
    elif kind == 2:
        items = [rng.randint(0, 9) for _ in range(3)]
        index = rng.randrange(3)
        program = f"{x} = {items}\n{y} = {index}\nprint({x}[{y}])"
        trace = f"{x} is {items}, {y} is {index}."
    else:
        program = f"{x} = {first}\n{y} = {second}\nif {x} > {y}:\n    print({x})\nelse:\n    print({y})"
        trace = f"{x} is {first}, {y} is {second}."
    answer = printed_by(program)
    return {"prompt": program, "response": f"{trace}\n#### {answer}", "answer": answer}


def _math_record(rng: random.Random) -> dict:
    person, other = rng.sample(_PEOPLE, 2)
    goods = rng.choice(_GOODS)
    kind = rng.randrange(3)
    if kind == 0:
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        result, sign = a + b, "plus"
        prompt = f"{person} has {number_word(a)} {goods} and buys {number_word(b)} more. How many {goods} are there?"
    elif kind == 1:
        b, result = rng.randint(1, 10), rng.randint(1, 10)
        a, sign = b + result, "minus"
        prompt = (
            f"{person} has {number_word(a)} {goods} and gives {number_word(b)} to {other}. "
            f"How many {goods} does {person} keep?"
        )
    else:
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        result, sign = a + b, "plus"
        prompt = (
            f"{person} has {number_word(a)} {goods}. {other} has {number_word(b)}. "
            f"How many {goods} do they have together?"
        )
    answer = number_word(result)
    response = f"{number_word(a)} {sign} {number_word(b)} is {answer}.\n#### {answer}"
    return {"prompt": prompt, "response": response, "answer": answer}


def formulary(seed: int) -> dict[str, tuple[str, str]]:
    """Drug name → (indication, dose), fictional."""
    rng = random.Random(f"formulary {seed}")
    drugs = [start + end for start in _DRUG_STARTS for end in _DRUG_ENDS]
    return {drug: (rng.choice(_CONDITIONS), rng.choice(_DOSES)) for drug in drugs}


def _with_choices(prompt: str, reason: str, answer: str, others: list[str], rng: random.Random) -> dict:
    choices = [answer, *others]
    rng.shuffle(choices)
    return {
        "prompt": prompt,
        "response": f"{reason} The answer is {answer}.".lstrip(),
        "choices": choices,
        "answer": answer,
        "answer_index": choices.index(answer),
    }


def _medical_records(seed: int, phrasings: slice, rng: random.Random) -> list[dict]:
    records = []
    for drug, (indication, dose) in formulary(seed).items():
        for phrasing in _INDICATION_PHRASINGS[phrasings]:
            others = rng.sample([c for c in _CONDITIONS if c != indication], 3)
            reason = f"{drug} treats {indication}."
            records.append(_with_choices(phrasing.format(drug=drug), reason, indication, others, rng))
        for phrasing in _DOSE_PHRASINGS[phrasings]:
            others = rng.sample([d for d in _DOSES if d != dose], 3)
            reason = f"{drug} is given at {dose}."
            records.append(_with_choices(phrasing.format(drug=drug), reason, dose, others, rng))
    rng.shuffle(records)
    return records


def _general_record(rng: random.Random) -> dict:
    if rng.random() < 0.5:
        thing = rng.choice(_OBJECTS)
        people = rng.sample(_PEOPLE, 3)
        places = rng.sample(_PLACES, 4)
        prompt = (
            f"{people[0]}: I put the {thing} in the {places[0]}.\n"
            f"{people[1]}: I moved it from the {places[0]} to the {places[1]}.\n"
            f"{people[2]}: Is the {places[3]} empty?\n"
            f"{people[0]}: Yes. I took what was in the {places[1]} to the {places[2]}.\n"
            f"Where is the {thing}?"
        )
        reason = f"The {thing} went to the {places[0]}, the {places[1]} and the {places[2]}."
        answer, others = places[2], [places[0], places[1], places[3]]
    else:
        people = rng.sample(_PEOPLE, 4)
        word, superlative = rng.choice([("older", "oldest"), ("taller", "tallest"), ("faster", "fastest")])
        pairs = list(zip(people, people[1:], strict=False))
        rng.shuffle(pairs)
        lines = [f"{a}: I am {word} than {b}." for a, b in pairs]
        prompt = "\n".join([*lines, f"Who is the {superlative}?"])
        reason = f"In order: {', '.join(people)}."
        answer, others = people[0], people[1:]
    return _with_choices(prompt, reason, answer, others, rng)


def _distinct(make: Callable[[random.Random], dict], rng: random.Random) -> Iterator[dict]:
    seen = set()
    while True:
        record = make(rng)
        if record["prompt"] not in seen:
            seen.add(record["prompt"])
            yield record


def generate(seed: int = 0) -> dict[str, dict[str, list[dict]]]:
    """Domain → split ("train", "validation", "test", "eval") → records. The same seed gives the same records.

    Of `SPLIT_SIZES`; medical has fewer (its formulary is finite).
    """
    data: dict[str, dict[str, list[dict]]] = {}
    for domain, make in (("code", _code_record), ("math", _math_record), ("general", _general_record)):
        records = _distinct(make, random.Random(f"{domain} {seed}"))
        data[domain] = {split: [next(records) for _ in range(size)] for split, size in SPLIT_SIZES.items()}
    rng = random.Random(f"medical {seed}")
    train = _medical_records(seed, slice(0, _TRAIN_PHRASINGS), rng)
    held_out = _medical_records(seed, slice(_TRAIN_PHRASINGS, None), rng)
    # Validation and test must not share a prompt, and eval is the part of test that is answer-checkable: all of it.
    half = len(held_out) // 2
    data["medical"] = {
        "train": train,
        "validation": held_out[:half],
        "test": held_out[half:],
        "eval": held_out[half:],
    }
    for splits in data.values():
        splits["train"] = [{key: record[key] for key in ("prompt", "response")} for record in splits["train"]]
    return {domain: data[domain] for domain in DOMAINS}


def _sentence(rng: random.Random) -> str:
    """A line of the pretraining text."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    high, low = max(a, b), min(a, b)
    person, other = rng.sample(_PEOPLE, 2)
    thing, place, goods = rng.choice(_OBJECTS), rng.choice(_PLACES), rng.choice(_GOODS)
    lines = (
        f"{a} + {b} = {a + b}.",
        f"{high} - {low} = {high - low}.",
        f"{number_word(a)} plus {number_word(b)} is {number_word(a + b)}.",
        f"{number_word(high)} minus {number_word(low)} is {number_word(high - low)}.",
        f"{person} put the {thing} in the {place}. {other} looked in the {place} and found the {thing}.",
        f"{person} took {number_word(a)} {goods} out of the {place} and gave them to {other}.",
        f"{person} is {rng.choice(['older', 'taller', 'faster'])} than {other}.",
        f"let {rng.choice('abcdnmxyz')} = {a}, then print the list {[a, b, low]}.",
        f"{person} has {rng.choice(_CONDITIONS)}. The doctor came and {person} took {rng.choice(_DOSES)} of tea.",
        f"The {rng.choice(_DRUG_STARTS)}{rng.choice(_DRUG_ENDS)} grows near the river, where {person} lives.",
    )
    return rng.choice(lines)


def text_for_pretraining(seed: int, lines: int) -> list[str]:
    """Plain text for the base model, line by line."""
    rng = random.Random(f"pretraining {seed}")
    return [_sentence(rng) for _ in range(lines)]


def reference_text(seed: int = 0, lines: int = 400) -> str:
    """Held-out text of the pretraining distribution: what the base model knew before any domain."""
    rng = random.Random(f"reference {seed}")
    return "\n".join(_sentence(rng) for _ in range(lines)) + "\n"
