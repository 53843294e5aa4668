"""Masks: which entries of one parameter may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_cl import storage
from sparse_cl.layout import COLUMNS, ELEMENTS, INDEX_NAME, ROWS, TWO_FOUR, StateLayout, state_dtype
from sparse_cl.reference import active_positions, block_ranks, pack_bits, unpack_bits


class Mask:
    """The active entries of one parameter: an immutable value.

    Attributes:
        shape: shape of the parameter.
        numel: number of active entries.
        density: ``numel`` over the number of entries of the parameter (0 for a parameter without entries).
        gain: float32, one factor a row or column on its updates, or None.
    """

    kind: ClassVar[int]
    gain: Tensor | None = None

    def __init__(self, index: Tensor, shape: Sequence[int]):
        self.index = index
        self.shape = torch.Size(shape)

    @property
    def units(self) -> int:
        """Number of active rows or columns; for element and 2:4 masks, of active entries."""
        raise TypeError(f"{type(self).__name__} does not define units")

    @property
    def numel(self) -> int:
        return self.layout().entries

    @property
    def density(self) -> float:
        total = math.prod(self.shape)
        return self.numel / total if total else 0.0

    @property
    def device(self) -> torch.device:
        return self.index.device

    def layout(self, dtype: torch.dtype = torch.float32, **options: Any) -> StateLayout:
        """How the state of a parameter of ``dtype`` under this mask lies in memory."""
        return StateLayout(
            kind=self.kind,
            shape=tuple(self.shape),
            units=self.units,
            dtype=state_dtype(dtype),
            gain=self.gain is not None,
            **options,
        )

    def sections(self) -> dict[str, Tensor]:
        """The tensors that define this mask, by the names that optimizer state and mask files use."""
        result = {INDEX_NAME[self.kind]: self.index}
        if self.gain is not None:
            result["gain"] = self.gain
        return result

    def positions(self) -> Tensor:
        """int64: flat positions of the active entries, ascending."""
        return active_positions(self.layout(), self.sections(), self.device)

    def to_dense(self) -> Tensor:
        """A bool tensor of the parameter's shape, true where the entry may change."""
        dense = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=self.device)
        dense[self.positions()] = True
        return dense.view(self.shape)

    def piece(self, offset: Sequence[int], shape: Sequence[int]) -> Mask:
        """The mask of a block of the parameter, which has this shape and begins at this offset of each dimension.

        Raises:
            ValueError: of a 2:4 mask, the block splits a group of four.
        """
        block = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        return type(self)(self.to_dense()[block])  # type: ignore[call-arg]  # those that have no gain

    def to(self, device: torch.device | str) -> Mask:
        """This mask with its tensors on ``device``."""
        device = torch.device(device)
        if device == self.device:
            return self
        return from_sections(self.kind, self.shape, {k: v.to(device) for k, v in self.sections().items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.kind != other.kind or self.shape != other.shape:
            return False
        mine, theirs = self.sections(), other.sections()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k].to(mine[k].device)) for k in mine)

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: Mask) -> Mask:
        return self._combine(other, torch.logical_or, torch.maximum)

    def __and__(self, other: Mask) -> Mask:
        return self._combine(other, torch.logical_and, torch.mul)

    def __invert__(self) -> Mask:
        return ElementMask(~self.to_dense())

    def _combine(self, other: Mask, select: Callable, blend: Callable) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        _check_same_shape(self, other)
        if self.gain is not None or other.gain is not None:
            raise ValueError(
                f"combining a {type(self).__name__} with a {type(other).__name__} would lose their gain: "
                "combine masks of one kind, or build them without gain"
            )
        return ElementMask(select(self.to_dense(), other.to(self.device).to_dense()))

    def __repr__(self) -> str:
        gain = ", gain" if self.gain is not None else ""
        return f"{type(self).__name__}({self.numel} of {math.prod(self.shape)} active, shape={tuple(self.shape)}{gain})"


