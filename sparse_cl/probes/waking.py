"""Waking: how much of what a new domain does lands on neurons that were dormant before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_alike, check_domains, check_shares
from .neurons import TAUS, dormant
from .pairing import Weights, paired_weights
from .result import Result
from .scores import ActivationScores

_DRAWS = 1000


@dataclass(frozen=True)
class Landed(Result):
    """The share of some total over neurons that a set of them has.

    Attributes:
        share: in [0, 1]; NaN where the total is 0.
        expected: what as many neurons of each layer, drawn at random, have in the mean, exactly.
        null_interval: 95 % of such draws lie in it.
    """

    share: float
    expected: float
    null_interval: tuple[float, float]


@dataclass(frozen=True)
class Woken(Result):
    """What landed on one set of neurons.

    Attributes:
        neurons: how many there are in the set; `width`: in the model.
        update: of Σ ‖change of a neuron's weights and biases, in and out‖².
        activation: of Σ E|h_j| on the new domain.
    """

    neurons: int
    width: int
    update: Landed
    activation: Landed


@dataclass(frozen=True)
class Waking(Result):
    """Result of `waking`.

    Attributes:
        dormant: τ → those whose Sokar score was at most τ in every earlier domain.
        lowest: those of the lowest scores, a share `lowest_share` of each layer, by the highest score over the domains.
    """

    dormant: Mapping[float, Woken]
    lowest: Woken
    lowest_share: float


def waking(
    before: Weights,
    after: Weights,
    earlier: ActivationScores | Mapping[str, ActivationScores],
    learned: ActivationScores,
    *,
    taus: tuple[float, ...] = TAUS,
    lowest: float = 0.1,
    seed: int = 0,
) -> Waking:
    """The shares of a domain's update, and of its activation, that land on neurons dormant before it was learned.

    Neurons that are as likely to be used as any other give the null. Where nothing is woken the shares lie below it:
    a dormant neuron has small gradients. The interval draws as many neurons of each layer, 1,000 times.

    Args:
        before, after: the weights before and after the domain was learned.
        earlier: of the earlier domains' records, by domain or one for all, on the model before. Where neurons were then
            drawn anew for the domain: on the model before that.
        learned: of the new domain's records, on the model after.
        taus: thresholds of Sokar et al. 2023.
        lowest: share of each layer's neurons, in (0, 1]; rounded.
        seed: of the draws.

    Raises:
        ValueError: no earlier domain, arguments out of range, scores or weights of different models, or a layer whose
            neurons' weights are not known.
    """
    by_domain = {"earlier": earlier} if isinstance(earlier, ActivationScores) else dict(earlier)
    check_domains(1, earlier=by_domain)
    check_shares(lowest=lowest)
    every = {**by_domain, "learned": learned}
    check_alike("earlier", "neurons", {name: _widths(scores) for name, scores in every.items()})
    peaks = _peaks(by_domain, taus)
    updates = _updates(before, after, learned)
    activations = {layer: mean.double() for layer, mean in learned.mean().items()}

    def landed_on(sets: Mapping[str, Tensor]) -> Woken:
        return Woken(
            neurons=sum(int(chosen.sum()) for chosen in sets.values()),
            width=sum(len(chosen) for chosen in sets.values()),
            update=_landed(updates, sets, seed),
            activation=_landed(activations, sets, seed),
        )

    ranks = {layer: peak.argsort(stable=True).argsort() for layer, peak in peaks.items()}
    return Waking(
        dormant={tau: landed_on({layer: peak <= tau for layer, peak in peaks.items()}) for tau in taus},
        lowest=landed_on({layer: rank < round(lowest * len(rank)) for layer, rank in ranks.items()}),
        lowest_share=lowest,
    )


def _widths(scores: ActivationScores) -> dict[str, int]:
    return {layer: len(part.top) for layer, part in scores.part().items()}


def _peaks(by_domain: Mapping[str, ActivationScores], taus: tuple[float, ...]) -> dict[str, Tensor]:
    """Layer → (neurons,): the highest of each neuron's scores over the domains."""
    scores = dormant(by_domain, taus).scores.values()
    return {layer: torch.stack([one[layer] for one in scores]).amax(0) for layer in next(iter(scores))}


def _updates(before: Weights, after: Weights, scores: ActivationScores) -> dict[str, Tensor]:
    """Layer → (neurons,) float64: ‖change‖² of each neuron's weights and biases."""
    wanted: dict[str, list] = {}
    found = {}
    for layer, where in scores.where.items():
        if isinstance(where, str):
            raise ValueError(f"learned: {where}; watch the MLPs' neurons")
        found[layer] = torch.zeros(len(scores.parts[layer]["product"].top), dtype=torch.float64)
        for place in where:
            wanted.setdefault(place.parameter, []).append((layer, place))
    for name, old, new in paired_weights(before, after):
        for layer, place in wanted.pop(name, ()):
            found[layer] += place.energies(new.double() - old.double()).cpu()
    if wanted:
        raise ValueError(f"before: expected the weights of the neurons, {next(iter(wanted))} among them; got others")
    return found


def _landed(amounts: Mapping[str, Tensor], sets: Mapping[str, Tensor], seed: int) -> Landed:
    total = sum(float(amount.sum()) for amount in amounts.values())
    if not total:
        return Landed(float("nan"), float("nan"), (float("nan"), float("nan")))
    generator = torch.Generator().manual_seed(seed)
    hit, expected, drawn = 0.0, 0.0, torch.zeros(_DRAWS, dtype=torch.float64)
    for layer, amount in amounts.items():
        chosen = sets[layer]
        size = int(chosen.sum())
        hit += float(amount[chosen].sum())
        expected += float(amount.mean()) * size
        if size:
            # A few draws at a time: a wide layer's would not fit.
            for start in range(0, _DRAWS, 50):
                picked = torch.rand(50, len(amount), generator=generator).topk(size, dim=1).indices
                drawn[start : start + 50] += amount[picked].sum(1)
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (torch.quantile(drawn, tails) / total).tolist()
    return Landed(hit / total, expected / total, (low, high))
