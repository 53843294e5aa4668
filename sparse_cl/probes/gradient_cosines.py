"""Mean gradients of domains compared: cosines, and the input directions that they share."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_cl.linalg import randomized_svd

from .angles import principal_angles
from .gradients import MeanGradient, dot
from .resampling import resamples

#: Below this reliability the noise correction multiplies noise more than fivefold, and is not given.
RELIABLE = 0.2

#: A whole-model interval wider than this is warned about.
_WIDE = 0.4


@dataclass(frozen=True)
class Cosines:
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
class GradientComparison:
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the attributes by name."""
        record = asdict(self)
        record["domains"], record["pairs"] = list(self.domains), [list(pair) for pair in self.pairs]
        for cosines in (*record["layers"].values(), record["model"]):
            cosines["shape"] = cosines["shape"] and list(cosines["shape"])
        return record


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
    _check(gradients, rank, bootstrap)
    domains = tuple(gradients)
    pairs = tuple(itertools.combinations(domains, 2))
    layers: dict[str, Cosines] = {}
    products, grams = {}, {}
    for name in gradients[domains[0]].layers:
        products[name] = {
            (a, b): dot(gradients[a].layers[name], gradients[b].layers[name])
            for a, b in itertools.combinations_with_replacement(domains, 2)
        }
        # All that a resampled cosine depends on: the groups' products with each other.
        stacked = torch.cat([gradients[domain].sketches[name] for domain in domains])
        grams[name] = stacked @ stacked.mT
    sizes = [len(next(iter(gradients[domain].sketches.values()))) for domain in domains]
    generator = torch.Generator().manual_seed(seed)
    counts = [resamples(size, bootstrap, generator) if size > 1 else None for size in sizes]

    def cosines(
        name: str, product: dict, gram: Tensor, shape: tuple[int, int] | None, entries: int, **more: Any
    ) -> Cosines:
        reliability = {domain: gradients[domain].reliability(name) for domain in domains}
        values = [_cosine(product, a, b) for a, b in pairs]
        intervals = [
            _interval(value, gram, sizes, counts, domains.index(a), domains.index(b))
            for value, (a, b) in zip(values, pairs, strict=True)
        ]
        ceilings = [_ceiling(reliability[a], reliability[b], 0.0) for a, b in pairs]
        reliable = [_ceiling(reliability[a], reliability[b], RELIABLE) for a, b in pairs]
        return Cosines(
            shape,
            entries,
            1.96 / math.sqrt(entries),
            reliability,
            values,
            [low for low, _ in intervals],
            [high for _, high in intervals],
            ceilings,
            [None if v is None or c is None else v / c for v, c in zip(values, reliable, strict=True)],
            **more,
        )

    for name, some in gradients[domains[0]].layers.items():
        bases = {domain: _leading(gradients[domain].layers[name], rank, seed) for domain in domains}
        shared = [_shared(bases[a], bases[b]) for a, b in pairs]
        layers[name] = cosines(
            name,
            products[name],
            grams[name],
            (some.shape[0], some.shape[1]),
            some.numel(),
            overlap=[overlap for overlap, _, _ in shared],
            overlap_null=[null for _, null, _ in shared],
            angles=[angles for _, _, angles in shared],
        )
    summed = {key: sum(product[key] for product in products.values()) for key in next(iter(products.values()))}
    entries = sum(layer.entries for layer in layers.values())
    model = cosines("", summed, sum(grams.values(), torch.zeros(())), None, entries)
    tokens = {domain: gradient.tokens for domain, gradient in gradients.items()}
    _warn_of_width(model, pairs, tokens)
    return GradientComparison(domains, pairs, tokens, rank, layers, model)


def _check(gradients: Mapping[str, MeanGradient], rank: int, bootstrap: int) -> None:
    for name, value in (("rank", rank), ("bootstrap", bootstrap)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if len(gradients) < 2:
        raise ValueError(f"gradients: expected at least two domains, got {', '.join(gradients) or 'none'}")
    (first, one), *others = gradients.items()
    shapes = {name: tuple(layer.shape) for name, layer in one.layers.items()}
    for domain, other in others:
        theirs = {name: tuple(layer.shape) for name, layer in other.layers.items()}
        if shapes != theirs:
            odd = next(name for name in [*shapes, *theirs] if shapes.get(name) != theirs.get(name))
            raise ValueError(
                f"gradients: {odd} is {shapes.get(odd, 'absent')} in {first} and {theirs.get(odd, 'absent')} in "
                f"{domain}; run the probe on one model, with the same modules"
            )
        if one.seed != other.seed:
            raise ValueError(
                f"gradients: {first} was run with seed {one.seed} and {domain} with seed {other.seed}; sketches can "
                "only be compared if all have one seed"
            )


def _cosine(product: dict[tuple[str, str], float], a: str, b: str) -> float | None:
    scale = math.sqrt(product[a, a] * product[b, b])
    return product[a, b] / scale if scale > 0 else None


def _ceiling(a: float | None, b: float | None, least: float) -> float | None:
    """√(a b), or None where one is not above `least`."""
    return None if a is None or b is None or min(a, b) <= least else math.sqrt(a * b)


def _interval(
    exact: float | None, gram: Tensor, sizes: list[int], counts: list[Tensor | None], a: int, b: int
) -> tuple[float | None, float | None]:
    counts_a, counts_b = counts[a], counts[b]
    if exact is None or counts_a is None or counts_b is None:
        return None, None
    blocks = [list(row.split(sizes, 1)) for row in gram.split(sizes)]

    def sketched(weights_a: Tensor, weights_b: Tensor) -> Tensor:
        product = ((weights_a @ blocks[a][b]) * weights_b).sum(1)
        first = ((weights_a @ blocks[a][a]) * weights_a).sum(1)
        second = ((weights_b @ blocks[b][b]) * weights_b).sum(1)
        return product / (first * second).sqrt()

    drawn = sketched(counts_a, counts_b)
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
