"""One model in a few numbers, to stand beside other models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any

from torch import nn

from sparse_cl.models.parts import find_mlps
from sparse_cl.probes.superposition import superposition
from sparse_cl.report.section import mean_of_known, nearest

SHARE = 0.05
"""Share of a layer's neurons whose overlap is compared between models."""


def summary(name: str, model: nn.Module, record: Mapping[str, Any]) -> dict[str, Any]:
    """Means over pairs of domains and layers of what `probe_model` found, for `scale_section`.

    Returns:
        `model`, `family` (the architecture), `width` (of the hidden states), `layers`, `parameters`, and each of the
        following or None where it was not probed:
        `overlap`: IoU of the most active `SHARE` of the neurons: `iou`, `null`, `ceiling`.
        `cosine`: of the gradients: `mean`; `absolute`, the mean of |cosine|, and its `null`, √(2/πd) for isotropic
        gradients of d entries; `corrected`, the mean of |cosine / ceiling| where a ceiling is sure; `ceiling`.
        `sparsity`: share of neurons that holds 99 % of a token's L1 mass: `needed`, and `null` for Gaussians.
        `capacity`: share of a layer's input directions that all domains use: `used`, and `null`, were they unrelated.
        `superposition`: feature dimensionality of neurons, and its `null`, of random directions; of any model of MLPs.
    """
    config: Any = model.config
    return {
        "model": name,
        "family": config.model_type,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "overlap": _overlap(record["overlap"]) if "overlap" in record else None,
        "cosine": _cosine(record["cosines"]) if "cosines" in record else None,
        "sparsity": _sparsity(record["activation"]) if "activation" in record else None,
        "capacity": _capacity(record["capacity"]) if "capacity" in record else None,
        "superposition": _superposition(model),
    }


def _overlap(record: Mapping[str, Any]) -> dict[str, Any]:
    at = nearest(record["fractions"], SHARE)
    return {
        "share": record["fractions"][at],
        "iou": mean(pair[at] for pair in record["mean_iou"]),
        "null": record["mean_null"][at],
        "ceiling": mean_of_known(pair[at] for pair in record["mean_ceiling"]),
    }


def _cosine(record: Mapping[str, Any]) -> dict[str, Any]:
    layers = list(record["layers"].values())

    def values(key: str) -> list[float]:
        return [value for layer in layers for value in layer[key] if value is not None]

    return {
        "mean": mean_of_known(values("cosine")),
        "absolute": mean_of_known(map(abs, values("cosine"))),
        "null": mean(math.sqrt(2 / (math.pi * layer["entries"])) for layer in layers),
        "ceiling": mean_of_known(values("ceiling")),
        "corrected": mean_of_known(map(abs, values("corrected"))),
    }


def _sparsity(record: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    domains = list(record.values())
    return {
        "needed": mean(domain["mean"]["product"]["needed"]["0.99"]["mean"] for domain in domains),
        "null": domains[0]["chance"]["product"]["needed"]["0.99"],
    }


def _capacity(record: Mapping[str, Any]) -> dict[str, Any]:
    layers = list(record["layers"].values())
    return {
        name: mean(layer[key][-1] / layer["width"] for layer in layers)
        for name, key in (("used", "used"), ("null", "used_null"))
    }


def _superposition(model: nn.Module) -> dict[str, Any] | None:
    try:
        find_mlps(model)
    except ValueError:  # of no architecture with MLPs
        return None
    found = superposition(model).values()
    return {"mean": mean(mlp.mean for mlp in found), "null": mean(mlp.null for mlp in found)}
