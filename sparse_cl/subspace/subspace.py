"""The directions that earlier domains use of a layer's input space, as a value."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_cl.linalg import orthonormalize, project_onto_, project_out_

#: Largest entry of QᵀQ - I that still counts as orthonormal. A leak of this squared is far below any that matters.
ORTHONORMAL = 1e-4

#: A free direction of a few columns is one that lies in the free subspace up to a leak of this.
_FREE = 1e-6


class Subspace:
    """Used directions of an input space of ``width`` dimensions: an immutable value.

    Args:
        matrix: (n, c), float32 or float64, orthonormal columns.
        complement: the columns span what is free rather than what is used. The smaller of the two is what to store.

    Attributes:
        width: n.
        rank: number of used directions.
        free: ``width - rank``.

    Raises:
        ValueError: the columns are not orthonormal, or more than n.
        TypeError: not a floating-point matrix.
    """

    def __init__(self, matrix: Tensor, complement: bool = False):
        check_orthonormal(matrix)
        self.matrix = matrix.detach()
        self.complement = bool(complement)

    @property
    def width(self) -> int:
        return self.matrix.shape[0]

    @property
    def rank(self) -> int:
        columns = self.matrix.shape[1]
        return self.width - columns if self.complement else columns

    @property
    def free(self) -> int:
        return self.width - self.rank

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Subspace:
        """This subspace with its matrix on ``device``, in ``dtype``."""
        matrix = self.matrix.to(device=device, dtype=dtype)
        return self if matrix is self.matrix else _trusted(matrix, self.complement)

    def basis(self) -> Tensor:
        """(n, rank): an orthonormal basis of the used directions."""
        return complement_of(self.matrix) if self.complement else self.matrix

    def project_out_(self, x: Tensor) -> Tensor:
        """Removes the used part of each row of ``x`` (..., m, n), in place."""
        matrix = self.matrix.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if self.rank == 0:
            return x
        if self.free == 0:
            return x.zero_()
        return project_onto_(x, matrix) if self.complement else project_out_(x, matrix)

    def used_energy(self, x: Tensor) -> Tensor:
        """||x U||²_F of rows ``x`` (m, n): how much of ||x||²_F lies in the used directions. 0-d, float64."""
        inside = energy_of(x @ self.matrix.to(x.dtype))
        return (energy_of(x) - inside).clamp(min=0) if self.complement else inside

    def extended(self, columns: Tensor) -> Subspace:
        """With further used directions (n, k): orthonormal, and orthogonal to the used ones."""
        if columns.shape[1] == 0:
            return self
        if self.complement:
            wide = self.matrix.double()
            taken, rank = orthonormalize(wide.mT @ columns.double())
            left = wide @ complement_of(taken[:, : int(rank)])
            return _trusted(left.to(self.matrix.dtype), complement=True)
        return smaller_half(torch.cat([self.matrix, columns], 1))

    def restricted(self, columns: Tensor) -> Subspace:
        """Restricts the basis to ``columns`` (k,): the subspace that the k remaining entries must be orthogonal to.

        A row x that is zero outside the columns C has xU = 0 exactly if its entries there are orthogonal to the range
        of the rows C of U.
        """
        kept = self.matrix.double()[columns.long()]
        if not self.complement:
            q, rank = orthonormalize(kept)
            return _trusted(q[:, : int(rank)].to(self.matrix.dtype))
        # Entries that are free: unit singular values of the kept rows of the free basis.
        u, s, _ = torch.linalg.svd(kept, full_matrices=False)
        return _trusted(u[:, s.square() > 1 - _FREE].to(self.matrix.dtype), complement=True)

    def __repr__(self) -> str:
        return f"Subspace({self.rank} of {self.width} directions used)"


def check_orthonormal(matrix: Tensor) -> None:
    """Raises an error unless ``matrix`` is an (n, c) basis of orthonormal columns, float32 or float64."""
    if not isinstance(matrix, Tensor) or matrix.dtype not in (torch.float32, torch.float64):
        got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"basis: expected a float32 or float64 tensor (n, r), got {got}; convert it with .float()")
    if matrix.dim() != 2:
        raise ValueError(f"basis: expected shape (n, r), got {tuple(matrix.shape)}")
    width, columns = matrix.shape
    if columns > width:
        raise ValueError(
            f"basis: expected at most {width} columns for a width of {width}, got {columns}; is it transposed?"
        )
    error = 0.0
    if columns:
        wide = matrix.detach().double()
        error = float((wide.mT @ wide - torch.eye(columns, dtype=wide.dtype, device=wide.device)).abs().max())
    if not error <= ORTHONORMAL:
        raise ValueError(
            f"basis: its columns are not orthonormal: max|QᵀQ - I| is {error:.2g}, expected at most "
            f"{ORTHONORMAL:g}; pass q[:, :rank] of sparse_cl.orthonormalize"
        )


def energy_of(rows: Tensor) -> Tensor:
    """||rows||²_F: 0-d, float64. Rows in their own dtype, their sum in float64, which is as exact and far faster."""
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum()


def _trusted(matrix: Tensor, complement: bool = False) -> Subspace:
    """A subspace whose matrix is known to be orthonormal: the check would wait for the device."""
    subspace = object.__new__(Subspace)
    subspace.matrix, subspace.complement = matrix, complement
    return subspace


def smaller_half(basis: Tensor) -> Subspace:
    """The subspace of an orthonormal ``basis`` (n, r), stored as its complement where that is smaller."""
    if 2 * basis.shape[1] <= basis.shape[0]:
        return _trusted(basis)
    return _trusted(complement_of(basis), complement=True)


def complement_of(matrix: Tensor) -> Tensor:
    """(n, n - c): an orthonormal basis of what is orthogonal to the orthonormal columns of ``matrix`` (n, c)."""
    q, _ = torch.linalg.qr(matrix.double(), mode="complete")
    return q[:, matrix.shape[1] :].to(matrix.dtype).contiguous()
