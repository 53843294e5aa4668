"""Mean gradients of domains compared: cosines, and the input directions that they share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from sparse_cl.linalg import randomized_svd

from .angles import principal_angles
from .checks import check_alike, check_domains, check_least
from .gradients import MeanGradient, cosine, dot
from .resampling import resamples
from .result import Result

#: Below this reliability the noise correction multiplies noise more than fivefold, and is not given.
RELIABLE = 0.2

#: A whole-model interval wider than this is warned about.
_WIDE = 0.4


@dataclass(frozen=True)
class Cosines(Result):
    """Of one layer, or of all layers as one vector. Lists have an entry a pair of domains, None where there is none.

    Attributes:
        shape: (outputs, inputs); None for the whole model.
        entries: d, how many weights.
        null: 1.96/√d. Of two *isotropic* random gradients |cosine| stays below it in 95 of 100 cases. Real gradients
            have far fewer directions than d, and how many is not known: beyond the null is not yet "related".
        reliability: domain -> what two samples of that domain would have for a cosine.
        cosine: exact.
        low, high: 95 % interval of what another sample of as many tokens would show, from resampled groups of batches,
            reflected about their own mean: resampling adds the same noise once more, and noise shrinks a cosine. To
            hold the cosine of the true mean gradients, which is larger, divide both by `ceiling`.
        ceiling: √(r_A r_B), what two samples of one domain would show.
        corrected: cosine / ceiling (Spearman 1904), not clipped: of the true mean gradients, free of sampling noise.
            None where r_A or r_B is below `RELIABLE`.
        overlap: ‖UᵀV‖²_F/k of the leading k right singular vectors, the input directions of each gradient.
        overlap_null: k/n, of random directions.
        angles: the principal angles between them, radians, smallest first.
    """

    shape: tuple[int, int] | None
    entries: int
    null: float
    reliability: dict[str, float | None]
    cosine: list[float | None]
    low: list[float | None]
    high: list[float | None]
    ceiling: list[float | None]
    corrected: list[float | None]
    overlap: list[float | None] | None = None
    overlap_null: list[float | None] | None = None
    angles: list[list[float] | None] | None = None


@dataclass(frozen=True)
class GradientComparison(Result):
    """Cosines of all pairs of domains, layer by layer and of the whole model.

    Attributes:
        domains, pairs: names, and the order of the lists in `layers` and `model`.
        tokens: domain -> tokens in its mean.
        rank: leading directions that were compared.
    """

    domains: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    tokens: dict[str, int]
    rank: int
    layers: dict[str, Cosines]
    model: Cosines


def compare_gradients(
    gradients: Mapping[str, MeanGradient], rank: int = 8, *, bootstrap: int = 200, seed: int = 0
) -> GradientComparison:
    """Cosines and principal angles between the mean gradients of each pair of domains.

    Args:
        gradients: domain -> what `GradientProbe` gave, of the same layers with the same seed.
        rank: leading right singular vectors to compare; fewer where a gradient has fewer.
        bootstrap: resamples behind the intervals.
        seed: of the resampling and of the randomized SVD.

    Raises:
        ValueError: fewer than two domains; other layers, shapes or seeds in one than in the others; rank or bootstrap
            below 1.

    Warns:
        UserWarning: an interval of the whole model's cosine is wider than 0.4: too few tokens.
    """
    check_least(1, rank=rank, bootstrap=bootstrap)
    check_domains(2, gradients=gradients)
    domains, (one, *others) = tuple(gradients), gradients.values()
    check_alike("gradients", "weights", {domain: _shapes(found) for domain, found in gradients.items()})
    for domain, other in zip(domains[1:], others, strict=True):
        if one.seed != other.seed:
            raise ValueError(
                f"gradients: {domains[0]} was run with seed {one.seed} and {domain} with seed {other.seed}; sketches "
                "can only be compared if all have one seed"
            )
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(next(iter(found.sketches.values()))) for found in gradients.values()]
    draws = [resamples(size, bootstrap, generator) if size > 1 else None for size in sizes]
    whole = _Products(dict.fromkeys(combinations_with_replacement(domains, 2), 0.0), torch.zeros(()))
    layers: dict[str, Cosines] = {}
    for name, shape in _shapes(one).items():
        products = _Products.of(gradients, name)
        whole += products
        bases = [_leading(found.layers[name], rank, seed) for found in gradients.values()]
        overlaps, nulls, angles = zip(*(_shared(u, v) for u, v in combinations(bases, 2)), strict=True)
        shared = {"overlap": list(overlaps), "overlap_null": list(nulls), "angles": list(angles)}
        layers[name] = _cosines(gradients, name, products, draws, shape, math.prod(shape), **shared)
    model = _cosines(gradients, "", whole, draws, None, sum(layer.entries for layer in layers.values()))
    pairs = tuple(combinations(domains, 2))
    tokens = {domain: found.tokens for domain, found in gradients.items()}
    _warn_of_width(model, pairs, tokens)
    return GradientComparison(domains, pairs, tokens, rank, layers, model)


@dataclass
class _Products:
    """Of one layer, or summed over layers: all that cosines and their resamples depend on.

    Attributes:
        exact: (domain, domain) -> product of the mean gradients.
        sketched: products of the groups' sketches with each other, the domains' groups one after another.
    """

    exact: dict[tuple[str, str], float]
    sketched: Tensor

    @classmethod
    def of(cls, gradients: Mapping[str, MeanGradient], name: str) -> _Products:
        pairs = combinations_with_replacement(gradients, 2)
        stacked = torch.cat([found.sketches[name] for found in gradients.values()])
        exact = {(a, b): dot(gradients[a].layers[name], gradients[b].layers[name]) for a, b in pairs}
        return cls(exact, stacked @ stacked.mT)

    def __add__(self, other: _Products) -> _Products:
        exact = {pair: product + other.exact[pair] for pair, product in self.exact.items()}
        return _Products(exact, self.sketched + other.sketched)


def _shapes(gradient: MeanGradient) -> dict[str, tuple[int, int]]:
    return {name: (mean.shape[0], mean.shape[1]) for name, mean in gradient.layers.items()}


def _cosines(
    gradients: Mapping[str, MeanGradient],
    name: str,
    products: _Products,
    draws: Sequence[Tensor | None],
    shape: tuple[int, int] | None,
    entries: int,
    **shared: Any,
) -> Cosines:
    """Of the layer of this name; "": of the whole model. `draws`: of each domain, its groups' weights in resamples."""
    reliability = {domain: found.reliability(name) for domain, found in gradients.items()}
    values, intervals, ceilings, corrected = [], [], [], []
    for a, b in combinations(range(len(draws)), 2):
        first, second = list(gradients)[a], list(gradients)[b]
        exact = products.exact
        value = cosine(exact[first, second], exact[first, first], exact[second, second])
        sure = _ceiling(reliability[first], reliability[second], RELIABLE)
        values.append(value)
        intervals.append(_interval(value, products.sketched, draws, a, b))
        ceilings.append(_ceiling(reliability[first], reliability[second], 0.0))
        corrected.append(None if value is None or sure is None else value / sure)
    lows, highs = ([interval[side] for interval in intervals] for side in (0, 1))
    null = 1.96 / math.sqrt(entries)
    return Cosines(shape, entries, null, reliability, values, lows, highs, ceilings, corrected, **shared)


