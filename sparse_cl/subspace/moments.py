"""The second moment of a layer's rows, kept in one pass, and the directions that it shows.

Rows are those of ∂L/∂W, or of the inputs x: an (m, n) matrix G at each observation. Both kinds of moment stand for
M = Σ GᵀG, and give the eigenvalues and eigenvectors of A = s M + U diag(λ) Uᵀ, with the U and λ of earlier domains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    """Eigenvalues and eigenvectors of A for a batch of b layers.

    Attributes:
        width: n.
        values: (b, l) float64, largest first.
        leading: count -> (b, n, count) float64, eigenvectors of the largest; zero columns past the numerical rank.
    """

    width: int
    values: Tensor
    leading: Callable[[int], Tensor]


def row_blocks(rows: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """``rows`` (m, n) in ``dtype``, without a whole second copy of them where they are in another."""
    for block in rows.split(rows_together(rows.shape[1], rows.device.type == "cpu")):
        yield block.to(dtype)


def rows_together(width: int, on_cpu: bool) -> int:
    """How many rows make a block."""
    return _CPU_ROWS if on_cpu else max(1, _ENTRIES // max(1, width))


class Moment(ABC):
    """What both kinds keep: sums that can be added up.

    Attributes:
        count: of rows: 0-d, float64.
    """

    count: Tensor
    names: tuple[str, ...]

    @property
    def columns(self) -> int:
        """Of the tensor that is kept."""
        return getattr(self, self.names[0]).shape[1]

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        kept = getattr(self, self.names[0])
        return kept.device, kept.dtype

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Observes ``rows`` (m, n)."""

    @abstractmethod
    def energy(self) -> Tensor:
        """Σ ||G||²_F: 0-d, float64."""

    def tensors(self) -> dict[str, Tensor]:
        """All that was observed; :meth:`merge` takes it back."""
        return {name: getattr(self, name) for name in self.names}

    def merge(self, tensors: dict[str, Tensor]) -> None:
        for name in self.names:
            getattr(self, name).add_(tensors[name])


class ExactMoment(Moment):
    """The whole second moment M (n, n), in float32 (float64 for float64 rows): 4 n² bytes.

    Its eigenvalues are exact up to rounding, so it is the choice wherever n² numbers fit.

    Attributes:
        upper: M, of which only the upper triangle counts.
    """

    names = ("upper", "count")

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        # M is symmetric: without the lower blocks a sum takes 5/8 of the products.
        self.upper = torch.zeros(width, width, dtype=dtype, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def moment(self) -> Tensor:
        """M, a copy."""
        upper = self.upper.triu()
        return upper + upper.triu(1).mT

    def add(self, rows: Tensor) -> None:
        step = -(-self.columns // _STRIPS)
        self.count += len(rows)
        for block in row_blocks(rows, self.upper.dtype):
            for start in range(0, self.columns, step):
                stripe = slice(start, start + step)
                self.upper[stripe, start:].addmm_(block[:, stripe].mT, block[:, start:])

    def energy(self) -> Tensor:
        return self.upper.diagonal().double().sum()

    @staticmethod
    def spectra(moments: Sequence[ExactMoment], scales: Sequence[float], known: Sequence[Subspace | None]) -> Spectra:
        """Of moments of one width, times ``scales``, and of what was known before."""
        wide = []
        for moment, scale, subspace in zip(moments, scales, known, strict=True):
            whole = moment.moment.double().mul_(scale)
            if subspace is not None:
                basis = subspace.basis.double()
                whole.addmm_(basis * subspace.values.double(), basis.mT)
            wide.append(whole)
        values, vectors = torch.linalg.eigh(torch.stack(wide))
        return Spectra(
            vectors.shape[1],
            values.flip(1).clamp(min=0),
            lambda count: vectors[:, :, vectors.shape[2] - count :].flip(2),
        )


class SketchedMoment(Moment):
    """A sketch Y = Σ GᵀG Ω (n, l) of the second moment, Ω a random (n, l) matrix of signs, and its energy.

    One pass, 4 n l bytes, whatever the number of rows (randomized range finder: Halko, Martinsson & Tropp 2011). The
    eigenvalues are those of the Nyström approximation that Y and Ω give (Tropp, Yurtsever, Udell & Cevher 2017).
    """

    names = ("sketch", "total", "count")

    def __init__(self, test: Tensor):
        self.test = test
        self.sketch = torch.zeros_like(test)
        self.total = torch.zeros(1, dtype=torch.float64, device=test.device)
        self.count = torch.zeros((), dtype=torch.float64, device=test.device)

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        for block in row_blocks(rows, self.sketch.dtype):
            self.sketch.addmm_(block.mT, block @ self.test)
            self.total += energy_of(block)

    def energy(self) -> Tensor:
        return self.total.squeeze(0)

    @staticmethod
    def spectra(
        moments: Sequence[SketchedMoment], scales: Sequence[float], known: Sequence[Subspace | None]
    ) -> Spectra:
        """As of exact moments, here of one test matrix; at most l eigenvalues, the last ones somewhat too small."""
        sketches = []
        for moment, scale, subspace in zip(moments, scales, known, strict=True):
            sketch = moment.sketch * scale
            if subspace is not None:
                basis = subspace.basis.to(sketch.dtype)
                sketch.addmm_(basis * subspace.values.to(sketch.dtype), basis.mT @ moment.test)
            sketches.append(sketch)
        wide = torch.stack(sketches).double()
        core = moments[0].test.double().mT @ wide
        core = (core + core.mT) / 2
        # A is about B Bᵀ with B = Y T, Tᵀ C T = I for the core C = Ωᵀ Y: the eigenvalues of BᵀB are its own.
        whiten, _ = gram_factor(core, core.diagonal(dim1=1, dim2=2), _NOISE**0.5)
        small = whiten.mT @ (wide.mT @ wide) @ whiten
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        # What has no direction has no value either, or a basis would get a column of zeros.
        values = torch.where(values > _NOISE * values[:, -1:], values, 0)
        roots = torch.where(values > 0, values, torch.inf).rsqrt()
        mixing = whiten @ (vectors * roots[:, None, :])
        return Spectra(
            wide.shape[1], values.flip(1), lambda count: wide @ mixing[:, :, mixing.shape[2] - count :].flip(2)
        )