class _UnitMask(Mask):
    """What row and column masks share: sorted int32 indices along one dimension, and a gain for each."""

    _dim: ClassVar[int]
    _argument: ClassVar[str]

    def __init__(
        self,
        units: Sequence[int] | Tensor,
        shape: Sequence[int],
        gain: Sequence[float] | Tensor | None = None,
    ):
        name = self._argument
        shape = tuple(int(s) for s in shape)
        if self._dim >= len(shape) or (self._dim == 1 and len(shape) != 2):
            need = "2 dimensions" if self._dim == 1 else "at least 1 dimension"
            raise ValueError(f"shape: got {shape}, but a {type(self).__name__} needs {need}")
        given = torch.as_tensor(units)
        if given.numel() == 0:
            given = given.to(torch.int64)
        if given.dim() != 1:
            raise ValueError(f"{name}: expected one index a {name[:-1]}, got a tensor of shape {tuple(given.shape)}")
        if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
            hint = "; use .nonzero().flatten() on a bool vector" if given.dtype == torch.bool else ""
            raise TypeError(f"{name}: expected integer indices, got {given.dtype}{hint}")
        size = shape[self._dim]
        given = given.long()
        if given.numel():
            low, high = int(given.min()), int(given.max())
            if low < 0 or high >= size:
                bad = low if low < 0 else high
                raise IndexError(f"{name}: index {bad} is out of range for shape {shape}: expected 0 to {size - 1}")
        index, order = given.sort()
        repeated = index[1:][index[1:] == index[:-1]]
        if repeated.numel():
            raise ValueError(f"{name}: index {int(repeated[0])} is given twice; pass each {name[:-1]} once")
        super().__init__(index.to(torch.int32), shape)
        if gain is not None:
            factor = torch.as_tensor(gain, dtype=torch.float32, device=index.device).detach()
            if factor.shape != given.shape:
                raise ValueError(
                    f"gain: expected {given.numel()} factors, one a {name[:-1]}, got {tuple(factor.shape)}"
                )
            if not bool((factor.isfinite() & (factor > 0)).all()):
                raise ValueError(
                    f"gain: expected finite factors above 0; leave a {name[:-1]} out of the mask to close it"
                )
            self.gain = factor[order].contiguous()

    @property
    def units(self) -> int:
        return self.index.numel()

    @cached_property
    def within(self) -> RowMask | ColumnMask:
        """The mask of the compact array of its entries: all of them, with the same gains."""
        shape = self.layout().compact_shape
        return type(self)(torch.arange(self.units, device=self.device), shape, self.gain)  # type: ignore[return-value]

    def piece(self, offset: Sequence[int], shape: Sequence[int]) -> Mask:
        start = offset[self._dim]
        inside = (self.index >= start) & (self.index < start + shape[self._dim])
        return type(self)(self.index[inside] - start, shape, None if self.gain is None else self.gain[inside])

    def _combine(self, other: Mask, select: Callable, blend: Callable) -> Mask:
        if type(other) is not type(self):
            return super()._combine(other, select, blend)
        _check_same_shape(self, other)
        other = other.to(self.device)
        size = self.shape[self._dim]
        chosen = select(_scatter(self.index, size), _scatter(other.index, size)).nonzero().view(-1)
        if self.gain is None and other.gain is None:
            return type(self)(chosen, self.shape)
        # Where only one of two united masks holds a row, the other one's factor must not win the maximum.
        absent = 0.0 if select is torch.logical_or else 1.0
        factors = [_scatter(m.index, size, absent, 1.0 if m.gain is None else m.gain) for m in (self, other)]
        return type(self)(chosen, self.shape, gain=blend(*factors)[chosen])

    def __invert__(self) -> Mask:
        """The complement. Gains are dropped: they belong to the rows or columns that leave."""
        return type(self)((~_scatter(self.index, self.shape[self._dim])).nonzero().view(-1), self.shape)


class RowMask(_UnitMask):
    """Active rows, that is slices along dim 0: output neurons of a weight, or entries of a bias.

    Args:
        rows: indices in any order, an int sequence or integer tensor.
        shape: of the parameter, at least 1-D.
        gain: one factor above 0 a row, in the order of ``rows``; scales all that a step adds to the row.

    Raises:
        IndexError, TypeError, ValueError: a row out of range or twice, no integers, a factor not above 0.

    ``|``, ``&`` and ``~`` of row masks are row masks; of two gains ``|`` keeps the larger and ``&`` their product.
    """

    kind = ROWS
    _dim = 0
    _argument = "rows"

    def __init__(
        self, rows: Sequence[int] | Tensor, shape: Sequence[int], gain: Sequence[float] | Tensor | None = None
    ):
        super().__init__(rows, shape, gain)


class ColumnMask(_UnitMask):
    """Active columns of a 2-D parameter: its input neurons. Arguments as for :class:`RowMask`."""

    kind = COLUMNS
    _dim = 1
    _argument = "columns"

    def __init__(
        self, columns: Sequence[int] | Tensor, shape: Sequence[int], gain: Sequence[float] | Tensor | None = None
    ):
        super().__init__(columns, shape, gain)


class ElementMask(Mask):
    """Active single entries, stored as one bit an entry.

    Args:
        dense_bool: bool tensor of the parameter's shape, true where the entry may change.
    """

    kind = ELEMENTS

    def __init__(self, dense_bool: Tensor):
        dense = _check_bool(dense_bool)
        super().__init__(pack_bits(dense), dense.shape)
        self.ranks = block_ranks(dense)

    @cached_property
    def units(self) -> int:
        return int(self.ranks[-1])

    def sections(self) -> dict[str, Tensor]:
        return {"bits": self.index, "ranks": self.ranks}


