"""How active the neurons of a model are on some data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.models.neuron_masks import Place, output_places, places
from sparse_cl.models.parts import MLP, find_mlps
from sparse_cl.models.passes import Batch, Watch, stream
from sparse_cl.reference.precision import full_precision
from sparse_cl.subspace.moments import row_blocks

from .checks import check_least, check_shares
from .resampling import GROUPS
from .scores import ActivationScores, PartScores
from .sparsity import LEVELS, ascending, neurons_needed

MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
"""A massive activation is above both, in absolute value: the first as it is, the second in medians of its layer (Sun,
Chen, Kolter & Liu 2024)."""

_SAMPLED_TOKENS = 16
_MASSIVE_NEURONS = 32
"""Neurons of a layer that can have massive activations in one batch, on devices that would have to be waited for to
know how many there are. Sun et al. find a handful in a model."""


class ActivationProbe:
    """Sums |activation| of every neuron, by groups of sequences, and counts how few neurons hold most of it.

    A neuron of an MLP is an input of the layer out of the neurons, and its activation is that input: part "product".
    For a gated MLP (GLU: act(gate) · up) both factors are measured too: parts "gate", after its non-linearity, where
    that is a module, and "up". The median for massive activations is taken over 16 of a batch's tokens.

    Args:
        model: any module; without `modules` its MLPs are looked for (`parts.find_mlps`).
        modules: name → module whose output features are the neurons, in place of the MLPs' neurons.
        tokens: which tokens count (`passes.TOKENS`).
        groups: sequence number modulo this is the group, for intervals and split halves.
        top_share: a neuron is counted as often as it is among this share of its layer's largest |activation|, and not
            zero.
        ranked_tokens: tokens of each batch that are sorted for this and for the sparsity curves, evenly spaced. Sums
            of |activation| are over all tokens.

    Sums are of float32 products (float64 for float64 activations) added in float64; memory is 16 bytes per neuron, part
    and group, whatever the number of tokens.

    Raises:
        ValueError: an argument out of range, or a model in which nothing is found.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module] | None = None,
        *,
        tokens: str = "answers",
        groups: int = GROUPS,
        top_share: float = 0.05,
        ranked_tokens: int = 256,
    ):
        if modules is not None and not modules:
            raise ValueError("modules: expected at least one module to watch, got an empty mapping")
        check_least(1, groups=groups, ranked_tokens=ranked_tokens)
        check_shares(top_share=top_share)
        self.model, self.modules, self.tokens = model, modules, tokens
        self.groups, self.top_share, self.ranked_tokens = groups, top_share, ranked_tokens
        self._mlps = find_mlps(model) if modules is None else []
        self._sums: dict[str, dict[str, _Sums]] = {}

    def watches(self) -> list[Watch]:
        """What `passes.stream` is to show the probe; counting starts again."""
        self._sums = {}
        if self.modules is not None:
            return [self._watch(name, "product", module, "output") for name, module in self.modules.items()]
        return [watch for mlp in self._mlps for watch in self._watch_mlp(mlp)]

    def run(self, batches: Iterable[Batch]) -> ActivationScores:
        """Watches the model on every batch. Raises the errors of `passes.stream`."""
        stream(self.model, self.watches(), batches, tokens=self.tokens)
        return self.result()

    def result(self) -> ActivationScores:
        """What was seen since `watches` was called.

        Raises:
            ValueError: nothing was.
        """
        if not self._sums or any(not sums.seen for parts in self._sums.values() for sums in parts.values()):
            raise ValueError("result: nothing was seen yet; call run(batches), or pass watches() to stream")
        parts = {
            layer: {part: sums.result(layer, part) for part, sums in found.items()}
            for layer, found in self._sums.items()
        }
        return ActivationScores(parts=parts, where=self._where(), top_share=self.top_share)

    def _watch_mlp(self, mlp: MLP) -> list[Watch]:
        found = [self._watch(mlp.name, "product", mlp.out, "input")]
        into = list(mlp.into.values())
        if mlp.layout.stacked or len(into) == 2:
            if mlp.activation is not None:
                found.append(self._watch(mlp.name, "gate", mlp.activation, "output"))
            first = mlp.neurons if mlp.layout.stacked else 0
            found.append(self._watch(mlp.name, "up", into[-1], "output", first))
        return found

    def _watch(self, layer: str, part: str, module: nn.Module, side: str, first: int = 0) -> Watch:
        sums = _Sums(self.groups, self.top_share, self.ranked_tokens, first)
        self._sums.setdefault(layer, {})[part] = sums
        return Watch(f"{layer} ({part})" if self.modules is None else layer, module, side, sums.see)

    def _where(self) -> dict[str, tuple[Place, ...] | str]:
        """For each layer the places of its neurons, or why there are none."""
        if self.modules is None:
            return {mlp.name: _places_or_reason(places, mlp) for mlp in self._mlps}
        names = {module: name for name, module in self.model.named_modules()}
        where: dict[str, tuple[Place, ...] | str] = {}
        for layer, module in self.modules.items():
            where[layer] = f"{layer} is a {type(module).__name__}, and which weights lead to its output is not known"
            if hasattr(module, "weight") and hasattr(module, "in_features") and module in names:
                where[layer] = _places_or_reason(output_places, names[module], module)
        return where


