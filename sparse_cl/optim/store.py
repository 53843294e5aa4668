"""The masks and the compact states of all parameters of an optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_cl.layout import MAX_COHORTS, is_sharded
from sparse_cl.masks import ColumnMask, Mask, RowMask, same_mask

from . import counts
from . import state as states
from .leaf import is_compact, owner_of, split_owner_of, weight_of
from .names import ByParameter, by_param, name_of, parameters_of
from .shards import piece_of
from .state import ParameterState
from .whole_state import of_layer, overlap, part_of, part_of_leaf, whole_entries


class StateStore:
    """Keeps each parameter's state in one buffer, packed under the parameter's mask.

    ``optimizer.state[p]`` shows the buffer's sections. Whoever replaces one there (a loaded checkpoint, a tool) has it
    packed again before the next step.

    Args:
        optimizer: whose state this is; not kept alive.

    Attributes:
        masks: by parameter; leaves are not in it, since their layers have the mask.
        mismatch: which state was made under another mask, in words; None if all fit.
        packed: the states by parameter.
    """

    def __init__(self, optimizer: Optimizer, masks: dict[Tensor, Mask] | None = None, mismatch: str | None = None):
        self._optimizer = weakref.proxy(optimizer)
        self.masks = masks or {}
        self.mismatch = mismatch
        self.packed: dict[Tensor, ParameterState] = {}
        self._parts: dict[Tensor, tuple[Mask, Mask]] = {}  # of split parameters: the mask and its part here

    def name(self, param: Tensor) -> str:
        return name_of(self._optimizer.param_groups, param)

    # Masks.

    def resolve(self, masks: ByParameter[Mask]) -> dict[Tensor, Mask]:
        """``masks`` by parameter.

        Raises:
            TypeError, ValueError: a key or a mask that fits no parameter.
        """
        resolved = by_param(self._optimizer.param_groups, masks, "masks", "Mask")
        for param, mask in resolved.items():
            where = f"masks: parameter {self.name(param)}"
            if owner_of(param) is not None:
                raise ValueError(f"{where} is of an ActiveLinear, which has a mask of its own; leave it out here")
            if not isinstance(mask, Mask):
                raise TypeError(f"{where}: expected a Mask, got {type(mask).__name__}")
            if mask.shape != param.shape:
                of_part = is_sharded(param) and mask.shape == weight_of(param).shape
                hint = ", which this process holds of it; masks are of whole weights" if of_part else ""
                raise ValueError(
                    f"{where} has shape {tuple(param.shape)}, but its mask is for {tuple(mask.shape)}{hint}"
                )
            try:
                self._restricted(param, mask)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return resolved

    def mask_of(self, param: Tensor, masks: Mapping[Tensor, Mask] | None = None) -> Mask | None:
        """The mask of what a step of ``param`` writes: its layer's for a leaf, else the one in ``masks``.

        Of a parameter that is split over processes, it is the mask of this one's part.
        """
        mask = self.whole_mask_of(param, masks)
        return None if mask is None else self._restricted(param, mask)

    def whole_mask_of(self, param: Tensor, masks: Mapping[Tensor, Mask] | None = None) -> Mask | None:
        """As :meth:`mask_of`, but always of the whole weight."""
        if (owner := owner_of(param)) is not None:
            return owner.mask.within if is_sharded(param) else owner.mask
        return (self.masks if masks is None else masks).get(param)

    def _restricted(self, param: Tensor, mask: Mask) -> Mask:
        piece = piece_of(param)
        if piece is None:
            return mask
        whole, part = self._parts.get(param, (None, None))
        if whole is not mask or part is None or part.shape != piece.size:
            part = mask.piece(piece.offset, piece.size)
            self._parts[param] = mask, part
        return part

    def set_masks(self, masks: dict[Tensor, Mask], carry: bool) -> None:
        """Puts masks in force; with ``carry``, what stays active keeps its state."""
        state = self._optimizer.state
        for param in [p for p in parameters_of(self._optimizer.param_groups) if state.get(p)]:
            packed, mask, whole = self.ready(param), self.mask_of(param, masks), self.whole_mask_of(param, masks)
            if same_mask(packed.whole, whole) if is_sharded(param) else same_mask(packed.mask, mask):
                continue
            group = next(g for g in self._optimizer.param_groups if any(p is param for p in g["params"]))
            options = self.options(param, group)
            carried = packed.carried(weight_of(param), mask, options["by_row"]) if carry else None
            # What a projection keeps is of the weight, whatever is active of it.
            kept = {name: value for name, value in state[param].items() if name.startswith(states.PROJECTION)}
            # Other processes may keep entries of a weight of which this one keeps none.
            if carried is None and (kept or (carry and is_sharded(param) and overlap(packed.whole, whole))):
                leaf = param if is_compact(param) else None
                carried = ParameterState.new(weight_of(param), mask, leaf, **options)
            if carried is not None:
                if carried.merged and not packed.merged:
                    warnings.warn(
                        f"parameter {self.name(param)}: its entries have more than {MAX_COHORTS} different step "
                        "counts; from now on nearest counts are taken as the larger one in bias correction",
                        stacklevel=4,
                    )
                carried.kept.update(kept)
                carried.whole, carried.mixed = whole, True
                self.put(param, carried)
            else:
                state.pop(param)
                self.packed.pop(param, None)
        self.masks, self.mismatch = masks, None
        self._parts = {param: parts for param, parts in self._parts.items() if param in masks}

    # States.

    def options(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """What a step of ``param`` in ``group`` asks of its state."""
        narrow, leaf = param.dtype in (torch.bfloat16, torch.float16), is_compact(param)
        own = list(parameters_of(self._optimizer.param_groups))
        number, piece = next(i for i, p in enumerate(own) if p is param), piece_of(param)
        return {
            "amsgrad": bool(group["amsgrad"]),
            "master": bool(group["master_weights"]) if narrow else leaf,
            # No two pieces of a weight are rounded by the same random bits.
            "seed": number if piece is None else number + len(own) * piece.number,
            "compact_grad": leaf,
            "by_row": group["second_moment"] == "row" and (piece is None or piece.has_rows),
        }

    def ready(self, param: Tensor, group: Mapping[str, Any] | None = None) -> ParameterState:
        """The state of ``param``: made if there is none, packed again if its tensors were replaced.

        Args:
            group: the parameter group whose options it is to have; None: those that it has.

        Raises:
            RuntimeError: it would have to be made while a CUDA graph is captured.
            ValueError: tensors that do not belong together, or that were made under another mask.
        """
        shown, packed = self._optimizer.state.get(param), self.packed.get(param)
        if not shown:
            assert group is not None, "a state is made for a step only"
            self.refuse_capture(param)
            leaf = param if is_compact(param) else None
            options = self.options(param, group)
            made = ParameterState.new(weight_of(param), self.mask_of(param), leaf, **options)
            made.whole = self.whole_mask_of(param)
            return self.put(param, made)
        if packed is not None and packed.layout.compact_grad and owner_of(param) is None:
            raise ValueError(
                f"parameter {self.name(param)}: it was the leaf of an ActiveLinear that has been restored; make a new "
                "optimizer"
            )
        own = {"amsgrad": "max_exp_avg_sq" in shown, "master_weights": "master" in shown, "second_moment": "entry"}
        options = self.options(param, group or own)
        if group is None:
            options["master"] = own["master_weights"]
            options["by_row"] = shown["exp_avg_sq"].shape != shown["exp_avg"].shape
        if packed is not None and packed.is_shown_in(shown):
            layout = replace(packed.layout, amsgrad=options["amsgrad"], master=options["master"])
            if packed.layout == layout.by_rows(options["by_row"]):
                self._follow_leaf(param, packed)
                return packed
        self.refuse_capture(param)
        known, packed = packed, self._read(param, shown, options)
        packed.whole = self.whole_mask_of(param) if known is None else known.whole
        packed.mixed = known is None or known.mixed
        # A copy of the optimizer without its model has lost whose the leaves are; their indices would be out of range.
        if group is not None and (mismatch := self._mismatch_of(param, packed)):
            raise ValueError(mismatch)
        return self.put(param, packed)

    def is_emptied(self, param: Tensor) -> bool:
        """Whether it had a state that somebody else has taken away, unless `forget_emptied` was called since."""
        return param in self.packed and not self._optimizer.state.get(param)

    def forget_emptied(self) -> None:
        """Has states that were taken away begin anew."""
        self.packed = {param: packed for param, packed in self.packed.items() if self._optimizer.state.get(param)}

    def read(self, param: Tensor, entries: Mapping[str, Tensor], options: Mapping[str, Any]) -> ParameterState:
        """The state that a checkpoint holds for ``param``, not yet put in force."""
        piece = piece_of(param)
        if piece is None:
            return self._read(param, entries, options)
        owner = split_owner_of(param)
        with self._naming(param):
            given = entries if owner is None else part_of_leaf(entries, owner.mask)
            part, whole, mixed = part_of(given, piece, param)
        packed = self._read(param, part, options)
        packed.whole, packed.mixed = whole, mixed
        packed.leaf = part.get("master") if owner is not None and not packed.layout.master else None
        return packed

    def _read(self, param: Tensor, entries: Mapping[str, Tensor], options: Mapping[str, Any]) -> ParameterState:
        with self._naming(param):
            return ParameterState.read(weight_of(param), entries, **options)

    @contextmanager
    def _naming(self, param: Tensor) -> Iterator[None]:
        """Has errors say whose state it is."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"state of parameter {self.name(param)}: {error}") from error

    def saved(self) -> dict[int, dict[str, Any]]:
        """The states as checkpoints have them, by the numbers of the parameters."""
        result = {}
        for i, param in enumerate(parameters_of(self._optimizer.param_groups)):
            if entries := self._optimizer.state.get(param):
                piece = piece_of(param)
                if piece is None:
                    result[i] = counts.packed(entries)
                else:
                    whole = whole_entries(self.ready(param), self._optimizer.state[param], piece, param)
                    owner = split_owner_of(param)
                    result[i] = whole if owner is None else of_layer(whole, owner.mask, param)
        return result

    def put(self, param: Tensor, packed: ParameterState) -> ParameterState:
        """Puts a state in force, and shows it."""
        self.packed[param] = packed
        self._optimizer.state[param] = packed.shown()
        if packed.leaf is not None:
            weight_of(param).copy_(packed.leaf)
            packed.leaf = None
        if self._is_master(param, packed):
            param.data = packed.views["master"]
        return packed

    def find_mismatch(self) -> None:
        """Looks for a state that was made under another mask than is in force."""
        found = (self._mismatch_of(param, packed) for param, packed in self.packed.items())
        self.mismatch = next(filter(None, found), None)

    def refuse_mismatch(self) -> None:
        if self.mismatch:
            raise ValueError(self.mismatch)

    def refuse_capture(self, param: Tensor) -> None:
        """Raises a RuntimeError if the state of ``param`` cannot be made now."""
        if states.is_capturing(param):
            raise RuntimeError(
                f"parameter {self.name(param)}: its state would be made inside the CUDA graph that is being captured, "
                "and each replay would set it back to what it is now; take at least one step before the capture"
            )

    def _follow_leaf(self, param: Tensor, packed: ParameterState) -> None:
        """Makes a leaf whose data were replaced one tensor with its master again, with its values."""
        moved = param.device != packed.buffer.device  # which is refused before the step
        if not moved and self._is_master(param, packed) and param.data_ptr() != packed.views["master"].data_ptr():
            self.refuse_capture(param)
            packed.views["master"].copy_(param)
            param.data = packed.views["master"]

    def _is_master(self, param: Tensor, packed: ParameterState) -> bool:
        """Whether ``param`` is a leaf that is one tensor with the master of its state."""
        mask = self.mask_of(param) if packed.is_leaf(param) else None
        if mask is None:
            return False
        if packed.same_as is not mask and same_mask(packed.mask, mask):
            packed.same_as = mask
        return packed.same_as is mask

    def _mismatch_of(self, param: Tensor, packed: ParameterState) -> str | None:
        mine, loaded = self.whole_mask_of(param), packed.whole if is_sharded(param) else packed.mask
        if same_mask(mine, loaded):
            return None
        return (
            f"parameter {self.name(param)}: its loaded state was made under {loaded or 'no mask'}, but this optimizer "
            f"has {mine or 'no mask'}{_difference(loaded, mine)}; call set_masks with the masks to go on with"
        )


def _difference(loaded: Mask | None, mine: Mask | None) -> str:
    """The rows or columns that one of two masks has and the other does not, where both are of one kind and shape."""
    for kind, what in ((RowMask, "rows"), (ColumnMask, "columns")):
        if isinstance(loaded, kind) and isinstance(mine, kind) and loaded.shape == mine.shape:
            theirs, own = set(loaded.index.tolist()), set(mine.index.tolist())
            if theirs == own:
                return f" of the same {what}, with other gains"
            parts = [
                f"{', '.join(map(str, sorted(only)[:5]))}{', …' if len(only) > 5 else ''} in {where} alone"
                for only, where in ((theirs - own, "the loaded one"), (own - theirs, "this one"))
                if only
            ]
            return f" ({what} {'; '.join(parts)})"
    return ""
