"""What is planned: a causal language model, from its configuration alone, and a run."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_cl.models.parts import find_blocks

PRECISIONS = ("bf16", "mixed", "fp32")
"""bf16: weights, products and activations in bfloat16. mixed: float32 weights, products in bfloat16 (autocast).
fp32: all in float32."""


def _set(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Workload:
    """What is run; each field is an option of `sparse-cl plan`, with its meaning beside it.

    Raises:
        ValueError: a number that is not positive, a share outside [0, 1], or an unknown precision.
    """

    domains: int = _set(4, "how many")
    tokens: float = _set(20e6, "trained on in a domain, repetitions counted, padding left out: 20000000 or 20M")
    batch_size: int = _set(8, "sequences in a step on a device")
    length: int = _set(512, "tokens in a sequence")
    precision: str = _set("bf16", "bf16; mixed: float32 weights, products in bfloat16; fp32")
    checkpointing: bool = _set(False, "compute activations again instead of keeping them")
    used: float = _set(0.4, "share of directions that all domains use, where a method protects them")
    probe_records: int = _set(128, "records of each domain in one pass of a probe")
    probe_stages: int = _set(2, "how often everything is probed; 2: before and after")
    forward_passes: int | None = _set(None, "of probes, at a stage (none: 2 and one for each domain)")
    backward_passes: int = _set(2, "of probes, at a stage")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = "positive number" if name in ("domains", "tokens", "batch_size", "length") else "number from 0 on"
            if isinstance(value, (int, float)) and not (0 < value < math.inf or value == 0 and least[0] == "n"):
                raise ValueError(f"{name}: expected a {least}, got {value}")
        if self.used > 1:
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


def build(config: Any, name: str, precision: str = "bf16", blocks: int | None = None) -> Any:
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