def _ceiling(a: float | None, b: float | None, least: float) -> float | None:
    """√(a b), or None where one is not above `least`."""
    return None if a is None or b is None or min(a, b) <= least else math.sqrt(a * b)


def _interval(
    exact: float | None, gram: Tensor, draws: Sequence[Tensor | None], a: int, b: int
) -> tuple[float | None, float | None]:
    """Of the cosine of domains a and b; draws as for `_cosines`, gram as `_Products.sketched`."""
    draws_a, draws_b = draws[a], draws[b]
    if exact is None or draws_a is None or draws_b is None:
        return None, None
    sizes = [1 if weights is None else weights.shape[1] for weights in draws]
    blocks = [list(row.split(sizes, 1)) for row in gram.split(sizes)]

    def product(weights_x: Tensor, weights_y: Tensor, x: int, y: int) -> Tensor:
        return ((weights_x @ blocks[x][y]) * weights_y).sum(1)

    squares = product(draws_a, draws_a, a, a) * product(draws_b, draws_b, b, b)
    drawn = product(draws_a, draws_b, a, b) / squares.sqrt()
    drawn = drawn[drawn.isfinite()]
    if not len(drawn):
        return None, None
    below, above = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = float(drawn.mean())
    return max(-1.0, exact + mean - above), min(1.0, exact + mean - below)


def _leading(gradient: Tensor, rank: int, seed: int) -> Tensor:
    """(inputs, k) float64: the leading right singular vectors, at most `rank` and those that exist."""
    rank = min(rank, *gradient.shape)
    _, values, rows = randomized_svd(
        gradient.double(), rank, power_iterations=2, generator=torch.Generator().manual_seed(seed)
    )
    return rows[values > 0].mT


def _shared(u: Tensor, v: Tensor) -> tuple[float | None, float | None, list[float] | None]:
    k = min(u.shape[1], v.shape[1])
    if k == 0:
        return None, None, None
    angles = principal_angles(u[:, :k], v[:, :k])
    return float(angles.cos().square().mean()), k / len(u), angles.tolist()


def _warn_of_width(model: Cosines, pairs: tuple[tuple[str, str], ...], tokens: dict[str, int]) -> None:
    widths = [
        (high - low, pair)
        for low, high, pair in zip(model.low, model.high, pairs, strict=True)
        if low is not None and high is not None
    ]
    if widths and (widest := max(widths))[0] > _WIDE:
        width, (a, b) = widest
        warnings.warn(
            f"the cosine of {a} and {b} has an interval {width:.2f} wide, from {tokens[a]} and {tokens[b]} tokens; "
            "give the gradient probe more records",
            stacklevel=3,
        )
