"""AdamW whose updates stay orthogonal to the subspaces that earlier domains use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparse_cl import ops
from sparse_cl.layout import state_dtype
from sparse_cl.masks import Mask
from sparse_cl.subspace import Subspace, SubspaceMemory

from .leaf import weight_of
from .plan import Plan, scalar_on
from .projected_step import ProjectedCall, Scratch, products, split, starts_of
from .projection import Projection, make_projection
from .sparse_masked_adamw import SparseMaskedAdamW
from .state import PROJECTION, ParameterState, is_capturing, refuse_capture

Bases = Mapping[Tensor | str, Subspace | Tensor]


class SubspaceProjectedAdamW(SparseMaskedAdamW):
    """:class:`SparseMaskedAdamW` whose updates ΔW (m, n) satisfy ΔW U = 0 for given bases U (n, r).

    What is projected is the update as AdamW makes it, weight decay included, on the float32 master. Projecting the
    gradient instead does not do: AdamW divides entry by entry, which turns a gradient out of its subspace again. A
    parameter without a basis is updated as by :class:`SparseMaskedAdamW`.

    With a row mask the compact rows are projected. With a column mask of columns C they are projected out of the range
    of the rows C of U; with as many used directions as columns nothing is free. With element and 2:4 masks the nearest
    update on the mask is found by a few conjugate-gradient steps: what is masked stays bit-identical, while the leak is
    below 1e-6 only where each row has about twice as many active weights as there are used directions.

    The bound ‖ΔW U‖²_F ≤ 1e-6 ‖ΔW‖²_F holds for float32 parameters, and for the masters of bfloat16 and float16 ones;
    rounding such a master to its parameter adds to the parameter's own leak, and without masters there is no bound.
    Products are made in float32; where the caller allows TF32 on a GPU, in TF32, and twice if the basis is of what is
    used, which keeps the bound (see ``tests/test_projected_step.py``).

    A step needs a scratch for updates besides: 64 MB, or what the largest projected parameter takes in float32.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, masks, master_weights: as there; but with
            element and 2:4 masks a step synchronises with the host, and cannot be captured.
        memory: a :class:`SubspaceMemory`, whose bases are followed as they grow; or ``{parameter or its name: Subspace
            or an orthonormal (n, r) tensor}``.
        rest: what happens to parameters that a basis cannot protect, once there is any basis: those of fewer than two
            dimensions (biases, norms) and embeddings that the memory knows of. ``"freeze"``, as GPM does, or
            ``"train"``. An unprotected residual path undoes the protection of the rest.

    Raises:
        ValueError: as there; a basis that fits no parameter, is not orthonormal, has another width or device; a memory
            of another model.
    """

    _memory: SubspaceMemory | Bases | None = None
    _rest = "freeze"
    _seen: tuple | None = None
    _captured: tuple = ()

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
        memory: SubspaceMemory | Bases | None = None,
        rest: str = "freeze",
        **refused: Any,
    ):
        if rest not in ("freeze", "train"):
            raise ValueError(f"rest: expected 'freeze' or 'train', got {rest!r}")
        self._subspaces: dict[Tensor, Subspace] = {}
        self._projections: dict[Tensor, Projection] = {}
        self._warned: set[str] = set()
        self._scratch = Scratch()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            capturable=capturable,
            masks=masks,
            master_weights=master_weights,
            **refused,
        )
        self._rest = rest
        self.set_memory(memory)

    def set_memory(self, memory: SubspaceMemory | Bases | None) -> None:
        """Replaces the memory; moments and step counts stay.

        Raises:
            ValueError: as the constructor; the optimizer is as before then.
        """
        subspaces = self._resolve_memory(memory)
        self._memory = memory
        self._take(subspaces)

    @property
    def memory(self) -> SubspaceMemory | Bases | None:
        """The memory in force."""
        return self._memory

    @torch.no_grad()
    def step(self, closure=None):
        """Steps all active entries of all parameters that have a gradient, inside what is free.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        self._look_again()
        return super().step(closure)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        self._look_again()
        return super().clip_grad_norm_(max_norm)

    clip_grad_norm_.__doc__ = SparseMaskedAdamW.clip_grad_norm_.__doc__

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._seen = None

    def set_masks(self, masks: Mapping[Tensor | str, Mask], carry: str = "intersection") -> None:
        super().set_masks(masks, carry)
        self._seen = None

    set_masks.__doc__ = SparseMaskedAdamW.set_masks.__doc__

    def __getstate__(self) -> dict[str, Any]:
        own = ("_memory", "_rest", "_subspaces", "_projections", "_warned")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = Scratch()

    # Inside.

    def _look_again(self) -> None:
        """Takes the bases anew if the memory, the parameters or their masks have changed."""
        if self._seen != self._state_of_memory():
            self._take(self._resolve_memory(self._memory))

    def _state_of_memory(self) -> tuple:
        version = self._memory.version if isinstance(self._memory, SubspaceMemory) else None
        first = next((p.device for group in self.param_groups for p in group["params"]), None)
        return version, first

    def _take(self, subspaces: dict[Tensor, Subspace]) -> None:
        self._subspaces = {param: subspace for param, subspace in subspaces.items() if subspace.rank}
        self._projections = {
            param: make_projection(subspace, self._mask_of(param)) for param, subspace in self._subspaces.items()
        }
        for param, projection in self._projections.items():
            if not projection.free and self._name(param) not in self._warned:
                self._warned.add(self._name(param))
                masked = "" if self._mask_of(param) is None else " of its mask"
                warnings.warn(
                    f"parameter {self._name(param)}: earlier domains use all directions{masked} "
                    f"({self._subspaces[param].rank} of {self._subspaces[param].width}), so it is not updated any more",
                    stacklevel=4,
                )
        self._group_plans, self._scratch = {}, Scratch()
        self._seen = self._state_of_memory()

    def _resolve_memory(self, memory: SubspaceMemory | Bases | None) -> dict[Tensor, Subspace]:
        if memory is None:
            return {}
        if isinstance(memory, SubspaceMemory):
            found = self._of_memory(memory)
        elif isinstance(memory, Mapping):
            found = self._by_param(memory, "memory", "basis")
        else:
            raise TypeError(
                f"memory: expected a SubspaceMemory or {{parameter or name: basis}}, got {type(memory).__name__}"
            )
        subspaces = {}
        for param, value in found.items():
            where = f"memory: parameter {self._name(param)}"
            if value is None:
                continue
            try:
                subspace = value if isinstance(value, Subspace) else Subspace(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
            weight = weight_of(param)
            if weight.dim() != 2 or subspace.width != weight.shape[1]:
                raise ValueError(
                    f"{where} has shape {tuple(weight.shape)}, but its basis has width {subspace.width}; expected "
                    "(n, r) for a weight (m, n)"
                )
            if subspace.device != param.device:
                raise ValueError(
                    f"{where} is on {param.device}, but its basis is on {subspace.device}; move it with "
                    f".to({str(param.device)!r})"
                )
            subspaces[param] = subspace.to(dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)
        return subspaces

    def _of_memory(self, memory: SubspaceMemory) -> dict[Tensor, Subspace | None]:
        if memory.is_bound:
            # By the weight, since a leaf is its layer's parameter but not the memory's.
            weights = {param: weight_of(param) for param in self._by_identity().values()}
            found = {param: memory.subspace(w) for param, w in weights.items() if memory.tracks(w)}
            if not found:
                raise ValueError(
                    f"memory: no parameter of this optimizer is tracked, not even {memory.names[0]!r}: it was made for "
                    "another model; call memory.bind(model), or build it from the model that is trained"
                )
            return found
        names = self._by_name()
        if not names:
            raise ValueError(
                "memory: it is bound to no model, and the parameters have no names; call memory.bind(model), or pass "
                "model.named_parameters() as params"
            )
        for name in memory.names:
            shape = tuple(weight_of(names[name]).shape) if name in names else None
            if shape != memory.shape(name):
                raise ValueError(
                    f"memory: it tracks {name!r} of shape {memory.shape(name)}, but this optimizer has "
                    f"{'no parameter of that name' if shape is None else f'it in shape {shape}'}: it was made for "
                    "another model, or only some parameters are trained; call memory.bind(model)"
                )
        found = {names[name]: memory.subspace(name) for name in memory.names}
        return {param: s if s is None else s.to(param.device) for param, s in found.items()}

    def _is_rest(self, param: Tensor) -> bool:
        if param.dim() < 2:
            return True
        memory = self._memory
        if not isinstance(memory, SubspaceMemory) or param in self._subspaces:
            return False
        return memory.is_embedding(param) or (not memory.is_bound and self._names().get(param) in memory.embeddings)

    def _takes_part(self, param: Tensor) -> bool:
        if not super()._takes_part(param):
            return False
        if param in self._projections:
            return self._projections[param].free
        return not (self._rest == "freeze" and self._subspaces and self._is_rest(param))

    def _pack(self, param: Tensor, **options) -> ParameterState:
        packed = super()._pack(param, **options)
        projection = self._projections.get(param) if options else None
        if projection is not None:
            own, where = self.state[param], f"state of parameter {self._name(param)}"
            for name, zeros in projection.new_state(packed.layout.compact_shape, packed.layout.dtype).items():
                name = PROJECTION + name
                if name not in own:
                    refuse_capture(param, self._name)
                    own[name] = zeros
                elif own[name].shape != zeros.shape or own[name].dtype != zeros.dtype:
                    raise ValueError(
                        f"{where}: {name}: expected {zeros.dtype} of shape {tuple(zeros.shape)}, got {own[name].dtype} "
                        f"of shape {tuple(own[name].shape)}; it was made by another projection"
                    )
        return packed

    def _calls(self, params: list[Tensor], positions: list[int]) -> list[list[int]]:
        together = [i for i in positions if params[i] not in self._projections]
        calls = [together] if together else []
        # What can share a call lies side by side, and what is corrected alike next to each other.
        by_call: dict[tuple, dict[tuple, list[int]]] = {}
        for i in positions:
            if (projection := self._projections.get(params[i])) is None:
                continue
            call = (projection.exact, state_dtype(params[i].dtype), None if projection.turn is None else i)
            alike = (projection.correction, params[i].shape, projection.like)
            by_call.setdefault(call, {}).setdefault(alike, []).append(i)
        for (_, dtype, _), found in by_call.items():
            numbers = list(chain.from_iterable(found.values()))
            masks = [self._mask_of(params[i]) for i in numbers]
            sizes = [params[i].numel() if mask is None else mask.numel for i, mask in zip(numbers, masks, strict=True)]
            for part in split(sizes):
                calls.append([numbers[n] for n in part])
                self._scratch.reserve(params[numbers[0]].device, dtype, starts_of([sizes[n] for n in part])[1])
        return calls

    def _apply_all(self, calls, grad_scale, found_inf) -> None:
        plain = [call for call in calls if call[1].own[0] not in self._projections]
        super()._apply_all(plain, grad_scale, found_inf)
        by_rate: dict[tuple, list[tuple]] = {}
        for group, plan, grads in calls:
            if plan.own[0] in self._projections:
                key = (self._projections[plan.own[0]].exact, plan.params[0].device, id(group))
                by_rate.setdefault(key, []).append((group, plan, grads))
        for (exact, device, _), found in by_rate.items():
            with products(device, exact):
                self._apply_projected(found, grad_scale, scalar_on(found_inf, device))

    def _apply_projected(self, calls, grad_scale, found_inf) -> None:
        """The calls of one group on one device."""
        lr = calls[0][0]["lr"]
        if isinstance(lr, Tensor):
            lr = float(lr) if lr.device.type == "cpu" else scalar_on(lr, calls[0][1].params[0].device).reshape(())
        ready = [self._projected(plan) for _, plan, _ in calls]
        if is_capturing(calls[0][1].params[0]):
            # Replays read the scratch and what corrections hold, whatever takes their place later.
            self._captured = (*self._captured, ready)
        by_kind: dict[tuple, list] = {}
        for call in ready:
            for correction in call.corrections:
                by_kind.setdefault((type(correction), call.buffer.dtype), []).append(correction)
        for (kind, _), corrections in by_kind.items():
            kind.begin(corrections, lr, found_inf)
        try:
            for (group, plan, grads), call in zip(calls, ready, strict=True):
                if call.layers[0].projection.turn is None:
                    self._apply(group, plan, grads, grad_scale, found_inf, call.updates)
                    call.correct_(lr, found_inf)
                else:
                    self._apply_turned(group, plan, grads, grad_scale, found_inf, lr)
                ops.apply_updates_(plan.params, plan.buffers, call.updates, plan.layout, found_inf)
                call.settle_()
        finally:
            increment_version(chain.from_iterable(plan.written() for _, plan, _ in calls))

    def _apply_turned(self, group, plan: Plan, grads, grad_scale, found_inf, lr) -> None:
        """The update of one layer whose moments are in turned coordinates."""
        (layer,) = plan.projected.layers
        weights, fade = layer.weights(), -lr * group["weight_decay"]
        kept = 1 + fade if found_inf is None else torch.where(found_inf == 0, 1 + fade, 1.0)
        layer.start = layer.projection.turned(weights * kept)
        with torch.autocast(weights.device.type, enabled=False):
            grads = [grads[0].to(weights.dtype) @ layer.projection.turn]
        self._apply({**group, "weight_decay": 0.0}, plan, grads, grad_scale, found_inf, plan.projected.updates)
        plan.projected.correct_(lr, found_inf)
        layer.start = None
        layer.update.add_(weights * fade)

    def _projected(self, plan: Plan) -> ProjectedCall:
        packed = [self._packed[param] for param in plan.own]
        buffer = self._scratch.buffer(plan.params[0].device, packed[0].layout.dtype)
        if plan.projected is None or plan.projected.buffer is not buffer:
            kept = [
                {k.removeprefix(PROJECTION): v for k, v in self.state[param].items() if k.startswith(PROJECTION)}
                for param in plan.own
            ]
            projections = [self._projections[param] for param in plan.own]
            plan.projected = ProjectedCall(plan, projections, packed, kept, buffer)
        return plan.projected
