"""The compact state of one parameter: made, taken from a checkpoint, and carried from one mask to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from sparse_cl.layout import (
    COLUMNS,
    DENSE,
    INDEX_NAME,
    MAX_COHORTS,
    PER_ENTRY,
    PER_UNIT,
    ROWS,
    SHARED,
    StateLayout,
    state_dtype,
)
from sparse_cl.masks import Mask, from_sections
from sparse_cl.reference import active_positions

from . import counts

#: Entries of a parameter's state that belong to its projection begin with this.
PROJECTION = "projection."

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass
class ParameterState:
    """The state of one parameter in one buffer.

    Attributes:
        layout: how the buffer is divided.
        buffer: uint8, what the op gets.
        views: its sections as typed tensors, by the names that ``optimizer.state[p]`` shows.
        kept: what the parameter's projection keeps, by names that begin with ``PROJECTION``.
        merged: whether some step counts were too many to be carried, and taken as their neighbours.
        same_as: a mask that was found equal to :attr:`mask`. Comparing them waits for the device.
        whole: of a parameter that is split over processes, the mask of the whole weight; :attr:`mask` is of the part.
        mixed: whether entries of such a parameter may differ in their step counts, in this process or in another.
        leaf: what a split leaf is to become when a loaded state is put in force.
    """

    layout: StateLayout
    buffer: Tensor
    views: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)
    merged: bool = False
    same_as: Mask | None = None
    whole: Mask | None = None
    mixed: bool = False
    leaf: Tensor | None = None

    def __post_init__(self) -> None:
        # torch.save refuses views of several dtypes of one storage, and pickle writes the storage once per view. So
        # each view gets a storage of its own over the same memory, which it keeps alive.
        self.views = {name: from_dlpack(to_dlpack(view)) for name, view in self.views.items()}

    @classmethod
    def new(cls, weight: Tensor, mask: Mask | None, leaf: Tensor | None = None, **options: Any) -> ParameterState:
        """Zero moments, step count 0, and with the option ``master`` a copy of the active entries.

        Args:
            weight: what is stepped; the state lies on its device.
            mask: its active entries; None: all.
            leaf: where there is a compact leaf, the master is a copy of it instead.
            options: ``amsgrad``, ``master``, ``seed`` and others of the layout; ``by_row`` where it is possible.
        """
        layout = layout_for(weight, mask, **options)
        state = cls(layout, *layout.allocate(weight.device))
        for name, section in {} if mask is None else mask.sections().items():
            state.views[name].copy_(section)
        if layout.master:
            state.views["master"].copy_(state.active(weight) if leaf is None else leaf)
        return state

    @classmethod
    def read(cls, weight: Tensor, entries: Mapping[str, Tensor], **options: Any) -> ParameterState:
        """Copies the tensors of a checkpoint, ours or ``torch.optim.AdamW``'s, to the device of ``weight``.

        Args:
            entries: as :meth:`shown` or a checkpoint has them.

        Raises:
            ValueError: a section is missing, or has another shape than the weight and its mask imply.
        """
        saved, entries = entries, counts.unpacked(entries)
        if missing := {"step", "exp_avg", "exp_avg_sq"} - entries.keys():
            raise ValueError(f"state has no {', '.join(sorted(missing))}")
        kind = next((kind for kind, name in INDEX_NAME.items() if name in entries), DENSE)
        by_unit = kind in (ROWS, COLUMNS)
        units = entries[INDEX_NAME[kind] if by_unit else "exp_avg"].numel()
        step, cohort, scope = torch.as_tensor(entries["step"]), entries.get("cohort"), SHARED
        if cohort is not None:
            if cohort.numel() and int(cohort.max()) >= step.numel():
                raise ValueError(f"cohort: expected numbers below {step.numel()}, one for each count in step")
            scope = PER_UNIT if by_unit and cohort.numel() == units else PER_ENTRY
        elif step.numel() != 1:
            raise ValueError(f"step: expected one count where there is no cohort, got {step.numel()}")
        options |= {"gain": "gain" in entries, "cohorts": step.numel(), "cohort_scope": scope}
        asked = options.pop("by_row", False)
        layout = StateLayout(kind, tuple(weight.shape), units, state_dtype(weight.dtype), **options).by_rows(asked)
        kept = {k: v.to(weight.device, copy=True) for k, v in entries.items() if k.startswith(PROJECTION)}
        state = cls(layout, *layout.allocate(weight.device), kept)
        for name, view in state.views.items():
            if name in entries:
                given = torch.as_tensor(entries[name])
                if name == "exp_avg_sq":
                    given = by_row_or_entry(given, view.shape)
                flat = name == "step" or (name == "cohort" and counts.NAME in saved)
                if given.shape != view.shape and not (flat and given.numel() == view.numel()):
                    raise ValueError(f"{name}: expected shape {tuple(view.shape)}, got {tuple(given.shape)}")
                view.copy_(given.view(view.shape))
            elif name == "max_exp_avg_sq":
                view.copy_(state.views["exp_avg_sq"])
            elif name == "master":
                view.copy_(state.active(weight))
            else:
                raise ValueError(f"state has no {name}")
        return state

    def shown(self) -> dict[str, Tensor]:
        """What ``optimizer.state[p]`` is to be; :meth:`read` takes it back."""
        return {**self.views, **self.kept}

    def is_shown_in(self, entries: Mapping[str, Tensor]) -> bool:
        """Whether nobody has replaced one of these tensors."""
        return all(entries.get(name) is view for name, view in self.views.items())

    @property
    def mask(self) -> Mask | None:
        """The mask that the state was made for, sharing its memory; None for a dense state."""
        return None if self.layout.kind == DENSE else from_sections(self.layout.kind, self.layout.shape, self.views)

    def is_leaf(self, param: Tensor) -> bool:
        """Whether ``param``, whose state this is, is a leaf that serves as the master."""
        return self.layout.compact_grad and self.layout.master and param.dtype == self.layout.dtype

    def active(self, weight: Tensor) -> Tensor:
        """The active entries of ``weight`` in the compact shape: a copy, but of a dense state ``weight`` itself."""
        kind = self.layout.kind
        if kind == DENSE:
            return weight
        if kind in (ROWS, COLUMNS):
            return weight.index_select(0 if kind == ROWS else 1, self.views[INDEX_NAME[kind]])
        return weight.reshape(-1)[self.positions()].view(self.layout.compact_shape)

    def wide(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The active entries in the dtype of the moments, and all of ``weight`` with them; not of single weights."""
        kind, dtype = self.layout.kind, self.layout.dtype
        active = self.views["master"] if self.layout.master else self.active(weight).to(dtype)
        if kind == DENSE:
            return active, active
        index = self.views[INDEX_NAME[kind]].long()
        return active, weight.to(dtype).index_copy(0 if kind == ROWS else 1, index, active)

    def positions(self) -> Tensor:
        """int64: flat positions of the active entries, ascending."""
        return active_positions(self.layout, self.views, self.buffer.device)

    def carried(self, weight: Tensor, mask: Mask | None, by_row: bool = False) -> ParameterState | None:
        """The state under a new mask: entries active before and after keep moments, master and step count.

        Where rows have one second moment, ``by_row``, the entries that come to a row share its count as well: by a
        count of their own, the second moment that they find would be taken for one that has only begun.

        Returns None if no entry is active in both.
        """
        options: dict[str, Any] = {
            name: getattr(self.layout, name) for name in ("amsgrad", "master", "seed", "compact_grad")
        }
        options["by_row"] = by_row
        target = layout_for(weight, mask, **options)
        sections = {} if mask is None else {k: v.to(weight.device) for k, v in mask.sections().items()}
        by_unit = self.layout.kind == target.kind in (ROWS, COLUMNS) and self.layout.cohort_scope != PER_ENTRY
        by_unit = by_unit and self.layout.by_row == target.by_row
        if by_unit:
            old, new = (part[INDEX_NAME[target.kind]].long() for part in (self.views, sections))
        else:
            old, new = self.positions(), active_positions(target, sections, weight.device)
        if old.numel() == 0 or new.numel() == 0:
            return None
        source = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
        kept = old[source] == new
        if not bool(kept.any()):
            return None

        steps = torch.where(kept, self.step_counts(by_unit)[source], 0)
        if target.by_row and not by_unit:
            steps = steps.view(target.compact_shape).amax(1, keepdim=True).expand(target.compact_shape).reshape(-1)
        table, cohort = cohorts_of(steps)
        merged = self.merged or bool((table[cohort] != steps).any())
        scope = SHARED if table.numel() == 1 else PER_UNIT if by_unit else PER_ENTRY
        if scope == PER_ENTRY and target.kind in (ROWS, COLUMNS):
            scope, cohort = by_unit_if_uniform(target, cohort)
        fresh = ParameterState.new(weight, mask, **options, cohorts=table.numel(), cohort_scope=scope)
        fresh.merged = merged
        fresh.views["step"].copy_(table.view(fresh.views["step"].shape))
        if scope != SHARED:
            fresh.views["cohort"].copy_(cohort.view(fresh.views["cohort"].shape))
        to, dim = kept.nonzero().view(-1), 1 if by_unit and target.kind == COLUMNS else 0
        for name in (*MOMENTS, "master"):
            if name in fresh.views:
                before, after = self.views[name], fresh.views[name]
                if by_unit:
                    after.index_copy_(dim, to, before.index_select(dim, source[to]))
                    continue
                of_rows = name == "exp_avg_sq" and target.by_row
                flat = after.new_zeros(target.entries) if of_rows else after.view(-1)
                flat[to] = before.expand(self.layout.compact_shape).reshape(-1)[source[to]]
                if of_rows:
                    shared = kept.view(target.compact_shape).sum(1, keepdim=True).clamp_(min=1)
                    after.copy_(flat.view(target.compact_shape).sum(1, keepdim=True, dtype=torch.float64) / shared)
        return fresh

    def step_counts(self, by_unit: bool) -> Tensor:
        """int64: the step count of each unit or entry."""
        layout, step = self.layout, self.views["step"].long()
        if layout.cohort_scope == SHARED:
            return step.view(1).expand(layout.units if by_unit else layout.entries)
        counts = step[self.views["cohort"].long()]
        if by_unit or layout.cohort_scope == PER_ENTRY:
            return counts.reshape(-1)
        if layout.kind == ROWS:
            counts = counts.view(-1, *[1] * (len(layout.shape) - 1))
        return counts.expand(layout.compact_shape).reshape(-1)


