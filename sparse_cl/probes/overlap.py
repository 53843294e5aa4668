"""How far domains use the same neurons."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from sparse_cl.models.neuron_masks import neuron_count

from .chance import iou_interval, iou_of, mean_iou_interval
from .checks import check_alike, check_domains, check_least
from .resampling import halves, resamples, top_set_interval
from .result import Result, plain
from .scores import ActivationScores, PartScores

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_SPLITS = 10
_WIDE = 0.2
"""A 95 % interval wider than this says little, and is warned of."""


@dataclass(frozen=True)
class Overlap(Result):
    """Intersection over union of the top-K neurons of each pair of domains, by layer, with what to hold it against.

    Tensors are float64; P pairs, F fractions, L layers, D domains. NaN where a domain has one group of sequences only.

    Attributes:
        domains, layers, fractions: their names, and the shares of a layer's neurons that K is.
        widths: neurons of each layer.
        tokens: domain → how many tokens its means are over.
        part: of the activation ("product", "gate", "up").
        iou: (P, F, L), |A ∩ B| / |A ∪ B| of the sets with the largest mean |a|, massive activations left out.
        massive_iou: (P, F, L), the same with them.
        interval: (P, F, L, 2), 95 %, sequences resampled (`resampling.top_set_interval`).
        null: (F, L), K / (2d - K): about the mean for random sets of K of d neurons.
        null_interval: (F, L, 2), 95 % of random sets lie in it, by the hypergeometric law.
        ceiling: (D, F, L), the IoU of the sets of two random halves of one domain's sequences, mean of 10 splits. Each
            half has half of the tokens, so that the same domain again, in full, would have more.
        mean_iou, mean_massive_iou (P, F); mean_interval (P, F, 2); mean_null (F,); mean_null_interval (F, 2);
            mean_ceiling (D, F): of the means over layers.
    """

    domains: tuple[str, ...]
    layers: tuple[str, ...]
    fractions: tuple[float, ...]
    widths: tuple[int, ...]
    tokens: Mapping[str, int]
    part: str
    iou: Tensor
    massive_iou: Tensor
    interval: Tensor
    null: Tensor
    null_interval: Tensor
    ceiling: Tensor
    mean_iou: Tensor
    mean_massive_iou: Tensor
    mean_interval: Tensor
    mean_null: Tensor
    mean_null_interval: Tensor
    mean_ceiling: Tensor

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of domains, in the order of the tensors."""
        return list(combinations(self.domains, 2))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON: the tensors as nested lists, a ceiling for each pair (the mean of its domains'), None for NaN.

        `k` is (F, L): K by fraction and layer.
        """
        first, second = ([self.domains.index(pair[side]) for pair in self.pairs] for side in (0, 1))
        ceilings = {"ceiling": self.ceiling, "mean_ceiling": self.mean_ceiling}
        return {
            **super().to_json(),
            "pairs": plain(self.pairs),
            "k": [[neuron_count(fraction, width) for width in self.widths] for fraction in self.fractions],
            **{name: plain((values[first] + values[second]) / 2) for name, values in ceilings.items()},
        }


def overlap(
    scores_by_domain: Mapping[str, ActivationScores],
    fractions: Sequence[float] = FRACTIONS,
    *,
    bootstrap: int = 200,
    seed: int = 0,
    part: str = "product",
) -> Overlap:
    """The overlap of the top-K neurons of each pair of domains.

    Args:
        scores_by_domain: at least two, of one model.
        fractions: K as shares of a layer's neurons, in (0, 1]; rounded, at least one neuron.
        bootstrap: resamples of the groups of sequences, at least 2.
        seed: of the resamples, and of the order in which neurons of equal mean are ranked (at random, a new order for
            each domain: dead neurons must not look like neurons in common).

    Warns where an interval of a mean over layers is wider than 0.2, or a domain has one group only.

    Raises:
        ValueError: fewer than two domains, domains of different models, a fraction out of range.
    """
    check_domains(2, scores_by_domain=scores_by_domain)
    if not fractions:
        raise ValueError("fractions: expected at least one, got none")
    check_least(2, bootstrap=bootstrap)
    parts = {name: scores.part(part) for name, scores in scores_by_domain.items()}
    by_layer = {name: {layer: len(p.top) for layer, p in found.items()} for name, found in parts.items()}
    domains, (shapes, *_) = tuple(parts), by_layer.values()
    # Before domains are compared, so that a fraction that fits no layer is named first.
    for fraction in fractions:
        neuron_count(fraction, min(shapes.values()))
    check_alike("scores_by_domain", "neurons", by_layer)
    generator = torch.Generator().manual_seed(seed)
    # One draw for all layers of a domain, so that the mean over layers is resampled as a whole.
    draws = {name: group_draws(next(iter(parts[name].values())), bootstrap, generator) for name in domains}
    found: dict[str, list[Tensor]] = {"ceiling": [], "plain": [], "massive": [], "drawn": []}
    for layer, width in shapes.items():
        ks = [neuron_count(fraction, width) for fraction in fractions]
        ranks = {name: layer_ranks(parts[name][layer], draws[name], generator) for name in domains}
        both = [ranks[name]["halves"] for name in domains]
        found["ceiling"].append(torch.stack([_iou(one, other, ks, _SPLITS).mean(1) for one, other in both]))
        for kind, count in (("plain", 1), ("massive", 1), ("drawn", bootstrap)):
            ious = [_iou(ranks[a][kind], ranks[b][kind], ks, count) for a, b in combinations(domains, 2)]
            found[kind].append(torch.stack(ious))
    iou, massive_iou = (torch.stack(found[kind], -1)[:, :, 0] for kind in ("plain", "massive"))
    ceiling = torch.stack(found["ceiling"], -1)
    resampled = torch.stack(found["drawn"], -1).movedim(2, 0)  # (bootstrap, P, F, L)
    sets = [[(width, neuron_count(fraction, width)) for width in shapes.values()] for fraction in fractions]
    null = _float64([[k / (2 * width - k) for width, k in row] for row in sets])
    result = Overlap(
        domains=domains,
        layers=tuple(shapes),
        fractions=tuple(fractions),
        widths=tuple(shapes.values()),
        tokens={name: scores.tokens for name, scores in scores_by_domain.items()},
        part=part,
        iou=iou,
        massive_iou=massive_iou,
        interval=top_set_interval(iou, resampled),
        null=null,
        null_interval=_float64([[iou_interval(*of) for of in row] for row in sets]),
        ceiling=ceiling,
        mean_iou=iou.mean(-1),
        mean_massive_iou=massive_iou.mean(-1),
        mean_interval=top_set_interval(iou.mean(-1), resampled.mean(-1)),
        mean_null=null.mean(-1),
        mean_null_interval=_float64([mean_iou_interval(row, generator) for row in sets]),
        mean_ceiling=ceiling.mean(-1),
    )
    _warn(result)
    return result


def group_draws(part: PartScores, bootstrap: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of the groups (draws, groups) that make resamples ("drawn"), and the two halves of splits.

    Empty where only one group has tokens.
    """
    used = (part.tokens > 0).nonzero().flatten()
    if len(used) < 2:
        return {}
    one = halves(len(used), _SPLITS, generator)
    weights = {"drawn": resamples(len(used), bootstrap, generator), "half": one, "other": 1 - one}
    return {name: w.new_zeros(len(w), len(part.tokens)).index_copy_(1, used, w) for name, w in weights.items()}


def layer_ranks(part: PartScores, draws: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Any]:
    """Ranks (draws, neurons) of a layer's neurons in one domain, by mean |a|, massive ones left out.

    Returns:
        "plain" and "massive" (with massive activations): one draw, all tokens. "drawn": the resamples. "halves": a
        pair. What `group_draws` could not draw is None.
    """
    order = torch.randperm(len(part.top), generator=generator)
    sums = part.sums(massive=False)

    def drawn(name: str) -> Tensor | None:
        return _ranks(draws[name] @ sums / (draws[name] @ part.tokens)[:, None], order) if name in draws else None

    return {
        "plain": _ranks(sums.sum(0)[None], order),
        "massive": _ranks(part.magnitude.sum(0)[None], order),
        "drawn": drawn("drawn"),
        "halves": (drawn("half"), drawn("other")),
    }


def _ranks(values: Tensor, order: Tensor) -> Tensor:
    """Places (n, neurons) in descending order of values (n, neurons), from 0; equal ones in the order given."""
    place = torch.empty(values.shape, dtype=torch.int64)
    descending = order[values[:, order].argsort(dim=1, descending=True, stable=True)]
    return place.scatter_(1, descending, torch.arange(values.shape[1]).expand(values.shape))


def _iou(a: Tensor | None, b: Tensor | None, ks: Sequence[int], count: int) -> Tensor:
    """(ks, count) of `count` draws of two domains' ranks."""
    if a is None or b is None:
        return torch.full((len(ks), count), torch.nan, dtype=torch.float64)
    last = torch.maximum(a, b)
    return torch.stack([iou_of((last < k).sum(1).double(), k) for k in ks])


def _warn(result: Overlap) -> None:
    alone = [name for i, name in enumerate(result.domains) if result.ceiling[i].isnan().any()]
    if alone:
        warnings.warn(
            f"overlap: {', '.join(alone)}: all tokens are of one group of sequences, which cannot be split: there is "
            "neither an interval nor a ceiling. Give more sequences",
            stacklevel=3,
        )
    width = (result.mean_interval[..., 1] - result.mean_interval[..., 0]).nan_to_num(0)
    if bool((width > _WIDE).any()):
        pair, fraction = divmod(int(width.argmax()), width.shape[1])
        names = result.pairs[pair]
        tokens = " and ".join(f"{result.tokens[name]} tokens of {name}" for name in names)
        others = int((width > _WIDE).sum()) - 1
        warnings.warn(
            f"overlap: too few tokens: the 95 % interval of the mean IoU of {' and '.join(names)} at a fraction of "
            f"{result.fractions[fraction]:g} is {float(width.max()):.2f} wide ({tokens}), above {_WIDE}"
            + (f"; so are those of {others} other pairs and fractions" if others else "")
            + ". Give more sequences",
            stacklevel=3,
        )


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
