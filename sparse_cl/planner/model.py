"""What is planned: a causal language model, from its configuration alone, and a run."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_cl.models.parts import find_blocks

PRECISIONS = ("bf16", "mixed", "fp32")
"""bf16: weights, products and activations in bfloat16. mixed: float32 weights, products in bfloat16 (autocast).
fp32: all in float32."""


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        domains: number of them.
        tokens: that are trained on in a domain, repetitions counted, padding left out.
        batch_size, length: sequences of a step on a device, and their tokens.
        precision: one of `PRECISIONS`.
        checkpointing: whether the activations of a block are computed again instead of kept.
        used: share of the input directions that all domains together use, for the methods that protect them.
        probe_records, probe_stages: of each domain in one pass; 2 stages are before and after the sequence.
        forward_passes, backward_passes: over a domain's records at a stage, forward alone (None: the 2 + domains of
            `sparse-cl probe`), and forward and backward.

    Raises:
        ValueError: a number that is not positive, a share outside [0, 1], or an unknown precision.
    """

    domains: int = 4
    tokens: float = 20e6
    batch_size: int = 8
    length: int = 512
    precision: str = "bf16"
    checkpointing: bool = False
    used: float = 0.4
    probe_records: int = 128
    probe_stages: int = 2
    forward_passes: int | None = None
    backward_passes: int = 2

    def __post_init__(self) -> None:
        for name in ("domains", "tokens", "batch_size", "length"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("probe_records", "probe_stages", "forward_passes", "backward_passes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected zero or more, got {getattr(self, name)}")
        if not 0 <= self.used <= 1:
            raise ValueError(f"used: expected a share in [0, 1], got {self.used}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on one device."""
        return self.batch_size * self.length


def read_config(source: str) -> Any:
    """The `transformers` configuration in a folder, a config.json, or on the Hub; a ValueError if there is none."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model {source}: no configuration of a transformers model could be read ({reason}). Give a folder with "
            "a config.json, that file, or a name on the Hub"
        ) from error


def build(config: Any, name: str, precision: str = "bf16", blocks: int | None = None) -> nn.Module:
    """The causal language model of a configuration, on the meta device, in the dtype in which its weights are trained.

    Args:
        name: for errors.
        blocks: how many; None: all.

    Raises:
        ValueError: it is not a causal language model, it is a mixture of experts, or its blocks are not known here.
    """
    import transformers

    if blocks is not None:
        config = copy.deepcopy(config)
        text = config.get_text_config()
        for key, value in list(vars(text).items()):
            if isinstance(value, (list, tuple)) and len(value) == text.num_hidden_layers:
                setattr(text, key, value[:blocks])  # such as the kind of each layer's attention
        text.num_hidden_layers = blocks
    try:
        with torch.device("meta"):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ValueError(
            f"--model {name}: a {type(config).__name__} is of no causal language model, and no other is planned for. "
            "Give one that AutoModelForCausalLM loads"
        ) from error
    try:
        find_blocks(model)
    except ValueError as error:
        raise ValueError(
            f"--model {name}: {str(error).partition('. ')[0]}. The planner takes dense models whose blocks it knows"
        ) from error
    return model
