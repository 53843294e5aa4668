"""Settings that all tests share."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Read once, when torch loads. Each core has a worker; more threads, or threads that spin at barriers, make tests crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


def pytest_terminal_summary(terminalreporter) -> None:
    """What ran; a header would be left out of quiet output."""
    from sparse_cl import build_info

    info = build_info()
    levels = " ".join(info["cpu_levels"] or ())
    terminalreporter.write_line(f"sparse_cl ran on {info['runs']}, at CPU level {info['cpu_level']} of {levels}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws from the global generator is the same whatever ran before it."""
    import torch

    torch.manual_seed(0)


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
    """Nothing is drawn: it takes longer than training a tiny model, and is tested where pictures are looked at."""
    from sparse_cl.four_domains import experiment
    from sparse_cl.report import html

    monkeypatch.setattr(experiment, "draw_all", lambda runs, out: None)
    monkeypatch.setattr(html, "_picture", lambda figure: {"source": "", "percent": 1.0, "inches": 1.0})


@pytest.fixture(params=["native", "reference"])
def implementation(request, monkeypatch):
    """Runs a test of an optimizer once with the native step, if it was built, and once with the reference."""
    from sparse_cl import ops, reference

    if request.param == "reference":
        for name in ("masked_adamw_", "apply_updates_", "active_norm", "scale_active_"):
            monkeypatch.setattr(ops, name, getattr(reference, name))
    elif not ops.LOADED["cpu"]:
        pytest.skip("no native library was built")
    return request.param


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Folder with real data and models for tests that want some; they are skipped where there is none."""
    folder = Path(os.environ.get("SPARSE_CL_SHARED") or Path(__file__).parents[1] / ".." / "shared").resolve()
    if not (folder / "data").is_dir():
        pytest.skip("no real data: set SPARSE_CL_SHARED to a folder with data/ and models/")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer of 300 pieces."""
    from sparse_cl.four_domains.embedded_model import build_tokenizer

    return build_tokenizer(["What is one plus two? The answer is three."] * 4, 300)


@pytest.fixture
def tiny_llama(tokenizer):
    """A random Llama of two layers, 24 neurons each, the same every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()
