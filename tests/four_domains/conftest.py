"""What makes the tests of runs quick without proving less."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _imports_are_never_garbage():
    """The Trainer collects garbage before it trains: with transformers to look at, that is half of a tiny run."""
    from sparse_cl.four_domains import experiment  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing: it takes longer than training a tiny model, and is tested where pictures are looked at."""
    from sparse_cl.four_domains import experiment

    monkeypatch.setattr(experiment, "draw_all", lambda runs, out: None)
