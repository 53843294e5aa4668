"""Bounds, which are no continual learners: what each domain reaches alone, and what all reach together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from sparse_cl.methods.adamw import AdamW
from sparse_cl.methods.base import Batch


class Single(AdamW):
    """A model of its own for each domain: AdamW from the base model's weights every time.

    R[j][j] of it is what a domain reaches where no other one came before; intransigence is measured against it. The
    base weights are held on the CPU.
    """

    name = "single"
    kind = "bound"
    separate = True

    def __init__(self) -> None:
        self._base: dict[str, Tensor] | None = None

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        if self._base is None:
            self._remember(model)
        else:
            model.load_state_dict(self._base)
        return model

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        self._remember(base)
        return super().restore(base, folders)

    def _remember(self, base: nn.Module) -> None:
        self._base = {name: value.detach().to("cpu", copy=True) for name, value in base.state_dict().items()}


class Joint(AdamW):
    """All domains at once, in place of the first domain: as many steps as the whole sequence has, then none.

    Each domain has the same number of examples: those of shorter ones come again.
    """

    name = "joint"
    kind = "bound"

    def steps(self, steps: int, number: int, domains: int, protected: bool = False) -> int:
        return 0 if number else steps * domains

    def training_data(self, number: int, datasets: Sequence[Dataset], seed: int) -> Dataset:
        joined = ConcatDataset(datasets)
        starts = [0, *joined.cumulative_sizes]
        longest = max(len(dataset) for dataset in datasets)
        places = list(zip(starts, map(len, datasets), strict=False))
        return Subset(joined, [start + item % length for item in range(longest) for start, length in places])
