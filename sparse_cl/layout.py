"""How the state of one parameter lies in its buffer.

Everything that a step needs to know of a parameter besides its value and its gradient is one contiguous
``uint8`` tensor: step counts, mask indices, gains, moments, master weights. The optimizer shows its sections as
ordinary typed tensors (``state[p]["exp_avg"]``, ...), which are views; the kernels get the buffer and one row of
:data:`FIELDS`. So a step hands three tensors a parameter to the dispatcher, whatever options are on, and that is
what keeps its host time low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

DENSE, ROWS, COLUMNS, ELEMENTS, TWO_FOUR = range(5)

#: How step counts are assigned: one for all, one a unit (row or column), one an entry.
SHARED, PER_UNIT, PER_ENTRY = range(3)

#: Step counts that a parameter's entries can have at a time: a cohort is a byte.
MAX_COHORTS = 256

#: Offsets are multiples of this many bytes: a cache line, so that sections can be read with any vector width.
ALIGNMENT = 64

#: Weights of an element mask that share one rank (the number of active entries before them).
BLOCK = 1024

#: Names of the index section by kind.
INDEX_NAME = {ROWS: "rows", COLUMNS: "columns", ELEMENTS: "bits", TWO_FOUR: "two_four_bits"}

_SECTIONS = (
    "step",
    "index",
    "ranks",
    "gain",
    "cohort",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "master",
)

#: Columns of the int64 ``layout`` tensor of an op: one row a parameter. The rest are byte offsets; 0 means absent,
#: since ``step`` always lies at 0. ``numel`` and ``inner`` let an op refuse a parameter whose shape has changed.
FIELDS = (
    *("kind", "units", "cohorts", "cohort_scope", "seed", "numel", "inner", "compact_grad", "by_row"),
    *(f"{s}_offset" for s in _SECTIONS[1:]),
)


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments and master weights: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each process may hold a part."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Any:
    """All of a tensor of which each process holds a part, on every process; anything else as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part(tensor: Any) -> Tensor:
    """What this process holds of a tensor: the same object each time, where ``to_local`` may give a view."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def like(part: Tensor, tensor: Any, shape: Sequence[int] | None = None) -> Tensor:
    """A part as the tensor of which it is this process's, split as ``tensor`` is, and where that is.

    Args:
        shape: of the whole; None: that of ``tensor``.
    """
    if not is_sharded(tensor):
        return part
    size = torch.Size(tensor.shape if shape is None else shape)
    facts = {"shape": size, "stride": torch.empty(size, device="meta").stride(), "run_check": False}
    return type(tensor.detach()).from_local(part.to(tensor.device), tensor.device_mesh, tensor.placements, **facts)


def is_split(tensor: torch.Tensor, dim: int) -> bool:
    """Whether processes hold parts of a tensor along one dimension."""
    return any(getattr(placement, "dim", None) == dim for placement in getattr(tensor, "placements", ()))


@dataclass(frozen=True)
class StateLayout:
    """Sections of the state buffer of one parameter.

    Attributes:
        kind: ``DENSE``, ``ROWS``, ``COLUMNS``, ``ELEMENTS`` or ``TWO_FOUR``.
        shape: shape of the parameter.
        units: active rows, columns or entries; for ``DENSE`` the number of elements.
        dtype: dtype of moments and master, see :func:`state_dtype`.
        gain, amsgrad, master: whether the section exists.
        cohorts: number of distinct step counts.
        cohort_scope: ``SHARED``, ``PER_UNIT`` or ``PER_ENTRY``.
        seed: selects the random stream of stochastic rounding.
        compact_grad: whether gradients come in the compact shape; for rows and columns only.
        by_row: whether a row has one second moment, which only whole rows of a matrix can.
    """

    kind: int
    shape: tuple[int, ...]
    units: int
    dtype: torch.dtype
    gain: bool = False
    amsgrad: bool = False
    master: bool = False
    cohorts: int = 1
    cohort_scope: int = SHARED
    seed: int = 0
    compact_grad: bool = False
    by_row: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def inner(self) -> int:
        """Entries of one slice along dim 0; for a 0-d parameter 1."""
        return math.prod(self.shape[1:])

    @property
    def has_rows(self) -> bool:
        """Whether the state is of whole rows of a matrix, and of no running maximum, which these have of each entry."""
        return len(self.shape) == 2 and self.kind in (DENSE, ROWS) and not self.amsgrad

    def by_rows(self, asked: bool) -> StateLayout:
        """This layout with one second moment a row, if that is asked for and possible."""
        return replace(self, by_row=asked and self.has_rows)

    def is_valid(self) -> bool:
        """Whether these values can belong together, whoever wrote them down."""
        by_unit = self.kind in (ROWS, COLUMNS)
        dims = len(self.shape)
        if self.kind == ROWS:
            fits = dims >= 1 and self.units <= self.shape[0]
        elif self.kind == COLUMNS:
            fits = dims == 2 and self.units <= self.shape[1]
        elif self.kind == TWO_FOUR:
            fits = dims == 2 and self.shape[1] % 4 == 0
        else:
            fits = self.kind in (DENSE, ELEMENTS) and self.units <= self.numel
        scopes = (SHARED, PER_UNIT, PER_ENTRY) if by_unit else (SHARED, PER_ENTRY)
        fits = fits and (by_unit or not self.compact_grad)
        fits = fits and (not self.by_row or self.has_rows)
        return fits and self.units >= 0 and 1 <= self.cohorts <= MAX_COHORTS and self.cohort_scope in scopes

    @property
    def compact_shape(self) -> tuple[int, ...]:
        """Shape of the moments: (k, *rest) for rows, (m, k) for columns, (m, n/2) for 2:4, (k,) for elements."""
        if self.kind == ROWS:
            return (self.units, *self.shape[1:])
        if self.kind == COLUMNS:
            return (self.shape[0], self.units)
        if self.kind == TWO_FOUR:
            return (self.shape[0], self.shape[1] // 2)
        return (self.units,) if self.kind == ELEMENTS else self.shape

    @property
    def grad_shape(self) -> tuple[int, ...]:
        """Shape of a gradient."""
        return self.compact_shape if self.compact_grad else self.shape

    @property
    def entries(self) -> int:
        """Number of active entries."""
        return math.prod(self.compact_shape)

    def sections(self) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
        """Byte offset, shape and dtype of each section that exists, in the order in which they lie."""
        compact = self.compact_shape
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "step": (() if self.cohorts == 1 else (self.cohorts,), torch.int32)
        }
        if self.kind in (ROWS, COLUMNS):
            shapes["index"] = ((self.units,), torch.int32)
        elif self.kind in (ELEMENTS, TWO_FOUR):
            shapes["index"] = ((-(-self.numel // 32),), torch.int32)
        if self.kind == ELEMENTS:
            shapes["ranks"] = ((-(-self.numel // BLOCK) + 1,), torch.int64)
        if self.gain:
            shapes["gain"] = ((self.units,), torch.float32)
        if self.cohort_scope == PER_UNIT:
            shapes["cohort"] = ((self.units,), torch.uint8)
        elif self.cohort_scope == PER_ENTRY:
            shapes["cohort"] = (compact, torch.uint8)
        shapes["exp_avg"] = (compact, self.dtype)
        shapes["exp_avg_sq"] = ((compact[0], 1) if self.by_row else compact, self.dtype)
        if self.amsgrad:
            shapes["max_exp_avg_sq"] = (compact, self.dtype)
        if self.master:
            shapes["master"] = (compact, self.dtype)

        result, offset = {}, 0
        for name in _SECTIONS:
            if name in shapes:
                shape, dtype = shapes[name]
                result[name] = (offset, shape, dtype)
                # After the step counts the CUDA kernel keeps 4 bytes, by which it finds its last block.
                size = math.prod(shape) * dtype.itemsize + (4 if name == "step" else 0)
                offset += -(-size // ALIGNMENT) * ALIGNMENT
        return result

    @property
    def nbytes(self) -> int:
        offset, shape, dtype = list(self.sections().values())[-1]
        return offset + math.prod(shape) * dtype.itemsize

    def row(self) -> list[int]:
        """This layout as one row of an op's ``layout`` tensor; see :data:`FIELDS`."""
        sections = self.sections()
        offsets = [sections[s][0] if s in sections else 0 for s in _SECTIONS[1:]]
        facts = [self.numel, self.inner, int(self.compact_grad), int(self.by_row)]
        return [self.kind, self.units, self.cohorts, self.cohort_scope, self.seed, *facts, *offsets]

    @classmethod
    def from_row(cls, row: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> StateLayout:
        """The inverse of :meth:`row`; ``dtype`` is the parameter's."""
        field = dict(zip(FIELDS, row, strict=True))
        return cls(
            kind=field["kind"],
            shape=tuple(shape),
            units=field["units"],
            dtype=state_dtype(dtype),
            gain=field["gain_offset"] > 0,
            amsgrad=field["max_exp_avg_sq_offset"] > 0,
            master=field["master_offset"] > 0,
            cohorts=field["cohorts"],
            cohort_scope=field["cohort_scope"],
            seed=field["seed"],
            compact_grad=field["compact_grad"] != 0,
            by_row=field["by_row"] != 0,
        )

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The sections of ``buffer`` (uint8, :attr:`nbytes` long) as typed tensors that share its memory.

        The index section goes by the name of its kind (``rows``, ``columns``, ``bits``, ``two_four_bits``).
        """
        result = {}
        for name, (offset, shape, dtype) in self.sections().items():
            end = offset + math.prod(shape) * dtype.itemsize
            view = buffer[offset:end].view(dtype).view(shape)
            result[INDEX_NAME[self.kind] if name == "index" else name] = view
        return result

    def allocate(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """A zeroed buffer on ``device`` and its views."""
        buffer = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        return buffer, self.views(buffer)
