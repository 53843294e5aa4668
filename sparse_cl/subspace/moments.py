"""The second moment of a layer's rows, kept in one pass, and the directions that it shows.

Rows are those of ∂L/∂W, or of the inputs x: an (m, n) matrix G at each observation. Both kinds of moment stand for
M = Σ GᵀG, and look for what lies outside the subspace U that is used already: P M P with P = I - U Uᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_cl.ops import gram_factor

from .subspace import Subspace, energy_of

#: Rows go through the two products of an observation in blocks: on the CPU so few that a block stays in cache from the
#: first to the second, elsewhere enough entries to fill the device.
_CPU_ROWS, _ENTRIES = 512, 1 << 26

#: A symmetric sum is made in so many strips of rows, each from the diagonal on.
_STRIPS = 4

#: Directions of a sketch below this share of the largest, in energy, are rounding errors of its float32 products.
_NOISE = 1e-6


@dataclass(frozen=True)
class Spectra:
    """Eigenvalues and eigenvectors of P M P for a batch of b layers.

    Attributes:
        values: (b, l) float64, largest first.
        leading: count -> (b, n, count), eigenvectors of the largest; zero columns past the numerical rank.
        totals: (b,) float64, Σ ||G||²_F.
        outsides: (b,) float64, Σ ||G P||²_F: what the used subspace does not explain.
    """

    values: Tensor
    leading: Callable[[int], Tensor]
    totals: Tensor
    outsides: Tensor


def row_blocks(rows: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """``rows`` (m, n) in ``dtype``, without a whole second copy of them where they are in another."""
    on_cpu = rows.device.type == "cpu"
    for block in rows.split(_CPU_ROWS if on_cpu else max(1, _ENTRIES // max(1, rows.shape[1]))):
        yield block.to(dtype)


class ExactMoment:
    """The whole second moment M (n, n), in float32 (float64 for float64 rows): 4 n² bytes.

    Its eigenvalues are exact up to rounding, so it is the choice wherever n² numbers fit.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        # Only its upper triangle counts. M is symmetric: without the lower blocks a sum takes 5/8 of the products.
        self._sum = torch.zeros(width, width, dtype=dtype, device=device)

    @property
    def moment(self) -> Tensor:
        """M, a copy."""
        upper = self._sum.triu()
        return upper + upper.triu(1).mT

    @property
    def columns(self) -> int:
        return self._sum.shape[1]

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        return self._sum.device, self._sum.dtype

    def tensors(self) -> dict[str, Tensor]:
        """All that was observed; :meth:`merge` takes it back. Of M the upper triangle."""
        return {"moment": self._sum}

    def add(self, rows: Tensor, subspace: Subspace | None) -> None:
        """Observes ``rows`` (m, n)."""
        step = -(-self.columns // _STRIPS)
        for block in row_blocks(rows, self._sum.dtype):
            for start in range(0, self.columns, step):
                stripe = slice(start, start + step)
                self._sum[stripe, start:].addmm_(block[:, stripe].mT, block[:, start:])

    def merge(self, tensors: dict[str, Tensor]) -> None:
        self._sum.add_(tensors["moment"])

    def energy(self) -> Tensor:
        """Σ ||G||²_F: 0-d, float64."""
        return self._sum.diagonal().double().sum()

    @staticmethod
    def spectra(moments: Sequence[ExactMoment], subspaces: Sequence[Subspace | None]) -> Spectra:
        """Of moments of one width."""
        stacked = torch.stack([m.outside(subspace) for m, subspace in zip(moments, subspaces, strict=True)])
        values, vectors = torch.linalg.eigh(stacked)
        outside = stacked.diagonal(dim1=1, dim2=2).sum(1)
        return Spectra(
            values.flip(1).clamp(min=0),
            lambda count: vectors[:, :, vectors.shape[2] - count :].flip(2).to(moments[0].place[1]),
            torch.stack([moment.energy() for moment in moments]),
            outside.clamp(min=0),
        )

    def outside(self, subspace: Subspace | None) -> Tensor:
        """P M P, (n, n) float64: the moment of what lies outside the used subspace."""
        wide = self.moment.double()
        if subspace is not None:
            wide = subspace.project_out_(subspace.project_out_(wide.clone()).mT.contiguous())
        return (wide + wide.mT) / 2


class SketchedMoment:
    """A sketch Y = Σ GᵀG P Ω (n, l) of the second moment, Ω a random (n, l) matrix of signs, and two energies.

    One pass, 4 n l bytes, whatever the number of rows (randomized range finder: Halko, Martinsson & Tropp 2011). The
    eigenvalues are those of the Nyström approximation that Y and Ω give (Tropp, Yurtsever, Udell & Cevher 2017).
    """

    def __init__(self, test: Tensor):
        self.test = test
        self.sketch = torch.zeros_like(test)
        self.energies = torch.zeros(2, dtype=torch.float64, device=test.device)  # Σ||G||², Σ||GP||²

    @property
    def columns(self) -> int:
        return self.sketch.shape[1]

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        return self.sketch.device, self.sketch.dtype

    def tensors(self) -> dict[str, Tensor]:
        """All that was observed; :meth:`merge` takes it back."""
        return {"sketch": self.sketch, "energies": self.energies}

    def add(self, rows: Tensor, subspace: Subspace | None) -> None:
        """Observes ``rows`` (m, n)."""
        used = subspace if subspace is not None and subspace.rank else None
        inside = self.test if used is None else used.matrix.mT @ self.test
        for block in row_blocks(rows, self.sketch.dtype):
            total = energy_of(block)
            outside = total
            if used is None:
                image = block @ self.test
            else:
                coordinates = block @ used.matrix
                known = energy_of(coordinates)
                if used.complement:
                    image, outside = coordinates @ inside, known
                else:
                    image, outside = (block @ self.test).sub_(coordinates @ inside), (total - known).clamp(min=0)
            self.sketch.addmm_(block.mT, image)
            self.energies += torch.stack([total, outside])

    def merge(self, tensors: dict[str, Tensor]) -> None:
        self.sketch.add_(tensors["sketch"])
        self.energies.add_(tensors["energies"])

    def energy(self) -> Tensor:
        """Σ ||G||²_F: 0-d, float64."""
        return self.energies[0]

    @staticmethod
    def spectra(moments: Sequence[SketchedMoment], subspaces: Sequence[Subspace | None]) -> Spectra:
        """Of moments of one width and one test matrix; at most l eigenvalues, the last ones somewhat too small."""
        sketches = []
        for moment, subspace in zip(moments, subspaces, strict=True):
            sketch = moment.sketch
            if subspace is not None:
                # Y is M P Ω so far.
                sketch = subspace.project_out_(sketch.mT.clone(memory_format=torch.contiguous_format)).mT
            sketches.append(sketch)
        sketch = torch.stack(sketches)
        wide = sketch.double()
        core = moments[0].test.double().mT @ wide
        core = (core + core.mT) / 2
        # M is about B Bᵀ with B = Y T, Tᵀ C T = I for the core C = Ωᵀ Y: the eigenvalues of BᵀB are its own.
        whiten, _ = gram_factor(core, core.diagonal(dim1=1, dim2=2), _NOISE**0.5)
        small = whiten.mT @ (wide.mT @ wide) @ whiten
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        values = values.clamp(min=0)
        scale = torch.where(values > _NOISE * values[:, -1:], values, torch.inf).rsqrt()
        mixing = whiten @ (vectors * scale[:, None, :])
        energies = torch.stack([moment.energies for moment in moments])
        return Spectra(
            values.flip(1),
            lambda count: sketch @ mixing[:, :, mixing.shape[2] - count :].flip(2).to(sketch.dtype),
            energies[:, 0],
            energies[:, 1],
        )
