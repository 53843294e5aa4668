"""AdamW that touches only the active entries of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sparse_cl import ops
from sparse_cl.layout import whole
from sparse_cl.masks import Mask

from .clip import clip_active_
from .names import ByParameter, names_of, parameters_of, refuse_lost
from .options import check_options
from .plan import Call, GroupPlan, Plan, key_of, refuse_sparse, scalar_on
from .shards import check_agreement, check_piece, gradient_of
from .state import ParameterState
from .store import StateStore

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SparseMaskedAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) whose parameters may each have a mask.

    Entries outside a mask stay bit-identical, whatever weight decay, momentum or dtype, and cost no state. A parameter
    without a mask is updated densely; one with an empty mask is not updated. Active entries get exactly the update that
    ``torch.optim.AdamW`` gives them, with bias correction by the number of updates that the entry itself has had.
    A parameter's entries may have 256 different numbers; past that nearest ones are merged, and a warning says so.

    Args:
        params: tensors, parameter groups, or ``model.named_parameters()``.
        lr: learning rate, a float or a one-element tensor.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: use the running maximum of the second moment.
        maximize: ascend instead of descend.
        capturable: says that a CUDA graph may capture ``step``. (No step synchronises with the host in any case.) Take
            one step before the capture, which makes the state. Replays follow ``lr`` only if it is a tensor on the GPU.
        masks: ``{parameter or its name: Mask}``. Names need ``named_parameters()``.
        master_weights: keep a float32 copy of the active entries of bfloat16 and float16 parameters. Without it they
            are rounded stochastically after each step. With it, values written into such a parameter from outside
            are overwritten by the next step, since the copy is what is stepped.
        second_moment: ``"entry"``, or ``"row"``: a matrix has one second moment a row, of the mean of its squared
            gradients (Adam-mini, Zhang et al. 2024). The update of a row keeps the direction of its averaged gradient
            then, and the state is half as large. Parameters that are no matrix, that have a mask of other than rows,
            or ``amsgrad``, have one an entry.

    Moments are float32 (float64 for float64 parameters). Gradients may have the parameter's dtype or float32. The state
    of a parameter holds ``step`` (int32); ``exp_avg``, ``exp_avg_sq`` and, if asked for, ``max_exp_avg_sq`` and
    ``master``, each in the mask's compact shape: (k, *rest) for k rows, (m, k) for k columns, (m, n/2) for 2:4, (k,)
    for k elements (by row, ``exp_avg_sq`` is (m, 1) or (k, 1)); and the mask's index (``rows``, ``columns``, ``bits``,
    ``two_four_bits``).

    The leaf of an :class:`~sparse_cl.nn.ActiveLinear` is stepped under that layer's mask and gain, and the values are
    also written into the layer's weight. The leaf itself is its ``master``: one tensor under two names.

    After ``fully_shard(model)`` (FSDP2, HSDP, and tensor parallelism) the call is the same: masks are of whole weights,
    and each process steps the rows or columns that it holds. ``optimizer.state`` then shows its own part, and state
    dicts are for ``torch.distributed.checkpoint``. All processes call the same methods, as in torch.

    Raises:
        TypeError, ValueError: a hyperparameter out of range, a mask of another kind or that fits no parameter, a
            parameter given twice or of a dtype that is not stepped.
    """

    _step_supports_amp_scaling = True
    _agreed = False  # all processes were found to have the same masks and options

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        masks: ByParameter[Mask] | None = None,
        master_weights: bool = True,
        second_moment: str = "entry",
        **refused: Any,
    ) -> None:
        for name, value in refused.items():
            if name not in ("foreach", "fused", "differentiable"):
                raise TypeError(f"{type(self).__name__} has no argument {name!r}")
            if value or (name != "differentiable" and value is not None):
                raise ValueError(f"{name}={value!r} is not supported: every step is one fused op; leave {name} out")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "master_weights": master_weights,
            "second_moment": second_moment,
        }
        check_options(defaults)
        self._store = StateStore(self)
        self._group_plans: dict[int, GroupPlan] = {}
        super().__init__(params, defaults)
        self._store.masks = self._store.resolve(masks or {})

    # What torch.optim.Optimizer asks of a subclass.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = dict(param_group)
        check_options({**self.defaults, **{k: v for k, v in group.items() if k != "params"}})
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if isinstance(group["params"], Iterable) and not isinstance(group["params"], set):
            group["params"] = list(group["params"])
            seen = set(map(id, parameters_of(self.param_groups)))
            for i, given in enumerate(group["params"]):
                name, param = given if isinstance(given, tuple) else (None, given)
                name = f"number {i} of group {len(self.param_groups)}" if name is None else repr(name)
                if id(param) in seen:
                    raise ValueError(f"params: parameter {name} is given twice; pass each parameter once")
                seen.add(id(param))
                check_piece(f"params: parameter {name}", param)
                if isinstance(param, Tensor) and param.dtype not in _DTYPES:
                    raise TypeError(
                        f"params: parameter {name} is {param.dtype}; expected float32, bfloat16, float16 or float64"
                    )
        super().add_param_group(group)
        self._group_plans, self._agreed = {}, False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": self._store.masks, "_mismatch": self._store.mismatch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called for a copy, and by load_state_dict, whose state has groups and tensors only.
        old = self.__dict__.get("_store")
        masks, mismatch = state.pop("_masks", old and old.masks), state.pop("_mismatch", old and old.mismatch)
        super().__setstate__(state)
        self._store = StateStore(self, masks, mismatch)
        self._group_plans = {}
        for group in self.param_groups:
            self._fill(group)

    # What a compiler traces it would take for constants: states, and what projections begin with.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps all active entries of all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            ValueError: a gradient or a state that does not fit its parameter; nothing is stepped then.
            RuntimeError: a sparse gradient, or another tensor in the place of a parameter.
        """
        self._accelerator_graph_capture_health_check()
        self._store.refuse_mismatch()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Scalers of split gradients make DTensors of them.
        grad_scale, found_inf = whole(getattr(self, "grad_scale", None)), whole(getattr(self, "found_inf", None))
        calls = self._gathered()
        if len(calls) > 1:
            # The op checks before it writes, but here an earlier call would already have stepped its parameters.
            for call in calls:
                call.plan.check(call.grads, self.param_groups)
        self._apply_all(calls, grad_scale, found_inf)
        for step in chain.from_iterable(call.plan.empty for call in calls):
            step += 1 if found_inf is None else (found_inf.reshape(()) == 0).to(step)
        for plan in self._group_plans.values():
            for leaf in plan.leaves:
                leaf.follow()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs.

        A parameter's entries are those of ``optimizer.state``, but their keys and shapes do not depend on what masks
        there were before: ``step`` is one number, the largest, and instead of ``cohort`` there are ``counts``, bytes
        (``b"same"`` where all entries have taken that many steps).
        """
        state = super().state_dict()
        return {**state, "state": state["state"] | self._store.saved()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, or the state of a ``torch.optim.AdamW``; dtypes stay exact.

        State that was made under other masks than this optimizer's stays under its own. The next step then refuses to
        run and names the first parameter that differs, unless :meth:`set_masks`, which carries the loaded state over,
        is called first.

        Raises:
            ValueError: other groups, other shapes, missing entries. The optimizer is as before then.
        """
        captured: dict[Tensor, ParameterState] = {}

        def capture(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            # Read before anything changes, and hide the tensors from the base class, which would cast them all to
            # the parameter's dtype.
            ids = [i for group in given["param_groups"] for i in group["params"]]
            groups = [group for group in given["param_groups"] for _ in group["params"]]
            for param, i, group in zip(parameters_of(self.param_groups), ids, groups, strict=False):
                if given["state"].get(i):
                    options = self._store.options(param, self._fill({**group}))
                    captured[param] = self._store.read(param, given["state"][i], options)
            return {**given, "state": {k: v for k, v in given["state"].items() if k not in set(ids)}}

        def restore(_: Optimizer) -> None:
            for param, state in captured.items():
                self._store.put(param, state)
            self._store.find_mismatch()

        hooks = [
            self.register_load_state_dict_pre_hook(capture),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._agreed = False

    # What this optimizer adds.

    @property
    def masks(self) -> dict[Tensor | str, Mask]:
        """The masks in force: by name if the parameters are named, else by parameter."""
        names = names_of(self.param_groups)
        return {names.get(p, p): mask for p, mask in self._store.masks.items()}

    @torch.no_grad()
    def set_masks(self, masks: ByParameter[Mask], carry: str = "intersection") -> None:
        """Replaces all masks; parameters that ``masks`` does not name become dense.

        Args:
            masks: ``{parameter or its name: Mask}``.
            carry: ``"intersection"``: entries that stay active keep their moments, master and step count, and the
                rest is dropped. ``"none"``: every parameter whose mask changes starts anew.

        Raises:
            TypeError, ValueError: as the constructor; of a projected optimizer also another column mask, once its
                weight has moved in the domain. The optimizer is as before then.
        """
        if carry not in ("intersection", "none"):
            raise ValueError(f"carry: expected 'intersection' or 'none', got {carry!r}")
        self._store.set_masks(self._store.resolve(masks), carry == "intersection")
        self._group_plans, self._agreed = {}, False

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the active entries of all gradients so that their joint 2-norm is at most ``max_norm``.

        Called before the first step, it makes the optimizer's state.

        Returns:
            The norm before scaling, a 0-d tensor on the device of the first gradient. Inactive entries neither count
            nor change.

        Raises:
            ValueError: ``max_norm`` not above 0; gradients or masks that :meth:`step` would refuse, too.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm: expected a number above 0, got {max_norm}")
        self._store.refuse_mismatch()
        calls = self._gathered()
        for call in calls:
            call.plan.check(call.grads, self.param_groups)
        return clip_active_([(call.grads, call.plan) for call in calls], max_norm)

    def state_bytes(self) -> int:
        """Bytes of all optimizer state, mask indices included."""
        return sum(v.nbytes for state in self.state.values() for v in state.values() if isinstance(v, Tensor))

    def _fill(self, group: dict[str, Any]) -> dict[str, Any]:
        """``group``, of another optimizer or of an earlier version, with the options that it lacks."""
        for name in ("amsgrad", "maximize", "capturable"):
            group.setdefault(name, False)
        for name, value in (("master_weights", True), ("second_moment", "entry")):
            group.setdefault(name, self.defaults.get(name, value))
        return group

    # Inside; what a subclass may do in another way.

    def _takes_part(self, param: Tensor) -> bool:
        """Whether a step changes any entry of ``param``, if it has a gradient."""
        mask = self._store.whole_mask_of(param)
        return param.numel() > 0 and (mask is None or mask.numel > 0)

    def _ready(self, param: Tensor, group: dict[str, Any]) -> ParameterState:
        """The state that a step of ``param`` needs."""
        return self._store.ready(param, group)

    def _split(self, params: list[Tensor], positions: list[int]) -> list[list[int]]:
        """Splits the positions in ``params`` of what is stepped on one device into calls of the op: here, one."""
        return [positions]

    def _apply_all(self, calls: list[Call], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for call in calls:
            self._apply(call, grad_scale, found_inf)

    def _apply(
        self, call: Call, grad_scale: Tensor | None, found_inf: Tensor | None, updates: list[Tensor] | None = None
    ) -> None:
        """One call of the op: steps the parameters, or writes what that would add to them into ``updates``."""
        group, plan, grads = call
        lr, (beta1, beta2) = group["lr"], group["betas"]
        device = plan.params[0].device
        lr_tensor = scalar_on(lr, device) if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
        try:
            ops.masked_adamw_(
                plan.params,
                grads,
                plan.buffers,
                updates or (),
                plan.layout,
                0.0 if lr_tensor is not None else float(lr),
                lr_tensor,
                float(beta1),
                float(beta2),
                group["eps"],
                group["weight_decay"],
                group["maximize"],
                scalar_on(grad_scale, device),
                scalar_on(found_inf, device),
            )
        except RuntimeError as error:
            plan.explain(grads, self.param_groups, error)
            raise
        if not updates:
            increment_version(plan.written())

    def _gathered(self) -> list[Call]:
        """All calls of the op that a step makes; they are planned anew where something has changed."""
        gradients = [[gradient_of(p) for p in group["params"]] for group in self.param_groups]
        if not {g.layout for grads in gradients for g in grads if g is not None} <= {torch.strided}:
            refuse_sparse(self.param_groups)
        if not self._agreed:
            check_agreement(self.param_groups, self._store.masks, self._said())
            self._agreed = True
        shown = set(map(id, self.state.values()))
        calls = []
        for number, (group, grads) in enumerate(zip(self.param_groups, gradients, strict=True)):
            key, planned = key_of(group, grads), self._group_plans.get(number)
            if planned is None or not planned.holds(key, shown):
                planned = self._group_plans[number] = self._plan(key, group, grads)
            calls += [Call(group, plan, [grads[i] for i in plan.positions]) for plan in planned.plans]
        return calls

    def _said(self) -> dict[str, str]:
        """What else processes that hold parts of one model must have in common, by what it is."""
        return {}

    def _ruled(self) -> Iterable[Tensor]:
        """The parameters that have a mask."""
        return self._store.masks

    def _plan(self, key: tuple, group: dict[str, Any], grads: list[Tensor | None]) -> GroupPlan:
        refuse_lost(self._ruled(), self.param_groups)
        by_device: dict[torch.device, list[int]] = {}
        for i, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
            if grad is not None and self._takes_part(param):
                by_device.setdefault(param.device, []).append(i)
        plans = []
        for positions in chain.from_iterable(self._split(group["params"], found) for found in by_device.values()):
            own = [group["params"][i] for i in positions]
            its_grads = [grad for i in positions if (grad := grads[i]) is not None]
            plan = Plan(own, positions, [self._ready(param, group) for param in own], its_grads)
            plan.explain(its_grads, self.param_groups)
            plans.append(plan)
        return GroupPlan(key, plans, [self.state[param] for plan in plans for param in plan.own])