class TwoFourMask(Mask):
    """Exactly two of each four consecutive entries along dim 1 of a 2-D parameter.

    Args:
        dense_bool: bool tensor (m, n), n a multiple of 4.

    ``~`` is the other two of each four; ``|`` and ``&`` give an :class:`ElementMask`.
    """

    kind = TWO_FOUR

    def __init__(self, dense_bool: Tensor):
        dense = _check_bool(dense_bool)
        if dense.dim() != 2 or dense.shape[1] % 4:
            raise ValueError(f"dense_bool: expected shape (m, n) with n a multiple of 4, got {tuple(dense.shape)}")
        counts = dense.reshape(-1, 4).sum(1)
        wrong = (counts != 2).nonzero()
        if wrong.numel():
            group = int(wrong[0])
            row, column = divmod(4 * group, dense.shape[1])
            raise ValueError(
                f"dense_bool: expected exactly 2 active of each 4 along dim 1, got {int(counts[group])} "
                f"at row {row}, columns {column} to {column + 3}"
            )
        super().__init__(pack_bits(dense), dense.shape)

    @property
    def units(self) -> int:
        return math.prod(self.shape) // 2

    def piece(self, offset: Sequence[int], shape: Sequence[int]) -> Mask:
        if offset[1] % 4 or shape[1] % 4:
            raise ValueError(
                f"a TwoFourMask has groups of four columns, of which columns {offset[1]} to "
                f"{offset[1] + shape[1] - 1} are no whole number; split the weight by rows, or at multiples of 4"
            )
        return super().piece(offset, shape)

    def __invert__(self) -> Mask:
        return TwoFourMask(~self.to_dense())


_CLASSES: dict[int, Any] = {cls.kind: cls for cls in (RowMask, ColumnMask, ElementMask, TwoFourMask)}


def from_sections(kind: int, shape: Sequence[int], sections: Mapping[str, Tensor]) -> Mask:
    """The mask whose :meth:`Mask.sections` these are. They are trusted: use it on a mask's own tensors only."""
    mask = object.__new__(_CLASSES[kind])
    Mask.__init__(mask, sections[INDEX_NAME[kind]], shape)
    if kind == ELEMENTS:
        mask.ranks = sections["ranks"]
    if "gain" in sections:
        mask.gain = sections["gain"]
    return mask


def save_masks(masks: Mapping[str, Mask], path: str | PathLike) -> None:
    """Writes named masks to a safetensors file.

    Raises:
        TypeError: a name is no string or a value no mask.
    """
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for name, mask in masks.items():
        if not isinstance(name, str) or not isinstance(mask, Mask):
            raise TypeError(f"masks: expected {{name: mask}}, got {name!r}: {type(mask).__name__}")
        index[name] = {"kind": type(mask).__name__, "shape": list(mask.shape)}
        tensors |= {f"{name}:{section}": tensor for section, tensor in mask.sections().items()}
    storage.write(path, "masks", tensors, masks=index)


def load_masks(path: str | PathLike, device: torch.device | str = "cpu") -> dict[str, Mask]:
    """Reads what :func:`save_masks` wrote. Every index is checked again, as if the masks were built anew.

    Raises:
        ValueError: the file is truncated, no safetensors file, or holds something else than masks.
        FileNotFoundError: there is no such file.
    """
    tensors, facts = storage.read(path, "masks", "save_masks", "masks")
    if not isinstance(facts["masks"], dict):
        raise ValueError(f"{path}: not a readable masks file (its index is no object); write it again with save_masks")
    masks = {}
    for name, entry in facts["masks"].items():
        try:
            masks[name] = _rebuild(entry, name, tensors)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"{path}: mask {name!r} is damaged ({error}); write it again with save_masks") from error
    return {name: mask.to(device) for name, mask in masks.items()}


def _rebuild(entry: dict, name: str, tensors: Mapping[str, Tensor]) -> Mask:
    kinds = {cls.__name__: cls for cls in _CLASSES.values()}
    cls, shape = kinds[entry["kind"]], entry["shape"]
    index = tensors[f"{name}:{INDEX_NAME[cls.kind]}"]
    if issubclass(cls, _UnitMask):
        return cls(index, shape, gain=tensors.get(f"{name}:gain"))
    numel = math.prod(shape)
    if index.dtype != torch.int32 or index.numel() != -(-numel // 32):
        raise ValueError(f"{name}: expected {-(-numel // 32)} int32 words for shape {shape}, got {tuple(index.shape)}")
    return cls(unpack_bits(index, numel).view(shape))


def _scatter(index: Tensor, size: int, absent: float | bool = False, value: Tensor | float | bool = True) -> Tensor:
    dtype = torch.bool if isinstance(absent, bool) else torch.float32
    out = torch.full((size,), absent, dtype=dtype, device=index.device)
    out[index.long()] = value
    return out


def _check_same_shape(a: Mask, b: Mask) -> None:
    if a.shape != b.shape:
        raise ValueError(f"masks of different parameters: shapes {tuple(a.shape)} and {tuple(b.shape)}")


def _check_bool(dense: Tensor) -> Tensor:
    if not isinstance(dense, Tensor) or dense.dtype != torch.bool:
        got = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
        raise TypeError(f"dense_bool: expected a bool tensor, got {got}; compare with a threshold first")
    return dense.detach()


def same_mask(a: Mask | None, b: Mask | None) -> bool:
    """Whether two masks, or none, are equal."""
    return a is b or (a is not None and b is not None and a == b)
