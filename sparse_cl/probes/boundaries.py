"""Where a stream of batches changes from one domain to the next, where nobody says so."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

_SLACK, _CLIP = 0.5, 4.0
"""Allowance k of the CUSUM in standard deviations, for shifts of one upwards; and the most that one batch counts, so
that a single odd batch is no boundary and two may be one."""
_WARNING = 2.5
"""Of the chart: 101 of 119 boundaries between four domains passed it with the first batch, 17 earlier and one with the
second (benchmarks/results/streams.json); otherwise it is passed some 36 times in 1,000 batches."""
_CAUTION = 2 / 3
"""Share of the false alarms that may come by the normal law: scores of real batches have heavier tails."""
_BINS, _PRIOR = 4096, 0.1


class Cusum:
    """A two-sided self-starting CUSUM: has the mean of independent normal scores changed, whatever it and σ are?

    Each score is standardized by the mean and deviation of those before it, and made standard normal by Student's
    distribution, of which it then has a value (Hawkins 1987). U and L add these up, ±u − 1/2 each, and restart at 0.

    Args:
        false_alarms: how many there may be a score while nothing changes, in (0, 1). The threshold h is where
            Siegmund's approximation of the mean run of one side, (e^{2k b} − 2k b − 1) / (2 k²) with b = h + 1.166, is
            2 / false_alarms (Siegmund 1985, section 2.6).

    Attributes:
        start: index of the first score, counted from 0, that belongs to what is new, as it looks now.
        warns: whether the mean may have changed: U or L is above 2.5 (as the warning level of Gama et al. 2004).
    """

    def __init__(self, false_alarms: float) -> None:
        self.threshold = threshold(false_alarms / 2)
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._high = self._low = 0.0
        self._since = [0, 0]

    @property
    def start(self) -> int:
        return self._since[int(self._low > self._high)]

    @property
    def warns(self) -> bool:
        return max(self._high, self._low) > _WARNING

    def calibrate(self, score: float) -> None:
        """Takes a score that nothing new is in."""
        self._count += 1
        change = score - self._mean
        self._mean += change / self._count
        self._squares += change * (score - self._mean)
        for side, total in enumerate((self._high, self._low)):
            if total == 0:
                self._since[side] = self._count

    def update(self, score: float) -> bool:
        """Takes the next score; whether the mean has changed."""
        from scipy.special import ndtri, stdtr

        freedom = self._count - 1
        if freedom > 0 and self._squares > 0:
            spread = math.sqrt(self._squares / freedom * (1 + 1 / self._count))
            chance = float(stdtr(freedom, (score - self._mean) / spread))
            value = min(max(float(ndtri(min(max(chance, 1e-12), 1 - 1e-12))), -_CLIP), _CLIP)
        else:
            value = 0.0
        self._high = max(0.0, self._high + value - _SLACK)
        self._low = max(0.0, self._low - value - _SLACK)
        self.calibrate(score)
        return max(self._high, self._low) > self.threshold

    def state_dict(self) -> dict[str, Any]:
        return {**{name: value for name, value in vars(self).items() if name != "threshold"}, "_since": [*self._since]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._since = list(self._since)


class BoundaryDetector:
    """Notices where a stream of batches goes over to another domain, by a CUSUM on how new each batch is.

    How new is what a batch's tokens cost under their distribution in the first ``warmup`` batches of the domain (the
    cross-entropy, in nats a token), how much more that is than under the batch's own distribution (the Kullback-Leibler
    divergence), and any other score that is given, such as the share of the energy of a layer's inputs
    outside the directions that a memory keeps. Each score is calibrated by what the stream itself shows of it. After
    a boundary all begins anew.

    Args:
        false_alarms: how many there may be a batch while the domain stays the same, in (0, 1): all scores together.
            That holds for independent batches whose scores are about normal, as means over many tokens are.
        warmup: batches that a domain is known by, at least 16; no boundary is found in them.

    Attributes:
        start: after :meth:`update` found a boundary: how many batches before the last one the new domain began, as far
            as can be seen; 0: with it.
        warns: whether the last batch makes it look as if a new domain may have begun, with it or shortly before.
    """

    def __init__(self, false_alarms: float = 1e-3, warmup: int = 16) -> None:
        if not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms: expected a rate a batch in (0, 1), got {false_alarms}")
        if warmup < 16:
            raise ValueError(f"warmup: expected at least 16 batches, got {warmup}")
        self.false_alarms, self.warmup = false_alarms, warmup
        self.start = 0
        self.begin()

    @property
    def warns(self) -> bool:
        return any(chart.warns for chart in self._charts.values())

    def begin(self) -> None:
        """Forgets the domain: the next batch is the first that a new one is known by."""
        self._first: list[Tensor] = []
        self._costs: Tensor | None = None
        self._scores: list[dict[str, float]] = []
        self._charts: dict[str, Cusum] = {}
        self._batches = 0

    def update(self, tokens: Tensor, mask: Tensor | None = None, **scores: float) -> bool:
        """Takes the next batch; whether a new domain has begun.

        Args:
            tokens: (batch, length) int64, the input ids.
            mask: (batch, length), nonzero where a token counts; None: all.
            scores: further ones, the same with each batch of a domain.

        Raises:
            ValueError: no token counts; a score is not finite, or not of those of the batches before.
        """
        kept = tokens if mask is None else tokens[mask.bool()]
        if not kept.numel():
            raise ValueError("tokens: expected at least one that counts, got none")
        for name, value in scores.items():
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite score, got {value}")
        expected = self._scores[0].keys() - {"cost", "excess"} if self._scores else scores.keys()
        if scores.keys() != expected:
            raise ValueError(f"scores: expected {sorted(expected)} as with the batches before, got {sorted(scores)}")
        counts = (kept.flatten().cpu() % _BINS).bincount(minlength=_BINS).double()
        self._batches += 1
        if self._costs is None:
            self._first.append(counts)
            self._scores.append(scores)
            if len(self._first) == self.warmup:
                self._calibrate()
            return False
        found = {**_novelty(counts, self._costs), **scores}
        alarms = [name for name, chart in self._charts.items() if chart.update(found[name])]
        if not alarms:
            return False
        self.start = self._batches - 1 - max(self._charts[name].start for name in alarms)
        self.begin()
        return True

    def _calibrate(self) -> None:
        together = torch.stack(self._first).sum(0)
        # Of as many tokens as those that calibrate, so that smoothing weighs the same.
        self._costs = _costs(together * (1 - 1 / self.warmup))
        for counts, found in zip(self._first, self._scores, strict=True):
            # A batch is cheap under a distribution that it is a part of.
            found |= _novelty(counts, _costs(together - counts))
        self._first = []
        self._charts = self._new_charts(self._scores[0])
        for name, chart in self._charts.items():
            for found in self._scores:
                chart.calibrate(found[name])

    def _new_charts(self, names: Collection[str]) -> dict[str, Cusum]:
        return {name: Cusum(_CAUTION * self.false_alarms / len(names)) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """What the domain was like so far: numbers, lists and tensors."""
        return {
            "first": list(self._first),
            "costs": self._costs,
            "scores": [dict(found) for found in self._scores],
            "charts": {name: chart.state_dict() for name, chart in self._charts.items()},
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict` of a detector with the same arguments."""
        self.begin()
        self._first, self._costs, self._batches = list(state["first"]), state["costs"], state["batches"]
        self._scores = [dict(found) for found in state["scores"]]
        self._charts = self._new_charts(state["charts"])
        for name, chart in self._charts.items():
            chart.load_state_dict(state["charts"][name])


def threshold(false_alarms: float) -> float:
    """h of a one-sided CUSUM on standard normal scores, with allowance 1/2, that gives so many alarms a score."""
    low, high = 0.0, 60.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        b = 2 * _SLACK * (middle + 1.166)
        run = (math.exp(b) - b - 1) / (2 * _SLACK**2)
        low, high = (middle, high) if run < 1 / false_alarms else (low, middle)
    return high


def _costs(counts: Tensor) -> Tensor:
    """Nats that each token costs under a smoothed distribution."""
    return -((counts + _PRIOR) / (counts.sum() + _PRIOR * len(counts))).log()


def _novelty(counts: Tensor, costs: Tensor) -> dict[str, float]:
    """Nats a token of a batch: what it costs, and how much more than under its own distribution."""
    shares = counts / counts.sum()
    cost = float(shares @ costs)
    return {"cost": cost, "excess": cost - float(torch.special.entr(shares).sum())}
