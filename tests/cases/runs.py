"""What a run records, made by hand."""

from __future__ import annotations

from sparse_cl.four_domains.metrics import summarize
from sparse_cl.methods import METHODS

COMMON = {
    **{"model": "m", "data": "d", "reference": "r.txt", "steps": 10, "batch_size": 4, "max_length": 64},
    **{"eval_records": 8, "split": "test", "metrics": ["bits_per_byte"], "autocast": None, "protect": None},
}


def run(method="adamw", seed=0, lr=1e-3, R=((4.0, 3.0), (2.0, 3.0), (3.0, 1.0)), own=None, domains=("a", "b"), **other):
    R = [list(row) for row in R]
    summary = summarize(R, lower_is_better=True)
    return {
        "method": method,
        "kind": METHODS[method].kind,
        "protects": False,
        "domains": list(domains),
        "seed": seed,
        "settings": {**COMMON, "lr": lr, "method": own or {}, **other},
        "versions": {},
        "R": {"bits_per_byte": R},
        "R_reference": [1.0, 1.1, 1.25],
        "drift": [0.0, 0.1, 0.2],
        "summary": {**summary, "by_metric": {"bits_per_byte": summary}},
        "state_bytes": 2_000_000,
        "losses": [],
        "domain_records": [],
        "seconds": 3.0,
        "step_seconds": 0.01,
        "peak_memory_bytes": 5_000_000,
    }
