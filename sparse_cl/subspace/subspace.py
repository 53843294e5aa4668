"""The directions that earlier domains use of a layer's input space, as a value."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_cl.linalg import project_out_
from sparse_cl.reference.precision import full_precision

#: Largest entry of UᵀU - I that still counts as orthonormal. A leak of this squared is far below any that matters.
ORTHONORMAL = 1e-4

#: A direction of a few columns with less than this of the largest weight is a rounding error of the basis.
_NOISE = 1e-6


class Subspace:
    """Used directions of an input space of n dimensions, and how much of the inputs lies along each: a value.

    Args:
        basis: U (n, r), float32 or float64, orthonormal columns.
        values: λ (r,), at least 0: the mean energy E[(u_jᵀx)²] of an input along each, summed over domains. None: ones,
            for directions of which nothing else is known.
        outside: τ, the energy that lies outside all of them, in the same unit.
        mean: μ, the mean energy of one domain's input along one of all n directions. None: that of ``values`` and
            ``outside``, as of one domain.

    Attributes:
        width: n.
        rank: r.
        free: ``width - rank``.

    Raises:
        ValueError: the columns are not orthonormal or more than n; other numbers of values, or some below 0.
        TypeError: not a floating-point matrix.
    """

    def __init__(
        self, basis: Tensor, values: Tensor | None = None, outside: float = 0.0, mean: float | None = None
    ) -> None:
        check_orthonormal(basis)
        if values is None:
            values = basis.new_ones(basis.shape[1])
        if values.shape != basis.shape[1:] or not bool((values >= 0).all() and values.isfinite().all()):
            raise ValueError(
                f"values: expected {tuple(basis.shape[1:])} finite numbers of at least 0, one for each column of the "
                f"basis {tuple(basis.shape)}, got {tuple(values.shape)}{span(values)}"
            )
        if values.device != basis.device:
            raise ValueError(f"values: expected the device of the basis, {basis.device}, got {values.device}")
        if not outside >= 0:
            raise ValueError(f"outside: expected an energy of at least 0, got {outside}")
        self._set(basis.detach(), values.detach(), float(outside), mean)

    def _set(self, basis: Tensor, values: Tensor, outside: float, mean: float | None) -> None:
        self.basis, self.values, self.outside = basis, values, outside
        self.mean = self.total / max(1, self.width) if mean is None else mean

    @property
    def width(self) -> int:
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def free(self) -> int:
        return self.width - self.rank

    @property
    def device(self) -> torch.device:
        return self.basis.device

    @property
    def total(self) -> float:
        """Σ λ_j + τ: the mean energy of an input, summed over domains."""
        return float(self.values.sum(dtype=torch.float64)) + self.outside

    @property
    def usage(self) -> Tensor:
        """λ_j / μ (r,): 1 for a direction that one domain uses as much as an average one."""
        return self.values / self.mean if self.mean > 0 else self.values

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Subspace:
        """This subspace with its basis on ``device``, in ``dtype``."""
        basis = self.basis.to(device=device, dtype=dtype)
        return self if basis is self.basis else trusted(basis, self.values.to(basis), self.outside, self.mean)

    def project_out_(self, x: Tensor) -> Tensor:
        """Removes the used part of each row of ``x`` (..., m, n), in place."""
        basis = self.basis.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return x.zero_() if self.free == 0 else project_out_(x, basis) if self.rank else x

    def energies(self, x: Tensor) -> Tensor:
        """‖X u_j‖² of rows X (m, n), along each direction: (r,), float64."""
        with full_precision(x.device):
            along = x @ self.basis.to(x.dtype)
        return torch.linalg.vector_norm(along, dim=0).double().square()

    def restricted(self, columns: Tensor) -> Subspace:
        """What those k columns of a row see: the rows of U at ``columns``, as a subspace of k dimensions.

        For a row x that is zero outside these columns Σ λ_j (xᵀu_j)² is the same in both: with U_C the rows C of U, the
        singular vectors and values of U_C diag(λ)^½.
        """
        wide = self.basis.double()[columns.long()] * self.values.double().sqrt()
        vectors, weights, _ = torch.linalg.svd(wide, full_matrices=False)
        kept = weights > _NOISE * weights.max() if len(weights) else weights > 0
        basis = vectors[:, kept].to(self.basis.dtype)
        return trusted(basis, weights[kept].square().to(basis.dtype), self.outside, self.mean)

    def __repr__(self) -> str:
        return f"Subspace({self.rank} of {self.width} directions used)"


def trusted(basis: Tensor, values: Tensor, outside: float, mean: float | None) -> Subspace:
    """A subspace whose basis is known to be orthonormal: the check would wait for the device."""
    subspace = object.__new__(Subspace)
    subspace._set(basis, values, outside, mean)
    return subspace


def span(values: Tensor) -> str:
    """For messages: the least and the largest of some numbers."""
    return f", from {float(values.min()):g} to {float(values.max()):g}" if values.numel() else ""


def check_orthonormal(basis: Tensor) -> None:
    """Raises an error unless ``basis`` is (n, r) with orthonormal columns, float32 or float64."""
    if not isinstance(basis, Tensor) or basis.dtype not in (torch.float32, torch.float64):
        got = basis.dtype if isinstance(basis, Tensor) else type(basis).__name__
        raise TypeError(f"basis: expected a float32 or float64 tensor (n, r), got {got}; convert it with .float()")
    if basis.dim() != 2:
        raise ValueError(f"basis: expected shape (n, r), got {tuple(basis.shape)}")
    width, columns = basis.shape
    if columns > width:
        raise ValueError(
            f"basis: expected at most {width} columns for a width of {width}, got {columns}; is it transposed?"
        )
    error = 0.0
    if columns:
        wide = basis.detach().double()
        error = float((wide.mT @ wide - torch.eye(columns, dtype=wide.dtype, device=wide.device)).abs().max())
    if not error <= ORTHONORMAL:
        raise ValueError(
            f"basis: its columns are not orthonormal: max|QᵀQ - I| is {error:.2g}, expected at most "
            f"{ORTHONORMAL:g}; pass q[:, :rank] of sparse_cl.orthonormalize"
        )


def energy_of(rows: Tensor) -> Tensor:
    """||rows||²_F: 0-d, float64. Rows in their own dtype, their sum in float64, which is as exact and far faster."""
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum()
