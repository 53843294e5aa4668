"""AdamW whose updates pass projections."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import ParamsT

from sparse_cl import ops
from sparse_cl.layout import state_dtype
from sparse_cl.masks import Mask

from .leaf import weight_of
from .names import ByParameter, by_param, names_of
from .plan import Call, Plan, scalar_on
from .projected_step import ProjectedCall, Scratch, products, split, starts_of
from .projection import Fitted, Projection
from .sparse_masked_adamw import SparseMaskedAdamW
from .state import PROJECTION, ParameterState, is_capturing

Given = dict[Tensor, Projection]

#: Of a group: how many steps its weights have taken since they were corrected, the sum of their rates, and which moved.
_SINCE = "since_correction"


class ProjectedAdamW(SparseMaskedAdamW):
    """AdamW that projects each parameter's full update, weight decay included.

    A projection acts on the float32 master, after AdamW. Projecting the gradient instead is not enough: AdamW divides
    entry by entry, which rotates the gradient back into what was projected out. A parameter without a projection, or
    whose projection takes nothing, is stepped as by :class:`SparseMaskedAdamW`.

    An update is made and corrected in a scratch, and only then added: at every moment the parameters hold weights. The
    scratch takes 64 MB per device, or what its largest projected parameter takes in the dtype of its moments.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, masks, master_weights: as for
            :class:`SparseMaskedAdamW`.
        projections: ``{parameter or its name: projection}``, each a :class:`SubspaceProjection`, :class:`LowRankPull`,
            :class:`DriftBudget`, :class:`CurvatureProjection`, or any other ``Projection``.
        rest: what happens to parameters without a projection once some projection takes anything: ``"freeze"`` or
            ``"train"``.

    Raises:
        TypeError, ValueError: as there; a projection that does not fit its parameter's shape, device or mask.
    """

    _argument = "projections"  # where they come from, for messages
    _captured: tuple = ()
    _every = 1  # of projections that correct later: after so many steps

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        projections: ByParameter[Projection] | None = None,
        rest: str = "freeze",
        **options: Any,
    ) -> None:
        if rest not in ("freeze", "train"):
            raise ValueError(f"rest: expected 'freeze' or 'train', got {rest!r}")
        self._rest = rest
        self._given: Given = {}
        self._projections: dict[Tensor, Fitted] = {}  # those that take anything
        self._warned: set[str] = set()
        self._scratch = Scratch()
        self._seen: tuple | None = None
        super().__init__(params, *arguments, **options)
        self.set_projections(projections or {})

    @property
    def projections(self) -> dict[Tensor | str, Projection]:
        """The projections in force: by name if the parameters are named, else by parameter."""
        names = names_of(self.param_groups)
        return {names.get(p, p): projection for p, projection in self._given.items()}

    def set_projections(self, projections: ByParameter[Projection]) -> None:
        """Replaces all projections; moments and step counts stay.

        What a replaced projection had kept in the parameter's state is dropped.

        Raises:
            TypeError, ValueError: as the constructor; the optimizer is as before then.
        """
        given = by_param(self.param_groups, projections, "projections", "projection")
        for param, projection in given.items():
            if not isinstance(projection, Projection):
                raise TypeError(
                    f"projections: parameter {self._store.name(param)}: expected a projection (SubspaceProjection, "
                    f"LowRankPull, DriftBudget, CurvatureProjection), got {type(projection).__name__}"
                )
        self._take(given, self._fit(given, "projections"))

    def set_masks(self, masks: ByParameter[Mask], carry: str = "intersection") -> None:
        given = self._current()
        fitted = self._fit(given, "masks", self._store.resolve(masks))
        for param, fit in fitted.items():
            old = self._projections.get(param)
            if old is not None and self._kept(param) and not fit.continues(old):
                raise ValueError(
                    f"masks: parameter {self._store.name(param)} has moved under its ColumnMask, and its projection "
                    "knows these columns alone; keep the mask, or begin a new domain by setting the projections anew"
                )
        super().set_masks(masks, carry)
        self._take(given, fitted, begins=False)

    set_masks.__doc__ = SparseMaskedAdamW.set_masks.__doc__

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._seen = self._unsure()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_rest", "_given", "_projections", "_warned", "_every")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_seen": self._unsure()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = Scratch()

    # Which projections are in force.

    @property
    def protects(self) -> bool:
        """Whether anything is projected or pulled."""
        return bool(self._projections)

    def _current(self) -> Given:
        """The projections that are to be in force now."""
        return self._given

    def _facts(self) -> tuple:
        """What :meth:`_current` and its fit depend on besides parameters and masks."""
        return (next((p.device for group in self.param_groups for p in group["params"]), None),)

    def _unsure(self) -> tuple | None:
        """Facts that make the next step look anew, but not begin a domain."""
        return None if self._seen is None else (None, *self._seen[1:])

    def _fit(self, given: Given, argument: str, masks: Mapping[Tensor, Mask] | None = None) -> dict[Tensor, Fitted]:
        fitted = {}
        for param, projection in given.items():
            try:
                fitted[param] = projection.fitted(param, self._store.mask_of(param, masks))
            except ValueError as error:
                raise ValueError(f"{argument}: parameter {self._store.name(param)} {error}") from None
        return fitted

    def _take(self, given: Given, fitted: dict[Tensor, Fitted], begins: bool = True) -> None:
        """Puts projections in force; with ``begins``, those that are new begin where the weights are."""
        for param in list(self.state) if begins else ():
            # What it kept is of other directions, or of where an earlier domain began; a checkpoint's too.
            if param not in given or given[param] is not self._given.get(param):
                for name in self._kept(param):
                    del self.state[param][PROJECTION + name]
        if begins:
            self._store.forget_emptied()
        self._given = given
        self._projections = {param: fit for param, fit in fitted.items() if given[param].any}
        for param, fit in self._projections.items():
            name = self._store.name(param)
            if not fit.free and name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"parameter {name}: {fit.spent}, so it is not updated any more", stacklevel=4)
        self._group_plans, self._scratch, self._seen = {}, Scratch(), self._facts()
        for group in self.param_groups if begins else ():
            group.pop(_SINCE, None)

    def _is_rest(self, param: Tensor) -> bool:
        return param not in self._given

    def _ruled(self) -> Iterable[Tensor]:
        return chain(super()._ruled(), self._given)

    # A step.

    def state_dict(self) -> dict[str, Any]:
        if self._seen is not None and self._seen[1:] != self._facts()[1:]:
            self._follow()  # or a checkpoint would hold where the domain before began
        return super().state_dict()

    def _follow(self) -> None:
        if self._seen != self._facts():
            given = self._current()
            # A parameter may be on another device, while what is given is what it was.
            begins = self._seen is not None and self._seen[1:] != self._facts()[1:]
            self._take(given, self._fit(given, self._argument), begins)

    def _gathered(self) -> list[Call]:
        self._follow()
        return super()._gathered()

    def _said(self) -> dict[str, str]:
        return {f"the projection of {self._store.name(p)}": fit.said for p, fit in self._projections.items()}

    def _takes_part(self, param: Tensor) -> bool:
        if not super()._takes_part(param):
            return False
        if param in self._projections:
            return self._projections[param].free
        return not (self._rest == "freeze" and self._projections and self._is_rest(param))

    def _ready(self, param: Tensor, group: dict[str, Any]) -> ParameterState:
        projection = self._projections.get(param)
        shapes = {} if projection is None else projection.shapes(tuple(weight_of(param).shape))
        if shapes and self._store.is_emptied(param):
            raise RuntimeError(
                f"state of parameter {self._store.name(param)}: it was emptied within a domain, and with it where the "
                f"weight began; load a checkpoint, or begin a new domain by setting the {self._argument} anew"
            )
        packed = super()._ready(param, group)
        if projection is None:
            return packed
        own = self.state[param]
        if other := [name for name in ("moved", "origin") if PROJECTION + name in own and name not in shapes]:
            raise ValueError(
                f"state of parameter {self._store.name(param)}: {PROJECTION}{other[0]}: it was made with another "
                "`every`, which counts otherwise how far a weight has moved; go on with the same one"
            )
        rounds = param.dtype.itemsize == 2 and not packed.layout.master
        if rounds and projection.bounds and not projection.later:
            raise ValueError(
                f"state of parameter {self._store.name(param)}: it is {param.dtype} without a master, and rounding its "
                "steps would break the budget; take master_weights=True, or every=2, which reads the weights"
            )
        missing = [name for name in shapes if PROJECTION + name not in own]
        if missing:
            self._store.refuse_capture(param)
            begun = projection.begin(weight_of(param), packed.layout.dtype)
            for name in missing:
                zeros = torch.zeros(shapes[name], dtype=packed.layout.dtype, device=param.device)
                own[PROJECTION + name] = begun.get(name, zeros)
        for name, shape in shapes.items():
            found = tuple(own[PROJECTION + name].shape)
            if found != shape:
                raise ValueError(
                    f"state of parameter {self._store.name(param)}: {PROJECTION}{name}: expected shape {shape}, got "
                    f"{found}; it was made by another projection"
                )
        return packed

    def _split(self, params: list[Tensor], positions: list[int]) -> list[list[int]]:
        together = [i for i in positions if params[i] not in self._projections]
        calls = [together] if together else []
        # What can share a call lies side by side, and what is corrected alike next to each other.
        by_call: dict[tuple, dict[tuple, list[int]]] = {}
        for i in positions:
            if (fit := self._projections.get(params[i])) is not None:
                call = (fit.exact, fit.later, state_dtype(params[i].dtype))
                by_call.setdefault(call, {}).setdefault((fit.correction, fit.alike), []).append(i)
        for (*_, dtype), found in by_call.items():
            numbers = list(chain.from_iterable(found.values()))
            # By whole weights, so that processes that hold parts of them make the same calls.
            for part in split([_entries(params[i], self._store.whole_mask_of(params[i])) for i in numbers]):
                calls.append([numbers[n] for n in part])
                own = [_entries(weight_of(params[i]), self._store.mask_of(params[i])) for i in calls[-1]]
                self._scratch.reserve(params[numbers[0]].device, dtype, starts_of(own)[1])
        return calls

    def _apply_all(self, calls: list[Call], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        plain: list[Call] = []
        now: list[Call] = []
        late: list[Call] = []
        for call in calls:
            fit = self._projections.get(call.plan.own[0])
            (plain if fit is None else late if fit.later else now).append(call)
        if any(is_capturing(call.plan.params[0]) for call in late):
            raise RuntimeError("every: a CUDA graph repeats one kind of step; take every=1 to capture it")
        super()._apply_all([*plain, *late], grad_scale, found_inf)
        for (exact, device, _), found in self._alike(now).items():
            with products(device, exact):
                self._apply_projected(found, found[0].group["lr"], grad_scale, scalar_on(found_inf, device))
        for group in self.param_groups:
            own = [call for call in late if call.group is group]
            if not own and not any(group.get(_SINCE, ())[2:]):
                continue
            path, others = self._passed(group, [i for call in own for i in call.plan.positions], found_inf)
            if path is None:
                continue
            for (exact, device, _), found in self._alike([*own, *self._waiting(group, others)]).items():
                with products(device, exact):
                    self._apply_projected(found, path)

    def _alike(self, calls: Iterable[Call]) -> dict[tuple[bool, torch.device, int], list[Call]]:
        """Calls by whether they need exact products, their device, and their group."""
        found: dict[tuple[bool, torch.device, int], list[Call]] = {}
        for call in calls:
            exact = self._projections[call.plan.own[0]].exact
            found.setdefault((exact, call.plan.params[0].device, id(call.group)), []).append(call)
        return found

    def _passed(
        self, group: dict[str, Any], stepped: list[int], found_inf: Tensor | None
    ) -> tuple[float | Tensor | None, list[int]]:
        """Counts a step of weights that are corrected later: the sum of the rates since the last time, if it is time,
        and the places of what has moved since and has no gradient now.

        What is counted is in the group, and so in checkpoints. A skipped step counts as one, of rate 0.
        """
        steps, path, *moved = group.get(_SINCE, (0, 0.0))
        lr, steps = group["lr"], steps + 1
        lr = float(lr) if isinstance(lr, Tensor) and lr.device.type == "cpu" else lr
        path = path + (lr if found_inf is None else torch.where(found_inf.reshape(()) == 0, lr, 0.0))
        moved = sorted({*chain.from_iterable(moved), *stepped})
        if steps < self._every:
            group[_SINCE] = (steps, path, moved)
            return None, []
        group[_SINCE] = (0, 0.0, [])
        return path, sorted({*moved} - {*stepped})

    def _waiting(self, group: dict[str, Any], positions: list[int]) -> list[Call]:
        """Calls that correct weights without a gradient. They are rare, so that their plans are not kept."""
        by_device: dict[torch.device, list[int]] = {}
        for i in positions:
            by_device.setdefault(group["params"][i].device, []).append(i)
        calls = []
        for part in chain.from_iterable(self._split(group["params"], found) for found in by_device.values()):
            own = [group["params"][i] for i in part]
            calls.append(Call(group, Plan(own, part, [self._ready(param, group) for param in own], []), []))
        return calls

    def _apply_projected(
        self,
        calls: list[Call],
        lr: float | Tensor,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """The calls of one group on one device."""
        first, later = calls[0].plan.params[0], self._projections[calls[0].plan.own[0]].later
        if isinstance(lr, Tensor):
            lr = float(lr) if lr.device.type == "cpu" else lr.to(first.device, torch.float32).reshape(())
        ready = [self._projected(call.plan) for call in calls]
        if is_capturing(first):
            # Replays read the scratch and what corrections hold, whatever takes their place later.
            self._captured = (*self._captured, ready)
        try:
            for call, projected in zip(calls, ready, strict=True):
                plan = call.plan
                if not later:
                    self._apply(call, grad_scale, found_inf, projected.updates)
                for correction in projected.corrections:
                    correction.correct_(lr, found_inf)
                ops.apply_updates_(plan.params, plan.buffers, projected.updates, plan.layout, found_inf)
                for correction in projected.corrections:
                    correction.settle_()
        finally:
            increment_version(chain.from_iterable(call.plan.written() for call in calls))

    def _kept(self, param: Tensor) -> dict[str, Tensor]:
        """What the parameter's projection keeps, by the names that it gave."""
        own = self.state.get(param, {})
        return {name.removeprefix(PROJECTION): v for name, v in own.items() if name.startswith(PROJECTION)}

    def _projected(self, plan: Plan) -> ProjectedCall:
        buffer = self._scratch.buffer(plan.params[0].device, plan.packed[0].layout.dtype)
        if plan.projected is None or plan.projected.buffer is not buffer:
            kept = [self._kept(param) for param in plan.own]
            plan.projected = ProjectedCall(plan, [self._projections[param] for param in plan.own], kept, buffer)
        return plan.projected


def _entries(weight: Tensor, mask: Mask | None) -> int:
    return weight.numel() if mask is None else mask.numel
