"""The state of one parameter: made, taken from a checkpoint, and carried from one mask to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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

#: Entries of a parameter's state that belong to its projection begin with this.
PROJECTION = "projection."

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass
class ParameterState:
    """A state buffer, its layout, and what ``optimizer.state[p]`` shows: typed views, and what a projection keeps."""

    layout: StateLayout
    buffer: Tensor
    views: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)
    same_as: Mask | None = None  # found equal to the state's mask, kept since to compare them waits for the device

    def __post_init__(self):
        # torch.save refuses views of several dtypes of one storage, and pickle writes the storage once a view. So
        # each view gets a storage of its own over the same memory, which it keeps alive.
        self.views = {name: from_dlpack(to_dlpack(view)) for name, view in self.views.items()}

    def is_leaf(self, param: Tensor) -> bool:
        """Whether ``param``, whose state this is, is a leaf that serves as the master."""
        return self.layout.compact_grad and self.layout.master and param.dtype == self.layout.dtype

    @property
    def mask(self) -> Mask | None:
        return mask_of(self.layout, self.views)


def mask_of(layout: StateLayout, views: Mapping[str, Tensor]) -> Mask | None:
    """The mask that a state was made for, sharing its memory; None for a dense state."""
    return None if layout.kind == DENSE else from_sections(layout.kind, layout.shape, views)


def is_capturing(param: Tensor) -> bool:
    """Whether what is made for ``param`` now would be made anew by each replay of a CUDA graph."""
    return param.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_capture(param: Tensor, name: Callable[[Tensor], str]) -> None:
    """Raises a RuntimeError if the state of ``param`` cannot be made now."""
    if is_capturing(param):
        raise RuntimeError(
            f"parameter {name(param)}: its state would be made inside the CUDA graph that is being captured, and each "
            "replay would set it back to what it is now; take at least one step before the capture"
        )


def layout_for(param: Tensor, mask: Mask | None, **options) -> StateLayout:
    if mask is not None:
        return mask.layout(param.dtype, **options)
    shape = tuple(param.shape)
    return StateLayout(DENSE, shape, math.prod(shape), state_dtype(param.dtype), **options)


def new_state(param: Tensor, mask: Mask | None, leaf: Tensor | None = None, **options) -> ParameterState:
    """Zero moments, step count 0, and a master copy (option ``master``) of the active entries of ``param``.

    Where there is a compact ``leaf``, the master is a copy of that.
    """
    layout = layout_for(param, mask, **options)
    buffer, views = layout.allocate(param.device)
    if mask is not None:
        for name, section in mask.sections().items():
            views[name].copy_(section)
    if layout.master:
        views["master"].copy_(compact(param, layout, views) if leaf is None else leaf)
    return ParameterState(layout, buffer, views)


def read_state(param: Tensor, entries: Mapping[str, Tensor], **options) -> ParameterState:
    """A state from the tensors of a checkpoint, ours or ``torch.optim.AdamW``'s.

    They are copied to ``param``'s device.

    Raises:
        ValueError: a section is missing or has another shape than the parameter and its mask imply.
    """
    missing = {"step", "exp_avg", "exp_avg_sq"} - entries.keys()
    if missing:
        raise ValueError(f"state has no {', '.join(sorted(missing))}")
    kind = next((kind for kind, name in INDEX_NAME.items() if name in entries), DENSE)
    step = torch.as_tensor(entries["step"])
    cohort = entries.get("cohort")
    index = entries.get(INDEX_NAME.get(kind))
    units = index.numel() if kind in (ROWS, COLUMNS) else entries["exp_avg"].numel()
    scope = SHARED
    if cohort is None and step.numel() != 1:
        raise ValueError(f"step: expected one count where there is no cohort, got {step.numel()}")
    if cohort is not None:
        if cohort.numel() and int(cohort.max()) >= step.numel():
            raise ValueError(f"cohort: expected numbers below {step.numel()}, one for each count in step")
        scope = PER_UNIT if kind in (ROWS, COLUMNS) and cohort.numel() == units else PER_ENTRY
    layout = StateLayout(
        kind,
        tuple(param.shape),
        units,
        state_dtype(param.dtype),
        gain="gain" in entries,
        cohorts=step.numel(),
        cohort_scope=scope,
        **options,
    )
    buffer, views = layout.allocate(param.device)
    for name, view in views.items():
        if name in entries:
            given = torch.as_tensor(entries[name])
            if given.shape != view.shape and not (name == "step" and given.numel() == view.numel()):
                raise ValueError(f"{name}: expected shape {tuple(view.shape)}, got {tuple(given.shape)}")
            view.copy_(given.view(view.shape))
        elif name == "max_exp_avg_sq":
            view.copy_(views["exp_avg_sq"])
        elif name == "master":
            view.copy_(compact(param, layout, views))
        else:
            raise ValueError(f"state has no {name}")
    kept = {k: v.to(param.device, copy=True) for k, v in entries.items() if k.startswith(PROJECTION)}
    return ParameterState(layout, buffer, views, kept)


def carry_state(param: Tensor, old: ParameterState, mask: Mask | None) -> ParameterState | None:
    """The state under a new mask: entries active before and after keep moments, master and step count.

    Returns None if no entry is active in both.
    """
    bare = replace(old.layout, cohorts=1, cohort_scope=SHARED)
    options = {name: getattr(bare, name) for name in ("amsgrad", "master", "seed", "compact_grad")}
    target = layout_for(param, mask, **options)
    by_unit = old.layout.kind == target.kind and target.kind in (ROWS, COLUMNS) and old.layout.cohort_scope != PER_ENTRY
    if by_unit:
        name = INDEX_NAME[target.kind]
        old_ids, new_ids = old.views[name].long(), mask.index.to(param.device).long()
        dim = 0 if target.kind == ROWS else 1
    else:
        sections = {} if mask is None else {k: v.to(param.device) for k, v in mask.sections().items()}
        old_ids = active_positions(old.layout, old.views, param.device)
        new_ids = active_positions(target, sections, param.device)
        dim = 0
    if old_ids.numel() == 0 or new_ids.numel() == 0:
        return None
    source = torch.searchsorted(old_ids, new_ids).clamp_(max=old_ids.numel() - 1)
    kept = old_ids[source] == new_ids
    if not bool(kept.any()):
        return None

    counts = torch.where(kept, step_counts(old, by_unit)[source], 0)
    table, cohort = _cohorts(counts)
    scope = SHARED if table.numel() == 1 else PER_UNIT if by_unit else PER_ENTRY
    if scope == PER_ENTRY and target.kind in (ROWS, COLUMNS):
        scope, cohort = _by_unit_if_uniform(target, cohort)
    fresh = new_state(param, mask, **options, cohorts=table.numel(), cohort_scope=scope)
    fresh.views["step"].copy_(table.view(fresh.views["step"].shape))
    if scope != SHARED:
        fresh.views["cohort"].copy_(cohort.view(fresh.views["cohort"].shape))

    to = kept.nonzero().view(-1)
    for name in (*_MOMENTS, "master"):
        if name in fresh.views:
            before, after = old.views[name], fresh.views[name]
            if not by_unit:
                before, after = before.view(-1), after.view(-1)
            after.index_copy_(dim, to, before.index_select(dim, source[to]))
    return fresh


def compact(param: Tensor, layout: StateLayout, views: Mapping[str, Tensor]) -> Tensor:
    """The active entries of ``param`` in the compact shape: a copy, but for a dense layout ``param`` itself."""
    if layout.kind == DENSE:
        return param
    if layout.kind in (ROWS, COLUMNS):
        return param.index_select(0 if layout.kind == ROWS else 1, views[INDEX_NAME[layout.kind]])
    return param.reshape(-1)[active_positions(layout, views, param.device)].view(layout.compact_shape)


def step_counts(old: ParameterState, by_unit: bool) -> Tensor:
    """int64: step count of each unit or entry of a state."""
    layout, step = old.layout, old.views["step"].long()
    size = layout.units if by_unit else layout.entries
    if layout.cohort_scope == SHARED:
        return step.view(1).expand(size)
    counts = step[old.views["cohort"].long()]
    if by_unit or layout.cohort_scope == PER_ENTRY:
        return counts.reshape(-1)
    if layout.kind == ROWS:
        counts = counts.view(-1, *[1] * (len(layout.shape) - 1))
    return counts.expand(layout.compact_shape).reshape(-1)


def _cohorts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct counts, and for each entry which of them it has.

    At most ``MAX_COHORTS`` fit. Past that, the two counts nearest to each other by ratio are taken as the larger:
    bias correction goes at most with the ratio.
    """
    table, cohort = counts.unique(return_inverse=True)
    while table.numel() > MAX_COHORTS:
        nearest = int(((table[1:] + 1) / (table[:-1] + 1)).argmin())
        table = torch.cat([table[:nearest], table[nearest + 1 :]])
        cohort = cohort - (cohort > nearest).to(cohort.dtype)
    return table, cohort


def _by_unit_if_uniform(layout: StateLayout, cohort: Tensor) -> tuple[int, Tensor]:
    shaped = cohort.view(layout.compact_shape)
    shaped = shaped.reshape(layout.units, -1) if layout.kind == ROWS else shaped.t()
    first = shaped[:, :1]
    if bool((shaped == first).all()):
        return PER_UNIT, first.reshape(-1)
    return PER_ENTRY, cohort
