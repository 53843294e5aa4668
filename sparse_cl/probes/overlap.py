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

from .chance import central_interval, hypergeometric, iou_of, mean_iou_interval
from .resampling import halves, resamples, top_set_interval
from .scores import ActivationScores, PartScores

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_SPLITS = 10
_WIDE = 0.2
"""A 95 % interval wider than this says little, and is warned of."""


@dataclass(frozen=True)
class Overlap:
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
        values = self.tensors()
        for name in ("ceiling", "mean_ceiling"):
            values[name] = (values[name][first] + values[name][second]) / 2
        return {
            "domains": list(self.domains),
            "pairs": [list(pair) for pair in self.pairs],
            "layers": list(self.layers),
            "widths": list(self.widths),
            "fractions": list(self.fractions),
            "k": [[neuron_count(fraction, width) for width in self.widths] for fraction in self.fractions],
            "tokens": dict(self.tokens),
            "part": self.part,
            **{name: _plain(value.tolist()) for name, value in values.items()},
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
    domains = tuple(scores_by_domain)
    parts = _check(scores_by_domain, fractions, bootstrap, part)
    layers = tuple(next(iter(parts.values())))
    widths = tuple(len(next(iter(parts.values()))[layer].top) for layer in layers)
    sizes = [[neuron_count(fraction, width) for width in widths] for fraction in fractions]
    generator = torch.Generator().manual_seed(seed)
    # One draw for all layers of a domain, so that the mean over layers is resampled as a whole.
    draws = {name: group_draws(next(iter(parts[name].values())), bootstrap, generator) for name in domains}
    found: dict[str, list[Tensor]] = {name: [] for name in ("iou", "massive_iou", "ceiling", "resampled")}
    for number, layer in enumerate(layers):
        ks = [row[number] for row in sizes]
        ranks = {name: layer_ranks(parts[name][layer], draws[name], generator) for name in domains}
        both = [ranks[name]["halves"] for name in domains]
        found["ceiling"].append(torch.stack([_iou(even, odd, ks, _SPLITS).mean(1) for even, odd in both]))
        for kind, key, count in (
            ("iou", "plain", 1),
            ("massive_iou", "massive", 1),
            ("resampled", "drawn", bootstrap),
        ):
            both = [_iou(ranks[a][key], ranks[b][key], ks, count) for a, b in combinations(domains, 2)]
            found[kind].append(torch.stack(both))
    iou, massive_iou = (torch.stack(found[name], -1)[:, :, 0] for name in ("iou", "massive_iou"))
    ceiling = torch.stack(found["ceiling"], -1)
    resampled = torch.stack(found["resampled"], -1).movedim(2, 0)  # (bootstrap, P, F, L)
    null = _float64([[k / (2 * w - k) for w, k in zip(widths, row, strict=True)] for row in sizes])
    laws = [[central_interval(hypergeometric(w, k, k)) for w, k in zip(widths, row, strict=True)] for row in sizes]
    result = Overlap(
        domains=domains,
        layers=layers,
        fractions=tuple(fractions),
        widths=widths,
        tokens={name: scores.tokens for name, scores in scores_by_domain.items()},
        part=part,
        iou=iou,
        massive_iou=massive_iou,
        interval=top_set_interval(iou, resampled),
        null=null,
        null_interval=_float64(
            [
                [[iou_of(x, k) for x in law] for law, k in zip(*both, strict=True)]
                for both in zip(laws, sizes, strict=True)
            ]
        ),
        ceiling=ceiling,
        mean_iou=iou.mean(-1),
        mean_massive_iou=massive_iou.mean(-1),
        mean_interval=top_set_interval(iou.mean(-1), resampled.mean(-1)),
        mean_null=null.mean(-1),
        mean_null_interval=_float64(
            [mean_iou_interval(list(zip(widths, row, strict=True)), generator) for row in sizes]
        ),
        mean_ceiling=ceiling.mean(-1),
    )
    _warn(result)
    return result


def _check(
    scores_by_domain: Mapping[str, ActivationScores], fractions: Sequence[float], bootstrap: int, part: str
) -> dict[str, dict[str, PartScores]]:
    """The part of each domain's scores."""
    if len(scores_by_domain) < 2:
        raise ValueError(
            f"scores_by_domain: expected at least two domains, got {', '.join(scores_by_domain) or 'none'}"
        )
    if not fractions:
        raise ValueError("fractions: expected at least one, got none")
    if bootstrap < 2:
        raise ValueError(f"bootstrap: expected at least 2 resamples, got {bootstrap}")
    parts = {name: scores.part(part) for name, scores in scores_by_domain.items()}
    (first, shapes), *others = (
        (name, {layer: len(p.top) for layer, p in found.items()}) for name, found in parts.items()
    )
    for fraction in fractions:
        neuron_count(fraction, min(shapes.values()))
    for name, found in others:
        for layer in [*shapes, *found]:
            if shapes.get(layer) != found.get(layer):
                raise ValueError(
                    f"scores_by_domain: expected one model, but {layer} has {shapes.get(layer, 'no')} neurons in "
                    f"{first} and {found.get(layer, 'no')} in {name}"
                )
    return parts


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


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value != value else value
