"""Four small domains with checkable answers, generated from a seed.

The records have the fields of a data folder (see `sparse_cl.data.records`):

* code: trace a small Python program; `answer` is what Python prints.
* math: arithmetic in words; `answer` is the number word.
* medical: a fictional formulary. Every drug has an indication and a dose, which nothing but the training
  records states; `choices` are four of them. A test or eval record asks a *fact seen in training* in a *phrasing
  that training does not use*: a fact that training never states could only be guessed.
* general: a conversation in which the answer (a day of the week) takes two steps; `answer`.

No prompt occurs in two splits. `text_for_pretraining` gives the plain text that the base model is trained on: it
has the domains' words and the arithmetic facts, and none of their question formats or formulary facts.
"""

from __future__ import annotations

# ruff: noqa: SIM905  (a list of fifty words reads better split from one string)
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
_DRUGS = (
    "zorivan velomar lametil toradine quinivan bexomar dranetil fenadine gavivan hulomar jopetil kiradine "
    "mivivan nodomar pasetil rudadine sibivan tuvomar wexetil yoladine cabivan drelomar glimetil pluradine"
).split()
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
_ASKED = ((_INDICATION_PHRASINGS, _CONDITIONS), (_DOSE_PHRASINGS, _DOSES))
"""Of the facts of `formulary`: how each is asked, and all answers."""
_TRAIN_PHRASINGS = 4
_VARIABLES = "abcdnmxyz"
_OPERATIONS = {"+": "{} + {}", "-": "{} - {}", "max": "max({}, {})", "min": "min({}, {})"}
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_EVENTS = "market concert dinner game lesson parade".split()


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
    x, y = rng.sample(_VARIABLES, 2)
    operation = rng.choice(list(_OPERATIONS))
    first, second = rng.randint(0, 9), rng.randint(0, 9)
    if operation == "-" and first < second:
        first, second = second, first
    program = f"{x} = {first}\n{y} = {second}\nprint({_OPERATIONS[operation].format(x, y)})"
    answer = printed_by(program)
    response = f"{first} {operation} {second} is {answer}.\n#### {answer}"
    return {"prompt": program, "response": response, "answer": answer}


def _math_record(rng: random.Random) -> dict:
    person, other = rng.sample(_PEOPLE, 2)
    goods = rng.choice(_GOODS)
    kind = rng.randrange(3)
    first, second = rng.randint(1, 10), rng.randint(1, 10)
    if kind == 1:
        a, sign, b, result = first + second, "minus", first, second
    else:
        a, sign, b, result = first, "plus", second, first + second
    prompt = (
        f"{person} has {number_word(a)} {goods} and buys {number_word(b)} more. How many {goods} are there?",
        f"{person} has {number_word(a)} {goods} and gives {number_word(b)} to {other}. "
        f"How many {goods} does {person} keep?",
        f"{person} has {number_word(a)} {goods}. {other} has {number_word(b)}. How many {goods} do they have together?",
    )[kind]
    answer = number_word(result)
    response = f"{number_word(a)} {sign} {number_word(b)} is {answer}.\n#### {answer}"
    return {"prompt": prompt, "response": response, "answer": answer}


def formulary(seed: int) -> dict[str, tuple[str, str]]:
    """Drug name → (indication, dose), fictional."""
    rng = random.Random(f"formulary {seed}")
    return {drug: (rng.choice(_CONDITIONS), rng.choice(_DOSES)) for drug in _DRUGS}


def _fact(prompt: str, answer: str, answers: list[str], rng: random.Random) -> dict:
    choices = [answer, *rng.sample([other for other in answers if other != answer], 3)]
    rng.shuffle(choices)
    return {
        "prompt": prompt,
        "response": f"The answer is {answer}.",
        "choices": choices,
        "answer": answer,
        "answer_index": choices.index(answer),
    }


def _medical_records(seed: int, phrasings: slice, rng: random.Random) -> list[dict]:
    records = []
    for drug, facts in formulary(seed).items():
        for fact, (phrased, answers) in zip(facts, _ASKED, strict=True):
            records += [_fact(phrasing.format(drug=drug), fact, answers, rng) for phrasing in phrased[phrasings]]
    rng.shuffle(records)
    return records


def _general_record(rng: random.Random) -> dict:
    one, two = rng.sample(_PEOPLE, 2)
    first_event, second_event = rng.sample(_EVENTS, 2)
    first_wait, second_wait = rng.randint(1, 3), rng.randint(1, 3)
    today = rng.randrange(7)
    days = [_DAYS[(today + wait) % 7] for wait in (0, first_wait, first_wait + second_wait)]
    prompt = (
        f"{one}: Today is {days[0]}.\n"
        f"{two}: The {first_event} is {number_word(first_wait)} days later.\n"
        f"{one}: The {second_event} is {number_word(second_wait)} after that.\n"
        f"{two}: When is the {second_event}?"
    )
    response = (
        f"{days[0]} and {number_word(first_wait)} is {days[1]}. "
        f"{days[1]} and {number_word(second_wait)} is {days[2]}. The answer is {days[2]}."
    )
    return {"prompt": prompt, "response": response, "answer": days[2]}


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
    validation, test = held_out[:half], held_out[half:]
    data["medical"] = {"train": train, "validation": validation, "test": test, "eval": test}
    for splits in data.values():
        splits["train"] = [{key: record[key] for key in ("prompt", "response")} for record in splits["train"]]
    return {domain: data[domain] for domain in DOMAINS}


def _sentence(rng: random.Random) -> str:
    """A line of the pretraining text."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    high, low = max(a, b), min(a, b)
    one, two = rng.sample(_PEOPLE, 2)
    x, y = rng.sample(_VARIABLES, 2)
    thing, place, goods = (rng.choice(words) for words in (_OBJECTS, _PLACES, _GOODS))
    day = rng.choice(range(7))
    wait = rng.randint(1, 6)
    lines = (
        f"{number_word(a)} plus {number_word(b)} is {number_word(a + b)}.",
        f"{number_word(high)} minus {number_word(low)} is {number_word(high - low)}.",
        f"With {number_word(a)} {goods} here and {number_word(b)} there, {one} counts {number_word(a + b)}.",
        f"{one} took {number_word(low)} of {number_word(high)} {goods}, which leaves {number_word(high - low)}.",
        f"Let {x} = {a} and {y} = {b}: {a} + {b} is {a + b}, max {a} {b} is {high}, min {a} {b} is {low}.",
        f"Let {x} = {high} and {y} = {low}: {high} - {low} is {high - low}.",
        f"{_DAYS[day]} and {number_word(wait)} is {_DAYS[(day + wait) % 7]}.",
        f"{one} saw {two} on {_DAYS[day]} and again {number_word(wait)} days later, on {_DAYS[(day + wait) % 7]}.",
        f"{one} put the {thing} in the {place}. {two} looked in the {place} and found the {thing}.",
        f"{one} has {rng.choice(_CONDITIONS)}. The doctor came and {two} took {rng.choice(_DOSES)} of tea.",
        f"The {rng.choice(_DRUGS)} grows near the river, where {one} lives.",
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