def layout_for(param: Tensor, mask: Mask | None, by_row: bool = False, **options: Any) -> StateLayout:
    """How the state of ``param`` under a mask lies in memory."""
    if mask is not None:
        return mask.layout(param.dtype, **options).by_rows(by_row)
    shape = tuple(param.shape)
    return StateLayout(DENSE, shape, math.prod(shape), state_dtype(param.dtype), **options).by_rows(by_row)


def by_row_or_entry(moment: Tensor, shape: torch.Size) -> Tensor:
    """A second moment of each row of a matrix as one of each entry, or the other way, where ``shape`` asks for it."""
    if moment.dim() == len(shape) == 2 and moment.shape[0] == shape[0]:
        if shape[1] == 1:
            return moment.mean(1, keepdim=True)
        if moment.shape[1] == 1:
            return moment.expand(shape)
    return moment


def is_capturing(param: Tensor) -> bool:
    """Whether what is made for ``param`` now would be made anew by each replay of a CUDA graph."""
    return param.is_cuda and torch.cuda.is_current_stream_capturing()


def cohorts_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct counts, and for each entry which of them it has.

    At most ``MAX_COHORTS`` fit. Past that, the two counts that are nearest by ratio are taken as the larger one: bias
    correction changes at most in proportion.
    """
    table, cohort = counts.unique(return_inverse=True)
    while table.numel() > MAX_COHORTS:
        nearest = int(((table[1:] + 1) / (table[:-1] + 1)).argmin())
        table = torch.cat([table[:nearest], table[nearest + 1 :]])
        cohort = cohort - (cohort > nearest).to(cohort.dtype)
    return table, cohort


def by_unit_if_uniform(layout: StateLayout, cohort: Tensor) -> tuple[int, Tensor]:
    shaped = cohort.view(layout.compact_shape)
    shaped = shaped.reshape(layout.units, -1) if layout.kind == ROWS else shaped.t()
    first = shaped[:, :1]
    if bool((shaped == first).all()):
        return PER_UNIT, first.reshape(-1)
    return PER_ENTRY, cohort
