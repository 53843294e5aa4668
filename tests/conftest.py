"""Settings that all tests share."""

import os

import pytest
from hypothesis import settings

# Read once, when torch loads. Threads that spin at barriers make tests crawl on a machine that does other things too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(params=["native", "reference"])
def implementation(request, monkeypatch):
    """Runs a test of an optimizer once with the native step, if it was built, and once with the reference."""
    from sparse_cl import ops, reference

    if request.param == "reference":
        monkeypatch.setattr(ops, "masked_adamw_", reference.masked_adamw_)
    elif not ops.LOADED["cpu"]:
        pytest.skip("no native library was built")
    return request.param
