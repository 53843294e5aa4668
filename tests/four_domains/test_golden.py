"""A short run of the embedded model and data gives the numbers that it gave before the code moved into its folders.

`golden/results.json` was written by the code before the move (version 0.1.0, native libraries, torch 2.13.0, one
thread); on the machine that wrote it the moved code gave the same bits. `elastic` there is of 0.2, which pulls along
leading directions alone. Training spreads a difference in rounding: on
that machine two threads change a score by up to 4e-5, and SSE with the plain PyTorch reference by up to 2e-3 bits per
byte, 1e-2 nats of loss and 9e-3 of a share. So numbers are compared up to `TOLERANCE`, and all else exactly.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_cl import cli
from sparse_cl.four_domains import embedded_model

GOLDEN = Path(__file__).parent / "golden" / "results.json"
COMMAND = "run --method adamw,lora,elastic --steps 10 --batch-size 8 --eval-records 4 --out"
SMALL = {"lines": 1000, "steps": 50, "batch_size": 16, "hidden_size": 64, "intermediate_size": 96}
TOLERANCE = 0.02
"""In bits per byte, nats (of drift), and shares."""
OF_LOSSES = 0.05
"""In nats: a loss has no mean over records behind it."""
OF_A_RECORD = 0.25
"""Of accuracy and exact match, which have 4 records: one may be close enough to a tie to go either way."""


def comparable(run):
    """A run's record, without what another machine or version has differently."""
    summary = {name: value for name, value in run["summary"].items() if name != "by_metric"}
    return {**run, "summary": summary, "versions": sorted(run["versions"])}


def assert_close(found, expected, tolerance=TOLERANCE, place="run"):
    """Numbers that are no counts up to the tolerance of their place, all else exactly."""
    tolerance = {"losses": OF_LOSSES, "accuracy": OF_A_RECORD, "exact_match": OF_A_RECORD}.get(
        place.rpartition(".")[2], tolerance
    )
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name in expected:
            assert_close(found[name], expected[name], tolerance, f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_close(found[number], value, tolerance, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance, rel=0), place
    else:
        assert found == expected, place


def test_a_run_has_the_numbers_of_before_the_move(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.setenv("SPARSE_CL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_model, "RECIPE", {**embedded_model.RECIPE, **SMALL, "num_hidden_layers": 2})
    assert cli.main([*COMMAND.split(), str(tmp_path / "out")]) == 0
    runs, golden = (json.loads(path.read_text())["runs"] for path in (tmp_path / "out" / "results.json", GOLDEN))
    assert [run["method"] for run in runs] == [run["method"] for run in golden]
    for run, expected in zip(runs, golden, strict=True):
        assert_close(comparable(run), comparable(expected), place=run["method"])
