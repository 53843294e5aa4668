"""Hyperparameters of AdamW, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_options(group: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the first hyperparameter of a group that AdamW cannot run with."""

    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"{name}: expected {expected}, got {group[name]!r}")

    if group.get("differentiable"):
        refuse("differentiable", "False: SparseMaskedAdamW steps in place, outside autograd")
    for name in ("foreach", "fused"):
        if group.get(name):
            refuse(name, "nothing: every step is one fused op")
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        refuse("lr", "a float or a one-element tensor")
    if not float(lr) >= 0.0:
        refuse("lr", "a number of at least 0")
    if len(betas) != 2 or any(isinstance(b, Tensor) and b.numel() != 1 for b in betas):
        refuse("betas", "two numbers or one-element tensors")
    if not all(0.0 <= float(b) < 1.0 for b in betas):
        refuse("betas", "two numbers in [0, 1)")
    if group["second_moment"] not in ("entry", "row"):
        refuse("second_moment", "'entry' or 'row'")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0.0:
            refuse(name, "a number of at least 0")
