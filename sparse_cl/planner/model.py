"""What is planned: a causal language model, from its configuration alone, and a run."""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparse_cl.arguments import check_options, option
from sparse_cl.models.parts import find_blocks


def number(text: str) -> float:
    """A positive number, with k, M or G after it for a thousand, a million, a billion."""
    scale = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text[-1:].lower(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 20M, got {text!r}")
    return value * scale


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is run; each field is an option of `sparse-cl plan`, with its meaning beside it.

    `precision` is that of training. bf16: weights, products and activations in bfloat16. mixed: float32 weights,
    products in bfloat16 (autocast). fp32: all in float32.

    Raises:
        ValueError: a number that is too small, a share outside [0, 1], or an unknown precision.
    """

    domains: int = option(4, "how many", least=1)
    tokens: float = option(
        20e6,
        "trained on in a domain, repetitions counted, padding left out: 20000000 or 20M (default: 20M)",
        action="store",
        type=number,
    )
    batch_size: int = option(8, "sequences in a step on a device", least=1)
    length: int = option(512, "tokens in a sequence", least=1)
    precision: Literal["bf16", "mixed", "fp32"] = option(
        "bf16", "bf16; mixed: float32 weights, products in bfloat16; fp32"
    )
    checkpointing: bool = option(False, "compute activations again instead of keeping them")
    used: float = option(0.4, "share of directions that all domains use, where a method protects them", least=0)
    probe_records: int = option(128, "records of each domain in one pass of a probe", least=0)
    probe_stages: int = option(2, "how often everything is probed; 2: before and after", least=0)
    forward_passes: int | None = option(None, "of probes, at a stage (none: 2 and one for each domain)", least=0)
    backward_passes: int = option(2, "of probes, at a stage", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 < self.tokens < math.inf:
            raise ValueError(f"tokens: expected a positive number, got {self.tokens}")
        if not self.used <= 1:
            raise ValueError(f"used: expected a share in [0, 1], got {self.used}")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on one device."""
        return self.batch_size * self.length

    @property
    def probe_forward(self) -> int:
        """Forward passes of probes at a stage."""
        return 2 + self.domains if self.forward_passes is None else self.forward_passes


def read_config(source: str) -> Any:
    """The `transformers` configuration in a folder, a config.json, or on the Hub; a ValueError if there is none."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # whatever a configuration's own checks raise
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
