"""AdamW that touches only the active entries of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from sparse_cl import ops
from sparse_cl.masks import Mask, same_mask

from .clip import clip_active_
from .leaf import owner_of, weight_of
from .names import by_param
from .options import check_options
from .plan import GroupPlan, LeafPlan, Plan, facts_of, fault_of, ids_of, scalar_on
from .state import ParameterState, carry_state, new_state, read_state, refuse_capture

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SparseMaskedAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) whose parameters may each have a mask.

    Entries outside a mask never change by a bit, whatever weight decay, momentum or dtype, and cost no state. A
    parameter without a mask is updated densely; one with an empty mask not at all. Active entries get exactly the
    update that ``torch.optim.AdamW`` gives them, with bias correction by the number of updates that the entry itself
    has had.

    Args:
        params: tensors, parameter groups, or ``model.named_parameters()``.
        lr: learning rate, a float or a one-element tensor.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: use the running maximum of the second moment.
        maximize: ascend instead of descend.
        capturable: state that a CUDA graph may capture ``step``; no step synchronises with the host in any case. Take
            a step before the capture, which makes the state. Replays follow ``lr`` only if it is a tensor on the GPU.
        masks: ``{parameter or its name: Mask}``. Names need ``named_parameters()``.
        master_weights: keep a float32 copy of the active entries of bfloat16 and float16 parameters. Without it they
            are rounded stochastically after each step. With it, values written into such a parameter from outside
            are overwritten by the next step, since the copy is what is stepped.

    Moments are float32 (float64 for float64 parameters). Gradients may be in the parameter's dtype or float32. State
    of a parameter: ``step`` (int32), ``exp_avg``, ``exp_avg_sq``, where asked for ``max_exp_avg_sq`` and ``master``,
    each in the mask's compact shape: (k, *rest) for k rows, (m, k) for k columns, (m, n/2) for 2:4, (k,) for k
    elements; and the mask's index (``rows``, ``columns``, ``bits``, ``two_four_bits``).

    The leaf of an :class:`~sparse_cl.nn.ActiveLinear` is stepped by that layer's mask and gain, and the values are
    written into the layer's weight as well. The leaf itself is its ``master``, one tensor under two names.

    Raises:
        ValueError: a hyperparameter out of range, a mask that fits no parameter, a parameter given twice.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        masks: Mapping[Tensor | str, Mask] | None = None,
        master_weights: bool = True,
        **refused: Any,
    ):
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
        }
        check_options(defaults)
        self._masks: dict[Tensor, Mask] = {}
        self._forget_plans()
        super().__init__(params, defaults)
        self._masks = self._resolve(masks or {})

    # What torch.optim.Optimizer asks of a subclass.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = dict(param_group)
        check_options({**self.defaults, **{k: v for k, v in group.items() if k != "params"}})
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if isinstance(group["params"], Iterable) and not isinstance(group["params"], set):
            group["params"] = list(group["params"])
            seen = {id(p): None for g in self.param_groups for p in g["params"]}
            for i, given in enumerate(group["params"]):
                named = isinstance(given, tuple)
                param = given[1] if named else given
                name = repr(given[0]) if named else f"number {i} of group {len(self.param_groups)}"
                if id(param) in seen:
                    raise ValueError(f"params: parameter {name} is given twice; pass each parameter once")
                seen[id(param)] = None
                if isinstance(param, Tensor) and param.dtype not in _DTYPES:
                    raise TypeError(
                        f"params: parameter {name} is {param.dtype}; expected float32, bfloat16, float16 or float64"
                    )
        super().add_param_group(group)
        self._forget_plans()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": self._masks, "_mismatch": self._mismatch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed: dict[Tensor, ParameterState] = {}
        self._group_plans: dict[int, GroupPlan] = {}
        for group in self.param_groups:
            for name, value in (("amsgrad", False), ("maximize", False), ("capturable", False)):
                group.setdefault(name, value)
            group.setdefault("master_weights", self.defaults.get("master_weights", True))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Steps all active entries of all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        self._accelerator_graph_capture_health_check()
        if self._mismatch:
            raise ValueError(self._mismatch)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        calls = self._gathered()
        if len(calls) > 1:
            # The op checks before it writes, but here an earlier call would already have stepped its parameters.
            self._check_facts(calls)
        self._apply_all(calls, grad_scale, found_inf)
        for plan in self._group_plans.values():
            for leaf in plan.leaves:
                leaf.follow()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, or the state of a ``torch.optim.AdamW``; dtypes stay exact.

        State made under other masks than this optimizer's is kept under its own. The next step refuses to run and
        names the first parameter that differs, unless :meth:`set_masks` is called before: it carries the loaded
        state over.

        Raises:
            ValueError: other groups, other shapes, missing entries. The optimizer is as before then.
        """
        captured: dict[Tensor, ParameterState] = {}

        def capture(_, given):
            # Read before anything changes, and hide the tensors from the base class, which would cast them all to
            # the parameter's dtype.
            own = [p for group in self.param_groups for p in group["params"]]
            ids = [i for group in given["param_groups"] for i in group["params"]]
            options = [group for group in given["param_groups"] for _ in group["params"]]
            for param, i, group in zip(own, ids, options, strict=False):
                if given["state"].get(i):
                    try:
                        options = self._options(param, group)
                        captured[param] = read_state(weight_of(param), given["state"][i], **options)
                    except (ValueError, RuntimeError) as error:
                        raise ValueError(f"state of parameter {self._name(param)}: {error}") from error
            return {**given, "state": {k: v for k, v in given["state"].items() if k not in set(ids)}}

        def restore(_):
            for param, state in captured.items():
                self._set_state(param, state)
            self._mismatch = self._find_mismatch()

        hooks = [
            self.register_load_state_dict_pre_hook(capture),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    # What this optimizer adds.

    @property
    def masks(self) -> dict[Tensor | str, Mask]:
        """The masks in force: by name if the parameters are named, else by parameter."""
        names = self._names()
        return {names.get(p, p): mask for p, mask in self._masks.items()}

    @torch.no_grad()
    def set_masks(self, masks: Mapping[Tensor | str, Mask], carry: str = "intersection") -> None:
        """Replaces all masks; parameters that ``masks`` does not name become dense.

        Args:
            masks: ``{parameter or its name: Mask}``.
            carry: ``"intersection"``: entries that stay active keep their moments, master and step count, and the
                rest is dropped. ``"none"``: every parameter whose mask changes starts anew.

        Raises:
            ValueError: as the constructor; the optimizer is as before then.
        """
        if carry not in ("intersection", "none"):
            raise ValueError(f"carry: expected 'intersection' or 'none', got {carry!r}")
        resolved = self._resolve(masks)
        for param in [p for group in self.param_groups for p in group["params"] if self.state.get(p)]:
            packed, mask = self._pack(param), self._mask_of(param, resolved)
            if same_mask(packed.mask, mask):
                continue
            carried = carry_state(weight_of(param), packed, mask) if carry == "intersection" else None
            if carried is None:
                self.state.pop(param)
                self._packed.pop(param, None)
            else:
                self._set_state(param, carried)
        self._masks = resolved
        self._mismatch = None
        self._group_plans = {}

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the active entries of all gradients so that their joint 2-norm is at most ``max_norm``.

        Called before the first step, it makes the optimizer's state.

        Returns:
            The norm before scaling, a 0-d tensor on the device of the first gradient. Inactive entries neither count
            nor change.

        Raises:
            ValueError: ``max_norm`` not above 0; gradients or masks with which :meth:`step` would not run, either.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm: expected a number above 0, got {max_norm}")
        if self._mismatch:
            raise ValueError(self._mismatch)
        calls = self._gathered()
        self._check_facts(calls)
        return clip_active_([(grads, plan) for _, plan, grads in calls], max_norm)

    def state_bytes(self) -> int:
        """Bytes of all optimizer state, mask indices included."""
        return sum(v.nbytes for state in self.state.values() for v in state.values() if isinstance(v, Tensor))

    def _forget_plans(self) -> None:
        self._mismatch: str | None = getattr(self, "_mismatch", None)
        self._packed: dict[Tensor, ParameterState] = getattr(self, "_packed", {})
        self._group_plans: dict[int, GroupPlan] = {}

    def _gathered(self) -> list[tuple[dict[str, Any], Plan, list[Tensor]]]:
        """The group, the plan and the gradients of each call of the op."""
        gradients = [[p.grad for p in group["params"]] for group in self.param_groups]
        if not {g.layout for grads in gradients for g in grads if g is not None} <= {torch.strided}:
            self._refuse_sparse()
        shown = set(map(id, self.state.values()))
        return [
            (group, plan, [grads[i] for i in plan.positions])
            for number, (group, grads) in enumerate(zip(self.param_groups, gradients, strict=True))
            for plan in self._plans(number, group, grads, shown)
        ]

    def _check_facts(self, calls: list[tuple[dict[str, Any], Plan, list[Tensor]]]) -> None:
        for _, plan, grads in calls:
            if facts_of(grads) != plan.facts:
                self._explain(plan.own, grads)

    def _plans(self, number: int, group: dict[str, Any], grads: list[Tensor | None], shown: set[int]) -> list[Plan]:
        with_grad = [g is not None for g in grads]
        # Parameters too, since some tools put others into a group's list.
        key = (group["amsgrad"], group["master_weights"], list(map(id, group["params"])))
        plan = self._group_plans.get(number)
        if (
            plan is None
            or plan.key != key
            or plan.with_grad != with_grad
            or plan.state_ids != ids_of(plan.state_dicts)
            or not shown.issuperset(plan.dict_ids)
            or not all(leaf.holds() for leaf in plan.leaves)
        ):
            plan = self._make_plan(key, with_grad, group, grads)
            self._group_plans[number] = plan
        return plan.plans

    def _make_plan(self, key, with_grad, group, grads) -> GroupPlan:
        by_device: dict[torch.device, list[int]] = {}
        for i, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
            if grad is None:
                continue
            if self._takes_part(param):
                by_device.setdefault(param.device, []).append(i)
        plans, dicts, leaves = [], [], []
        for positions in chain(*(self._calls(group["params"], found) for found in by_device.values())):
            own = [group["params"][i] for i in positions]
            packed = [self._pack(p, **self._options(p, group)) for p in own]
            layout = torch.tensor([state.layout.row() for state in packed], dtype=torch.int64)
            plan_grads = [grads[i] for i in positions]
            self._explain(own, plan_grads)
            params, buffers = [weight_of(p) for p in own], [state.buffer for state in packed]
            plans.append(Plan(own, params, positions, buffers, layout, facts_of(plan_grads)))
            dicts += [self.state[p] for p in own]
            leaves += [LeafPlan(p, w, s) for p, w, s in zip(own, params, packed, strict=True) if p is not w]
        return GroupPlan(key, with_grad, ids_of(dicts), dicts, list(map(id, dicts)), plans, leaves)

    def _takes_part(self, param: Tensor) -> bool:
        """Whether a step changes any entry of ``param``, if it has a gradient."""
        mask = self._mask_of(param)
        return param.numel() > 0 and (mask is None or mask.numel > 0)

    def _mask_of(self, param: Tensor, masks: Mapping[Tensor, Mask] | None = None) -> Mask | None:
        """The mask of what a step of ``param`` writes: its layer's for a leaf, else the one in ``masks``."""
        owner = owner_of(param)
        return owner.mask if owner is not None else (self._masks if masks is None else masks).get(param)

    def _calls(self, params: list[Tensor], positions: list[int]) -> list[list[int]]:
        """Splits the positions in ``params`` of what is stepped on one device into calls of the op: here, one."""
        return [positions]

    def _apply_all(self, calls: list[tuple[dict[str, Any], Plan, list[Tensor]]], grad_scale, found_inf) -> None:
        for group, plan, grads in calls:
            self._apply(group, plan, grads, grad_scale, found_inf)

    def _apply(self, group: dict[str, Any], plan: Plan, grads, grad_scale, found_inf, updates=()) -> None:
        """One call of the op."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        device = plan.params[0].device
        lr_tensor = scalar_on(lr, device) if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
        try:
            ops.masked_adamw_(
                plan.params,
                grads,
                plan.buffers,
                updates,
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
            self._explain(plan.own, grads, error)
            raise
        if not updates:
            increment_version(plan.written())

    def _pack(self, param: Tensor, **options) -> ParameterState:
        """The state of ``param`` in one buffer: made if there is none, packed again if its tensors were replaced."""
        current, packed = self.state.get(param), self._packed.get(param)
        if not current:
            refuse_capture(param, self._name)
            leaf = None if owner_of(param) is None else param
            packed = new_state(weight_of(param), self._mask_of(param), leaf, **options)
            self._set_state(param, packed)
            return packed
        if packed is not None and packed.layout.compact_grad and owner_of(param) is None:
            raise ValueError(
                f"parameter {self._name(param)}: it was the leaf of an ActiveLinear that has been restored; make a new "
                "optimizer"
            )
        wanted = {k: options[k] for k in ("amsgrad", "master") if k in options}
        untouched = packed is not None and all(current.get(k) is v for k, v in packed.views.items())
        if untouched and all(getattr(packed.layout, k) == v for k, v in wanted.items()):
            moved = param.device != packed.buffer.device  # which is refused before the step
            if not moved and self._is_master(param, packed) and param.data_ptr() != packed.views["master"].data_ptr():
                refuse_capture(param, self._name)
                packed.views["master"].copy_(param)
                param.data = packed.views["master"]
            return packed
        refuse_capture(param, self._name)
        stepping = bool(options)
        if not stepping:
            options = {
                "amsgrad": "max_exp_avg_sq" in current,
                "master": "master" in current,
                "seed": self._ordinal(param),
                "compact_grad": owner_of(param) is not None,
            }
        try:
            packed = read_state(weight_of(param), current, **options)
        except ValueError as error:
            raise ValueError(f"state of parameter {self._name(param)}: {error}") from error
        # A copy of the optimizer without its model has lost whose the leaves are; their indices would be out of range.
        if stepping and (mismatch := self._mismatch_of(param, packed)):
            raise ValueError(mismatch)
        self._set_state(param, packed)
        return packed

    def _set_state(self, param: Tensor, packed: ParameterState) -> None:
        self._packed[param] = packed
        self.state[param] = {**packed.views, **packed.kept}
        if self._is_master(param, packed):
            param.data = packed.views["master"]

    def _is_master(self, param: Tensor, packed: ParameterState) -> bool:
        """Whether ``param`` is a leaf that is one tensor with the master of its state."""
        mask = self._mask_of(param)
        if mask is None or not packed.is_leaf(param):
            return False
        if packed.same_as is not mask and same_mask(packed.mask, mask):
            packed.same_as = mask
        return packed.same_as is mask

    def _options(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        owner = owner_of(param)
        narrow = param.dtype in (torch.bfloat16, torch.float16)
        master = narrow and bool(group.get("master_weights", self.defaults["master_weights"]))
        return {
            "amsgrad": bool(group.get("amsgrad", False)),
            "master": master or (owner is not None and not narrow),
            "seed": self._ordinal(param),
            "compact_grad": owner is not None,
        }

    def _ordinal(self, param: Tensor) -> int:
        return next(i for i, p in enumerate(chain(*(g["params"] for g in self.param_groups))) if p is param)

    def _names(self) -> dict[Tensor, str]:
        return {
            p: name
            for group in self.param_groups
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }

    def _by_identity(self) -> dict[int, Tensor]:
        """Parameters by their identity; the weights of leaves stand for these."""
        own = {id(p): p for group in self.param_groups for p in group["params"]}
        return own | {id(weight_of(p)): p for p in own.values()}

    def _by_name(self) -> dict[str, Tensor]:
        """Parameters by name; the names of the weights of leaves stand for these."""
        names = {name: p for p, name in self._names().items()}
        leaves = {name: p for name, p in names.items() if weight_of(p) is not p}
        return names | {name.removesuffix("active") + "weight": p for name, p in leaves.items()}

    def _name(self, param: Tensor) -> str:
        name = self._names().get(param)
        if name is not None:
            return repr(name)
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p is param:
                    return f"number {i} of group {number}"
        return "of another optimizer"

    def _resolve(self, masks: Mapping[Tensor | str, Mask]) -> dict[Tensor, Mask]:
        resolved = self._by_param(masks, "masks", "Mask")
        for param, mask in resolved.items():
            if owner_of(param) is not None:
                raise ValueError(
                    f"masks: parameter {self._name(param)} is of an ActiveLinear, which has a mask of its own; leave "
                    "it out here"
                )
            if not isinstance(mask, Mask):
                raise TypeError(f"masks: parameter {self._name(param)}: expected a Mask, got {type(mask).__name__}")
            if mask.shape != param.shape:
                raise ValueError(
                    f"masks: parameter {self._name(param)} has shape {tuple(param.shape)}, "
                    f"but its mask is for {tuple(mask.shape)}"
                )
        return resolved

    def _by_param(self, given: Mapping[Tensor | str, Any], argument: str, what: str) -> dict[Tensor, Any]:
        """``given`` with names replaced by the parameters that they stand for."""
        return by_param(given, self._by_identity(), self._by_name(), argument, what)

    def _find_mismatch(self) -> str | None:
        return next(filter(None, (self._mismatch_of(param, packed) for param, packed in self._packed.items())), None)

    def _mismatch_of(self, param: Tensor, packed: ParameterState) -> str | None:
        mine, loaded = self._mask_of(param), packed.mask
        if same_mask(mine, loaded):
            return None
        return (
            f"parameter {self._name(param)}: its loaded state was made under {loaded or 'no mask'}, but this optimizer "
            f"has {mine or 'no mask'}; call set_masks with the masks to go on with"
        )

    def _refuse_sparse(self) -> None:
        for param in chain(*(group["params"] for group in self.param_groups)):
            if param.grad is not None and param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"parameter {self._name(param)}: SparseMaskedAdamW takes dense gradients, got "
                    f"{param.grad.layout}; use sparse=False in the embedding"
                )

    def _explain(self, params: list[Tensor], grads: list[Tensor], cause: RuntimeError | None = None) -> None:
        """Raises an error that names the parameter at fault, if one is."""
        for param, grad in zip(params, grads, strict=True):
            fault = fault_of(weight_of(param), grad, self._packed[param])
            if fault:
                raise ValueError(f"parameter {self._name(param)}: {fault}") from cause
