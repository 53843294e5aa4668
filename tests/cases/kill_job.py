"""The command in a process forked from one that has imported all of this, which takes longer than the run."""

from __future__ import annotations

import gc

import matplotlib.backends.backend_agg  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from sparse_cl.cli import main

# What was imported is never garbage: without this, half of a tiny run is collecting it.
gc.freeze()


def job(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    raise SystemExit(main(arguments))