def _places_or_reason(find: Callable[..., tuple[Place, ...]], *of: Any) -> tuple[Place, ...] | str:
    try:
        return find(*of)
    except ValueError as error:
        return str(error)


def _waits(device: torch.device) -> bool:
    """Whether asking a tensor for its value holds the work on a device up."""
    return device.type != "cpu"


class _Sums:
    """What is summed over the tokens of one part of one layer; `first` is where its neurons begin in what is seen."""

    def __init__(self, groups: int, top_share: float, ranked_tokens: int, first: int):
        self.groups, self.top_share, self.ranked_tokens, self.first = groups, top_share, ranked_tokens, first
        self.seen = False

    def _start(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        # Names as in PartScores.
        self.seen = True
        self.magnitude, self.massive = zeros(self.groups, width), zeros(self.groups, width)
        self.tokens, self.ranked, self.needed = zeros(self.groups), zeros(self.groups), zeros(len(LEVELS), self.groups)
        self.top, self.profile = zeros(width), zeros(width)
        self.massive_entries, self.missed = zeros(), zeros()

    def see(self, rows: Tensor, sequences: Tensor) -> None:
        rows = rows[:, self.first :]
        if not self.seen:
            self._start(rows.shape[1], rows.device)
        if not len(rows):
            return
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        numbers = torch.arange(self.groups, device=rows.device)
        member = (sequences % self.groups == numbers[:, None]).to(wide)
        self.tokens += member.sum(1)
        with full_precision(rows.device):
            self._see_massive(rows, member, self._add(rows, member, wide))
            self._rank(rows, member, wide)

    def _add(self, rows: Tensor, member: Tensor, wide: torch.dtype) -> Tensor:
        """Adds |activation| up by group and returns each neuron's largest (neurons,)."""
        # Ones and zeros are exact in half precision, and the GPU adds such products in float32.
        halved = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
        peak = torch.zeros(rows.shape[1], dtype=rows.dtype if halved else wide, device=rows.device)
        sums = torch.zeros(self.groups, rows.shape[1], dtype=wide, device=rows.device)
        start = 0
        for block in row_blocks(rows, peak.dtype):
            weights = member[:, start : start + len(block)]
            start += len(block)
            block = block.abs()
            if halved:
                sums += torch.mm(weights.to(block.dtype), block, out_dtype=wide)
            else:
                sums.addmm_(weights, block)
            peak = torch.maximum(peak, block.amax(0))
        self.magnitude += sums
        return peak

    def _see_massive(self, rows: Tensor, member: Tensor, peak: Tensor) -> None:
        waits = _waits(rows.device)
        if not waits and not bool((peak > MASSIVE).any()):
            return
        sample = rows[:: math.ceil(len(rows) / _SAMPLED_TOKENS)].abs().float()
        threshold = (MASSIVE_RATIO * sample.median()).clamp(min=MASSIVE)
        over = peak > threshold
        if not waits:
            columns = over.nonzero().flatten()
        else:
            columns = peak.topk(min(_MASSIVE_NEURONS, len(peak))).indices
            self.missed += (over.sum() - len(columns)).clamp(min=0)
        chosen = rows[:, columns].to(member.dtype).abs()
        heavy = chosen > threshold
        self.massive_entries += heavy.sum()
        self.massive.index_add_(1, columns, (member @ (chosen * heavy)).double())

    def _rank(self, rows: Tensor, member: Tensor, wide: torch.dtype) -> None:
        step = math.ceil(len(rows) / self.ranked_tokens)
        magnitudes, member = rows[::step].to(wide).abs(), member[:, ::step]
        width = magnitudes.shape[1]
        ordered = ascending(magnitudes)
        totals = magnitudes.sum(1, keepdim=True)
        least = ordered[:, width - max(1, round(self.top_share * width)), None]
        # No zero is in the top share, however few neurons are not zero.
        self.top += (magnitudes >= least.clamp(min=torch.finfo(wide).tiny)).to(wide).sum(0)
        # A token without any mass weighs nothing.
        weights = torch.where(totals > 0, 1 / totals, 0).mT
        self.profile += (weights @ ordered)[0].flip(0)
        self.needed += (member @ neurons_needed(ordered, totals)).mT.double() / width
        self.ranked += member.sum(1)

    def result(self, layer: str, part: str) -> PartScores:
        if self.missed > 0:
            warnings.warn(
                f"{layer} ({part}): more than {_MASSIVE_NEURONS} neurons had massive activations in one batch; the "
                "scores without massive activations hold those of the others. Use smaller batches",
                stacklevel=4,
            )
        return PartScores(**{field.name: getattr(self, field.name).cpu() for field in fields(PartScores)})
