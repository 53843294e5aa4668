"""Second moments of what enters the linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_cl.models.parts import Block, find_blocks, shape_of
from sparse_cl.models.passes import Batch, Halves, Watch, stream
from sparse_cl.subspace.moments import ExactMoment


@dataclass(frozen=True)
class InputMoments:
    """Second moments of the inputs of layers over one domain, in two halves: even and odd sequences.

    Attributes:
        halves: input name → two (n, n) moments Σ x xᵀ.
        layers: input name → names of the linear layers that read this input.
        tokens: how many were seen.
    """

    halves: dict[str, tuple[ExactMoment, ExactMoment]]
    layers: dict[str, tuple[str, ...]]
    tokens: int


def energy_watches(modules: Mapping[str, nn.Module]) -> tuple[list[Watch], dict[str, Tensor]]:
    """What `stream` needs to add up Σ x_j² of what enters modules; and where it does: name → (n,), once it has run."""
    energies: dict[str, Tensor] = {}

    def see(name: str) -> Callable[[Tensor, Tensor], None]:
        def add(rows: Tensor, sequences: Tensor) -> None:
            wide = rows if rows.dtype == torch.float64 else rows.float()
            total = wide.square().sum(0)
            energies[name] = energies[name].add_(total) if name in energies else total

        return add

    return [Watch(name, module, "input", see(name)) for name, module in modules.items()], energies


class InputProbe:
    """Streams the second moments of what enters the linear layers: 8 n² bytes for an input of n features.

    Args:
        modules: name → linear layer; None: the distinct inputs of the blocks' linear layers (q, k and v have one).
        blocks: which residual blocks; None: all.
        tokens: which count, see `sparse_cl.models.passes.TOKENS`.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module] | None = None,
        *,
        blocks: Sequence[Block] | None = None,
        tokens: str = "answers",
    ):
        self.model, self.tokens = model, tokens
        self._inputs: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
        if modules is None:
            for block in find_blocks(model) if blocks is None else blocks:
                for part in (block.attention, block.mlp):
                    first = next(iter(part.into))
                    self._inputs[first] = (part.into[first], tuple(part.into))
                    self._inputs[part.out_name] = (part.out, (part.out_name,))
        else:
            if not modules:
                raise ValueError("modules: expected at least one {name: linear layer}, got none")
            self._inputs = {name: (module, (name,)) for name, module in modules.items()}
        self._halves: dict[str, tuple[ExactMoment, ExactMoment]] = {}
        self._tokens = 0

    def watches(self) -> list[Watch]:
        """What `stream` needs; moments start at zero."""
        self._halves, self._tokens = {}, 0
        split = Halves()
        return [Watch(name, module, "input", self._see(name, split)) for name, (module, _) in self._inputs.items()]

    def _see(self, name: str, split: Halves) -> Callable[[Tensor, Tensor], None]:
        width = shape_of(self._inputs[name][0])[1]
        counts = name == next(iter(self._inputs))

        def see(rows: Tensor, sequences: Tensor) -> None:
            if name not in self._halves:
                wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
                self._halves[name] = (ExactMoment(width, wide, rows.device), ExactMoment(width, wide, rows.device))
            self._tokens += len(rows) if counts else 0
            for half, moment in zip(split.of(sequences), self._halves[name], strict=True):
                moment.add(rows[half])

        return see

    def result(self) -> InputMoments:
        """What was seen since `watches()`."""
        return InputMoments(self._halves, {name: layers for name, (_, layers) in self._inputs.items()}, self._tokens)

    def run(self, batches: Iterable[Batch]) -> InputMoments:
        """One domain's moments; raises the errors of `stream`."""
        stream(self.model, self.watches(), batches, tokens=self.tokens)
        return self.result()
