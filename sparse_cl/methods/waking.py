"""Waking: neurons that earlier texts hardly use are drawn anew, and are free for what comes next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.models.neuron_masks import places
from sparse_cl.models.parts import MLP, find_mlps, matrix_of
from sparse_cl.models.passes import Watch, stream

from .base import Batch

_FILE = "waking.safetensors"


class Waking:
    """Draws the least used neurons of each MLP anew when a domain begins (ReDo: Sokar et al. 2023).

    Of the texts that were observed a neuron's score is the highest of its E|h_j| / mean_k E|h_k|: a neuron counts as
    little used where every text uses it little. Woken are at most `share` of an MLP's neurons, those of the lowest
    scores. The weights into a woken neuron are drawn from a normal distribution as wide as the root mean square of
    their layer; its biases and the weights out of it are zero. Until these are trained it contributes nothing, so all
    that changes is that w_j h_j is gone, w_j the weights out. Where the layer out has a bias that may change, its mean
    over the earlier texts goes into that; a layer without one has nothing to put it into.

    `layers` says of each MLP what `renew` did last:

    - `woken`: how many neurons;
    - `moved`: by how much of its energy E‖y‖² the MLP's output on earlier texts changes if neurons are uncorrelated:
      Σ_j ‖w_j‖² E h_j² / E‖y‖², variances for E h_j² where a bias takes the means;
    - `at_most`: the same whatever the correlations: (Σ_j ‖w_j‖ √E h_j²)² / E‖y‖².

    Both are of the texts as they were when each was observed; a neuron that was woken counts from then on. The rows
    that are drawn depend on the number of texts alone, not on any generator's state.

    Args:
        share: in [0, 1); rounded.
        tau: only neurons of at most this score are woken; None: whatever their score.
    """

    def __init__(self, share: float, tau: float | None = None) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"wake: expected a share of the neurons in [0, 1), got {share}")
        if tau is not None and not 0 <= tau < float("inf"):
            raise ValueError(f"tau: expected a score of at least 0, or None, got {tau}")
        self.share, self.tau = share, tau
        self.layers: dict[str, dict[str, Any]] = {}
        self._texts = 0
        self._known: dict[str, Tensor] = {}

    def observe(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Count one more text; MLP → (neurons,) float64, its mean |activation|. Errors as `stream`."""
        mlps = find_mlps(model)
        moments = {mlp.name: _Moments() for mlp in mlps}
        watches = [
            Watch(f"{mlp.name} ({side})", mlp.out, side, getattr(moments[mlp.name], side))
            for mlp in mlps
            for side in ("input", "output")
        ]
        stream(model, watches, batches, tokens="all")
        sizes = {}
        for layer, found in moments.items():
            known = found.means()
            sizes[layer] = score = known.pop("size")
            score = score / score.mean() if score.any() else score
            peak = self._known.get(f"{layer}|peak")
            self._known[f"{layer}|peak"] = score if peak is None else torch.maximum(peak, score)
            for name, mean in known.items():
                before = self._known.get(f"{layer}|{name}")
                self._known[f"{layer}|{name}"] = mean if before is None else before + mean
        self._texts += 1
        return sizes

    def choose(self, model: nn.Module, closed: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The neurons to wake: MLP → (n,) int64, ascending; none before a text was observed.

        None of an MLP of which any weight is frozen.

        Args:
            closed: MLP → (neurons,) bool: those that are not to be woken.
        """
        mlps = find_mlps(model) if self._texts else ()
        return {mlp.name: self._chosen(model, mlp, None if closed is None else closed[mlp.name]) for mlp in mlps}

    @torch.no_grad()
    def renew(self, model: nn.Module, woken: Mapping[str, Tensor], *, fold: bool = True) -> None:
        """Draw the weights of these neurons anew, in place. No other weight changes by a bit.

        Args:
            woken: as `choose` gives them.
            fold: False: biases of the layers out stay as they are.
        """
        generator = torch.Generator().manual_seed(self._texts)
        for mlp in find_mlps(model) if woken else ():
            chosen, bias = woken[mlp.name], mlp.out.bias
            takes = fold and bias is not None and bias.requires_grad and len(chosen) > 0
            self.layers[mlp.name] = self._account(mlp, chosen, bias if takes else None)
            _draw(model, mlp, chosen, generator)
            for name in ("peak", "mean", "square"):
                self._known[f"{mlp.name}|{name}"][chosen] = 0

    def save(self, folder: Path) -> None:
        storage.write(folder / _FILE, "waking", self._known, texts=self._texts)

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""
        self._known, facts = storage.read(folder / _FILE, "waking", "the method's save", "texts")
        self._texts = facts["texts"]

    def _chosen(self, model: nn.Module, mlp: MLP, barred: Tensor | None) -> Tensor:
        if not all(model.get_parameter(place.parameter).requires_grad for place in places(mlp)):
            return torch.empty(0, dtype=torch.int64)
        score = self._known[f"{mlp.name}|peak"]
        if barred is not None:
            score = score.masked_fill(barred, float("inf"))
        lowest = score.argsort(stable=True)[: round(self.share * mlp.neurons)]
        limit = torch.finfo(score.dtype).max if self.tau is None else self.tau
        return lowest[score[lowest] <= limit].sort().values

    def _account(self, mlp: MLP, chosen: Tensor, bias: nn.Parameter | None) -> dict[str, Any]:
        """What goes with the woken neurons; a bias takes up its mean."""
        mean, square, output = (
            self._known[f"{mlp.name}|{name}"] / self._texts for name in ("mean", "square", "output")
        )
        out = matrix_of(mlp.out, mlp.out_name)[:, chosen.to(mlp.out.weight.device)].double()
        norms, mean, square = out.norm(dim=0).cpu(), mean[chosen], square[chosen]
        if bias is not None:
            bias.add_((out @ mean.to(out.device)).to(bias.dtype))
            square = (square - mean.square()).clamp(min=0)
        energy = float(output)
        each = norms * square.sqrt()
        return {
            "woken": len(chosen),
            "moved": float(each.square().sum()) / energy if energy else 0.0,
            "at_most": float(each.sum()) ** 2 / energy if energy else 0.0,
        }


class _Moments:
    """Of one MLP, sums over tokens: of its neurons |h|, h and h², and of its output ‖y‖²; float64, on their device."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}

    def input(self, rows: Tensor, sequences: Tensor) -> None:
        h = _wide(rows)
        self.tokens += len(h)
        self._add(size=_sum(h.abs()), mean=_sum(h), square=_sum(h.square()))

    def output(self, rows: Tensor, sequences: Tensor) -> None:
        self._add(output=_sum(_wide(rows).square()).sum()[None])

    def _add(self, **sums: Tensor) -> None:
        for name, x in sums.items():
            self.sums[name] = self.sums.get(name, 0) + x

    def means(self) -> dict[str, Tensor]:
        return {name: (x / self.tokens).cpu() for name, x in self.sums.items()}


def _draw(model: nn.Module, mlp: MLP, chosen: Tensor, generator: torch.Generator) -> None:
    *into, out = places(mlp)
    for place in (*into, out):
        parameter = model.get_parameter(place.parameter)
        rows = parameter if place.dim == 0 else parameter.mT  # neuron by neuron
        width = place.shape[place.dim] // place.copies
        slices = torch.cat([chosen + copy * width for copy in range(place.copies)]).to(rows.device)
        drawn = torch.zeros(len(slices), *rows.shape[1:])
        if place is not out and rows.dim() > 1:
            drawn.normal_(generator=generator)
            drawn *= parameter.float().square().mean().sqrt().cpu()
        rows[slices] = drawn.to(rows)


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=torch.float64)
