"""State dicts of split parameters: entries of the whole weight, of which each process has its part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, INDEX_NAME, ROWS, StateLayout, is_sharded, like, state_dtype
from sparse_cl.masks import ColumnMask, Mask, RowMask, from_sections

from . import counts
from .leaf import weight_of
from .shards import Piece, from_all
from .state import MOMENTS, PROJECTION, ParameterState, by_unit_if_uniform, cohorts_of, layout_for

_SPLIT = (*MOMENTS, "master")

#: Offset and shape of a block of an array.
Block = tuple[tuple[int, ...], tuple[int, ...]]


class SplitArray(Tensor):
    """An array of which this process holds some blocks, for ``torch.distributed.checkpoint``.

    A DTensor cannot say it: the active rows that a process holds are as many as there are in its part of the weight.

    Attributes:
        parts: the blocks, by their offsets in the whole array.
    """

    parts: dict[tuple[int, ...], Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], parts: dict[tuple[int, ...], Tensor]) -> SplitArray:
        some = next(iter(parts.values()))
        array = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=some.dtype, device=some.device)
        array.parts = parts
        return array

    def __init__(self, *arguments: Any) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        whole, *others = args
        if func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.clone, torch.ops.aten._to_copy):
            given = {at: others for at in whole.parts}
        elif func.overloadpacket is torch.ops.aten.new_empty and tuple(others[0]) == tuple(whole.shape):
            # By this, dcp.async_save makes the copy that it fills.
            given = {at: [part.shape] for at, part in whole.parts.items()}
        else:
            _refuse(func)
        return cls(whole.shape, {at: func(part, *given[at], **(kwargs or {})) for at, part in whole.parts.items()})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SplitArray({tuple(self.shape)}, {[(at, tuple(part.shape)) for at, part in self.parts.items()]} here)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickling")

    # The protocol of torch.distributed._checkpointable.

    def _chunks(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        # Of an array without entries an empty block, or its name would be missing from the checkpoint.
        held = ((at, part.shape) for at, part in self.parts.items() if part.numel() or not self.numel())
        return [ChunkStorageMetadata(offsets=torch.Size(at), sizes=shape) for at, shape in held]

    def __create_chunk_list__(self) -> list[Any]:
        return self._chunks()

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        some = next(iter(self.parts.values()))
        properties = TensorProperties.create_from_tensor(some)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self._chunks()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.parts[tuple(index.offset)]


def _refuse(what: object) -> NoReturn:
    raise TypeError(
        f"{what}: the state of a masked parameter that is split over processes goes through "
        "torch.distributed.checkpoint only; save it with dcp.save, without full_state_dict=True"
    )


def overlap(a: Mask | None, b: Mask | None) -> bool:
    """Whether some entry is active under both masks; None: all are."""
    if a is None or b is None:
        other = b if a is None else a
        return other is None or other.numel > 0
    return bool((a.to_dense() & b.to(a.device).to_dense()).any())


def whole_entries(state: ParameterState, shown: Mapping[str, Tensor], piece: Piece, param: Any) -> dict[str, Any]:
    """The entries of a state dict. All processes of the mesh must call it.

    Args:
        state: of this process's part; ``shown``: what the optimizer shows of it.
        param: the DTensor.
    """
    entries: dict[str, Any] = dict(shown)
    entries.pop("cohort", None)
    layout = _whole_layout(state, piece)
    if state.whole is not None:
        # Copies, since what loads a checkpoint writes into them.
        sections = state.whole.sections()
        entries.update({name: section.to(state.buffer.device, copy=True) for name, section in sections.items()})
    for name in _SPLIT:
        if name not in entries:
            continue
        shape = layout.sections()[name][1]
        if state.whole is None:
            entries[name] = like(entries[name], param, shape)
        else:
            blocks = blocks_of(state.whole, piece, shape != layout.compact_shape)
            views = entries[name].split([size[0] for _, size in blocks])
            entries[name] = SplitArray(shape, dict(zip((offset for offset, _ in blocks), views, strict=True)))
    if state.mixed:
        entries.update(_all_counts(state, piece, layout))
    kept = {name: value for name, value in entries.items() if name.startswith(PROJECTION) and value.dim()}
    entries.update(split_rows(kept, piece))
    return counts.packed(entries)


def of_layer(entries: dict[str, Any], mask: RowMask | ColumnMask, leaf: Any) -> dict[str, Any]:
    """The entries of a split leaf as a process has them that steps the layer's weight: under the layer's mask.

    Args:
        entries: as :func:`whole_entries` gave them; ``leaf``: the DTensor.
    """
    name = INDEX_NAME[mask.kind]
    found = entries | {name: mask.index.to(entries[name].device, copy=True)}
    # In half precision the master, if there is one, is another tensor.
    return found if leaf.dtype != state_dtype(leaf.dtype) else found | {"master": leaf.detach()}


def part_of_leaf(entries: Mapping[str, Any], mask: RowMask | ColumnMask) -> dict[str, Any]:
    """What :func:`of_layer` gave, or an optimizer in one process, as :func:`part_of` takes it.

    Raises:
        ValueError: it was made under another mask than the layer has.
    """
    name = INDEX_NAME[mask.kind]
    sections = {key: entries[key] for key in (name, "gain") if key in entries}
    if name not in sections or mask != from_sections(mask.kind, mask.shape, sections):
        raise ValueError(
            f"it was made under another mask than that of its ActiveLinear, {mask!r}; activate the model with the mask "
            "that it was trained with"
        )
    return {**entries, name: mask.within.index}


def split_rows(kept: Mapping[str, Tensor], piece: Piece) -> dict[str, Tensor]:
    """What a projection keeps of the rows of a split weight, or of some of them. All processes must call it."""
    if not kept:
        return {}
    found = dict(from_all(piece.mesh, (piece.number, {name: len(rows) for name, rows in kept.items()})))
    result: dict[str, Tensor] = {}
    for name, rows in kept.items():
        before = sum(lengths[name] for number, lengths in found.items() if number < piece.number)
        shape = (sum(lengths[name] for lengths in found.values()), *rows.shape[1:])
        result[name] = SplitArray(shape, {(before, *[0] * (rows.dim() - 1)): rows})
    return result


def gathered(given: Any, mesh: Any) -> Any:
    """An array of which this process holds some blocks as an ordinary tensor on the CPU; anything else as it is.

    All processes must call it.
    """
    if not isinstance(given, SplitArray):
        return given
    array = torch.empty(given.shape, dtype=given.dtype, device="cpu")
    for parts in from_all(mesh, {at: part.cpu() for at, part in given.parts.items()}):
        for at, part in parts.items():
            array[tuple(slice(o, o + s) for o, s in zip(at, part.shape, strict=True))] = part
    return array


def rows_held(name: str, given: Any, piece: Piece, own: slice | None = None) -> Any:
    """What this process holds of what a projection keeps, however it is given.

    Args:
        own: which rows of a whole array; None: the piece's.

    Raises:
        ValueError: it is of some rows of the whole weight, and nothing says which.
    """
    if isinstance(given, SplitArray):
        (part,) = given.parts.values()
        return part
    if not isinstance(given, Tensor) or given.dim() == 0:
        return given
    if own is None and len(given) != piece.shape[0]:
        raise ValueError(
            f"{name}: has {len(given)} rows of a weight of {piece.shape[0]} that is split over processes; load it by "
            "torch.distributed.checkpoint into the state dict of this optimizer"
        )
    return given[slice(piece.offset[0], piece.offset[0] + piece.size[0]) if own is None else own]


def part_of(entries: Mapping[str, Any], piece: Piece, param: Any) -> tuple[dict[str, Any], Mask | None, bool]:
    """What this process holds of the entries of a state dict, the mask of the whole weight, and whether counts differ.

    Args:
        entries: as :func:`whole_entries` gave them, or of an optimizer in one process, ours or AdamW's.

    Raises:
        ValueError: an entry has another shape than the weight and its mask imply.
    """
    given = counts.unpacked(entries)
    given.update({name: rows_held(name, v, piece) for name, v in given.items() if name.startswith(PROJECTION)})
    kind = next((kind for kind, name in INDEX_NAME.items() if name in given), DENSE)
    whole = None
    if kind != DENSE:
        sections = {name: given[name] for name in (INDEX_NAME[kind], "ranks", "gain") if name in given}
        if kind == ELEMENTS and "ranks" not in sections:
            raise ValueError("state has no ranks")
        whole = from_sections(kind, piece.shape, {name: v.to(param.device, copy=True) for name, v in sections.items()})
    layout = layout_for(param, whole)
    if whole is not None:
        shapes = layout.sections()
        for name, section in sections.items():
            shape = shapes["index" if name == INDEX_NAME[kind] else name][1]
            if section.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(section.shape)}")
        given.update(whole.piece(piece.offset, piece.size).sections())
    for name in _SPLIT:
        if name in given:
            by_row = given[name].dim() == 2 and given[name].shape == (layout.compact_shape[0], 1)
            shape = (layout.compact_shape[0], 1) if by_row else layout.compact_shape
            if given[name].shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(given[name].shape)}")
            given[name] = _held(name, given[name], blocks_of(whole, piece, by_row), piece, param)
    if (cohort := given.pop("cohort", None)) is None:
        return given, whole, False
    given.update(_counts_of_part(torch.as_tensor(given["step"]), cohort, layout, whole, piece))
    return given, whole, True


def blocks_of(mask: Mask | None, piece: Piece, by_row: bool = False) -> list[Block]:
    """Offset and shape of what ``piece`` holds of a compact array; several where it has gaps.

    Args:
        mask: of the whole weight; None: all.
        by_row: of an array with one entry per row.
    """
    offset, size = piece.offset, piece.size
    if mask is not None and mask.kind in (ROWS, COLUMNS):
        dim = 0 if mask.kind == ROWS else 1
        start = int((mask.index < offset[dim]).sum())
        units = int((mask.index < offset[dim] + size[dim]).sum()) - start
        offset = (*offset[:dim], start, *offset[dim + 1 :])
        size = (*size[:dim], units, *size[dim + 1 :])
    elif mask is not None and mask.kind == ELEMENTS:
        return _runs(mask.to_dense(), piece)
    elif mask is not None:
        offset, size = (offset[0], offset[1] // 2), (size[0], size[1] // 2)
    return [((offset[0], 0), (size[0], 1))] if by_row else [(offset, size)]


def _runs(dense: Tensor, piece: Piece) -> list[Block]:
    """As :func:`blocks_of`, of an element mask: one run, or one per row where columns are split."""
    if not piece.shape:
        return [((0,), (int(dense),))]
    first, end = piece.offset[0], piece.offset[0] + piece.size[0]
    of_rows = dense.reshape(len(dense), -1).sum(1) if dense.numel() else dense.new_zeros(len(dense), dtype=torch.int64)
    before = int(of_rows[:first].sum())
    held = of_rows[first:end]
    if piece.has_rows:
        return [((before,), (int(held.sum()),))]
    left, right = piece.offset[1], piece.offset[1] + piece.size[1]
    rows = dense[first:end].reshape(end - first, dense.shape[1], math.prod(dense.shape[2:])).sum(2)
    starts = before + held.cumsum(0) - held + rows[:, :left].sum(1)
    runs = torch.stack([starts, rows[:, left:right].sum(1)], 1).tolist()
    return [((start,), (count,)) for start, count in runs if count] or [((0,), (0,))]


def _held(name: str, whole: Any, blocks: list[Block], piece: Piece, param: Any) -> Tensor:
    """What this process holds of one section, however it is given."""
    if isinstance(whole, SplitArray):
        if sorted(whole.parts) != sorted(offset for offset, _ in blocks):
            raise ValueError(
                f"{name}: holds the blocks of another process or mesh; load it by torch.distributed.checkpoint into "
                "the state dict of this optimizer"
            )
        parts = [whole.parts[offset] for offset, _ in blocks]
    else:
        if is_sharded(whole):
            if whole.device_mesh == param.device_mesh and tuple(whole.placements) == tuple(param.placements):
                return weight_of(whole)
            whole = whole.full_tensor()
        cuts = [tuple(slice(o, o + s) for o, s in zip(*block, strict=True)) for block in blocks]
        parts = [whole[cut] for cut in cuts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _whole_layout(state: ParameterState, piece: Piece) -> StateLayout:
    options = {name: getattr(state.layout, name) for name in ("amsgrad", "master", "by_row")}
    like = torch.empty(piece.shape, dtype=state.layout.dtype, device="meta")
    return layout_for(like, state.whole, **options)


def _all_counts(state: ParameterState, piece: Piece, layout: StateLayout) -> dict[str, Tensor]:
    """``step`` and ``cohort`` of the whole weight, from what all processes know."""
    table, places = state.step_counts(False).cpu().unique(return_inverse=True)
    blocks = blocks_of(state.whole, piece)
    found = from_all(piece.mesh, (blocks, table, places.to(torch.uint8)))
    every = torch.cat([table for _, table, _ in found]).unique()
    table, place = cohorts_of(every)
    cohort = torch.zeros(layout.compact_shape, dtype=torch.uint8, device="cpu")
    for blocks, own, places in found:
        if places.numel() == 0:
            continue
        flat = place[torch.searchsorted(every, own)].to(torch.uint8)[places.long()]
        for (offset, size), part in zip(blocks, flat.split([math.prod(size) for _, size in blocks]), strict=True):
            cohort[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] = part.view(size)
    if state.whole is not None and layout.kind in (ROWS, COLUMNS):
        cohort = by_unit_if_uniform(layout, cohort)[1]
    return {"step": table.to(torch.int32), "cohort": cohort.reshape(-1)}


def _counts_of_part(
    step: Tensor, cohort: Tensor, layout: StateLayout, whole: Mask | None, piece: Piece
) -> dict[str, Tensor]:
    """``step`` and, where there are several counts, ``cohort`` of what this process holds."""
    by_unit = layout.kind in (ROWS, COLUMNS) and cohort.numel() == layout.units
    if cohort.numel() != (layout.units if by_unit else layout.entries):
        raise ValueError(f"cohort: expected {layout.units} or {layout.entries} numbers, got {cohort.numel()}")
    if cohort.numel() and int(cohort.max()) >= step.numel():
        raise ValueError(f"cohort: expected numbers below {step.numel()}, one for each count in step")
    blocks = blocks_of(whole, piece)
    if by_unit:
        dim = 0 if layout.kind == ROWS else 1
        (offset, size) = blocks[0]
        own = cohort.reshape(-1)[offset[dim] : offset[dim] + size[dim]]
    else:
        shaped = cohort.reshape(layout.compact_shape)
        parts = [shaped[tuple(slice(o, o + s) for o, s in zip(*block, strict=True))] for block in blocks]
        own = parts[0] if len(parts) == 1 else torch.cat(parts)
    if own.numel() == 0:
        return {"step": step.max()}
    used, places = own.unique(return_inverse=True)
    table = step.reshape(-1)[used.long()]
    return {"step": table[0]} if len(used) == 1 else {"step": table, "cohort": places.to(torch.uint8)}
