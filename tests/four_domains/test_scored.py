"""`--score learned`: what is scored has the same bits, and the rest is left out."""

from __future__ import annotations

import pytest
from cases.world import write_world

from benchmarks import arena  # noqa: F401  its methods
from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.settings import Settings

DOMAINS = ("code", "medical", "general")


def test_domains_are_scored_once_they_are_learned(tmp_path, tokenizer):
    world = write_world(tmp_path, tokenizer)
    common = {
        "model": str(world / "model"),
        "data": str(world / "data"),
        "domains": DOMAINS,
        "methods": ("adamw", "joint"),
        "steps": 2,
        "batch_size": 2,
        "max_length": 48,
        "eval_records": 2,
        "metrics": ("bits_per_byte",),
    }
    every, some = (experiment.run(Settings(**common, score=score), tmp_path / score) for score in ("all", "learned"))
    for whole, part in zip(every, some, strict=True):
        R, found = whole["R"]["bits_per_byte"], part["R"]["bits_per_byte"]
        # All domains are learned at once, in place of the first.
        known = (3, 3, 3) if part["method"] == "joint" else (1, 2, 3)
        assert found == [R[0], *([*row[:n], *[None] * (3 - n)] for row, n in zip(R[1:], known, strict=True))]
        assert part["summary"]["gain_lost"] == whole["summary"]["gain_lost"]
        assert (part["summary"]["fwt"] is None) == (part["method"] == "adamw")
    assert "score" not in Settings(**common).to_json()
    with pytest.raises(ValueError, match="score: expected all or learned"):
        Settings(score="none")
