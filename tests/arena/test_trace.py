"""TRACE's eight tasks: its metrics, its summaries, and two tasks of a tiny model that go on where they were stopped."""

from __future__ import annotations

import importlib.util
import json
from subprocess import CompletedProcess

import pytest
from cases.world import write_world

from benchmarks.arena import trace
from benchmarks.arena.trace import Trace, accuracy, choice, plain_code, rouge_l, similarity, table
from sparse_cl import cli
from sparse_cl.data.records import DataError

SHORT = ("--steps", "2", "--batch-size", "2", "--protect", "none")


@pytest.fixture
def world(tmp_path, tokenizer, monkeypatch):
    """A model, and two tasks; `sparse-cl learn` runs in this process."""
    world = write_world(tmp_path, tokenizer)
    for task in ("FOMC", "ScienceQA"):
        (world / "trace" / task).mkdir(parents=True)
        for split in ("train", "eval", "test"):
            records = [{"prompt": f"{task} {split} {i}?", "answer": "AB"[i % 2]} for i in range(6)]
            (world / "trace" / task / f"{split}.json").write_text(json.dumps(records))

    monkeypatch.setattr(
        trace.subprocess, "run", lambda command, check: CompletedProcess(command, cli.main(command[3:]))
    )
    monkeypatch.setattr(trace, "ANSWER", 4)
    monkeypatch.setattr(trace, "PROMPT", 28)
    return world


def made(world, **others):
    given = {"tasks": ("FOMC", "ScienceQA"), "records": 5, "options": SHORT}
    return Trace(str(world / "model"), world / "trace", world / "out", **{**given, **others})


def test_a_choice_is_the_first_character_and_may_be_explained():
    answers, wanted = ["A\nBecause.", "B", "", "C"], ["A\nSince.", "B", "A", "D"]
    assert choice([], answers, wanted) == 50.0
    assert accuracy([], answers, wanted) == 25.0


def test_marks_of_literals_are_what_they_stand_for():
    code = "x = <NUM_LIT> + <NUM_LIT:12> ; print ( <STR_LIT:a b> , <STR_LIT> )"
    assert plain_code(code) == "x = 0 + 12 ; print ( a b ,  )"


def test_code_is_scored_by_characters_that_match():
    assert similarity([], ["x = 1"], ["x = <NUM_LIT:1>"]) == 100
    # "x = " matches: 2 · 4 of 5 + 9 characters, in whole percents.
    assert similarity([], ["x = 1", ""], ["x = 2 + y", "<STR_LIT>"]) == 57 / 2


def test_texts_are_scored_by_words():
    pytest.importorskip("rouge")
    assert rouge_l([], ["a cat sat there", "", "..."], ["a cat lay there", "x", "y"]) == pytest.approx(75 / 3, abs=1e-3)


def test_the_summaries_are_those_of_the_paper():
    shown = table(("FOMC", "ScienceQA"), [[80.0], [60.0, 90.0]]).splitlines()
    assert shown[-2].split() == ["FOMC", "80.0", "80.0", "+0.0"]
    assert shown[-1].split() == ["ScienceQA", "60.0", "90.0", "75.0", "-10.0"]


def test_two_tasks_are_learned_and_scored_and_the_last_model_is_kept(world, monkeypatch):
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(Trace, "_score", lambda self, last, records: calls.append(last) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made(world).run()
    R = made(world).run()
    assert calls == [0]
    assert [len(row) for row in R] == [1, 2] and all(0 <= score <= 100 for row in R for score in row)
    out = world / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "2-ScienceQA",
        "answers-1-FOMC.json",
        "answers-2-FOMC.json",
        "answers-2-ScienceQA.json",
        "results.json",
    ]
    answers = json.loads((out / "answers-2-ScienceQA.json").read_text())
    assert len(answers["results"]) == 5 and set(answers["labels"]) == {"A", "B"}
    assert choice([], answers["results"], answers["labels"]) == R[1][1]
    assert json.loads((out / "results.json").read_text())["R"] == R
    monkeypatch.setattr(Trace, "_learn", None)
    assert made(world).run() == R, "nothing was left to do"
    with pytest.raises(ValueError, match="differs in records: 5 there, 4 now"):
        made(world, records=4).run()


def test_what_is_missing_is_said_before_anything_is_learned(world, monkeypatch):
    with pytest.raises(ValueError, match=r"--tasks: FOMX.*C-STANCE"):
        made(world, tasks=("FOMX",)).run()
    with pytest.raises(ValueError, match=r"Py150/train\.json"):
        made(world, tasks=("FOMC", "Py150")).run()
    with pytest.raises(ValueError, match="--epochs=3 is set for each task"):
        made(world, options=("--epochs=3",)).run()
    (world / "trace" / "ScienceQA" / "test.json").write_text('[{"prompt": "p"}]')
    with pytest.raises(DataError, match=r"ScienceQA/test\.json"):
        made(world).run()
    (world / "trace" / "ScienceQA").rename(world / "trace" / "MeetingBank")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="pip install rouge"):
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        made(world, tasks=("MeetingBank",)).run()
    assert not (world / "out").exists()
    with pytest.raises(ValueError, match="FOMC was not learned; sparse-cl learn says above why"):
        made(world, tasks=("FOMC",), options=("--method", "nothing")).run()
