"""What each method asks of a model: which parameters move, the optimizer's state, and the products of one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_cl.methods import METHODS

from .adapter_demands import elastic_lora, lora, o_lora, orthogonal_lora, osf, sparse_masked_lora
from .demand import Demand
from .dense_demands import adamw, curvature, dense, elastic, ewc, freeze_lower, migu, mofo, orthogonal
from .neuron_demands import orthogonal_masked, sparse_masked
from .shapes import ModelShape


def demand(method: str, shape: ModelShape, **options: Any) -> Demand:
    """What a method of `sparse_cl.methods.METHODS` asks for.

    Args:
        options: of the method's constructor.

    Raises:
        ValueError: no such method, an option that it refuses, or a model that it cannot train.
    """
    if method not in _DEMANDS:
        raise ValueError(f"unknown method {method!r}: expected {', '.join(_DEMANDS)}")
    made = METHODS[method](**options)
    made.check(shape.model)
    return _DEMANDS[method](shape, made.settings())


_DEMANDS: dict[str, Callable[[ModelShape, dict[str, Any]], Demand]] = {
    "adamw": adamw,
    "lora": lora,
    "lora-wd": lora,
    "freeze-lower": freeze_lower,
    "ewc": ewc,
    "replay-1": adamw,
    "replay-5": adamw,
    "mofo": mofo,
    "migu": migu,
    "o-lora": o_lora,
    "osf": osf,
    "single": adamw,
    "joint": adamw,
    "sparse-masked": sparse_masked,
    "sparse-masked-lora": sparse_masked_lora,
    "selective-write": dense,
    "orthogonal": orthogonal,
    "orthogonal-lora": orthogonal_lora,
    "orthogonal-masked": orthogonal_masked,
    "elastic": elastic,
    "elastic-lora": elastic_lora,
    "two-four": dense,
    "curvature": curvature,
}
"""By the names of `METHODS`."""
