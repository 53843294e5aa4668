"""AdamW whose updates stay orthogonal to the subspaces that earlier domains use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_cl.layout import DENSE
from sparse_cl.masks import Mask
from sparse_cl.optim.leaf import weight_of
from sparse_cl.optim.plan import scalar_on
from sparse_cl.optim.projection import Projection, make_projection
from sparse_cl.optim.sparse_masked_adamw import Plan, SparseMaskedAdamW
from sparse_cl.optim.state import ParameterState, compact, step_counts, write_compact
from sparse_cl.reference import random_bits, stochastic_round
from sparse_cl.subspace import Subspace, SubspaceMemory

Bases = Mapping[Tensor | str, Subspace | Tensor]

#: Sets the stochastic rounding of projected updates apart from that of the step itself.
_ROUNDING_SEED = 0x5BD1E995


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
        self._group_plans = {}
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

    def _calls(self, params: list[Tensor], positions: list[int]) -> list[list[int]]:
        # One at a time, so that the update of one parameter is all that is held besides the model.
        together = [i for i in positions if params[i] not in self._projections]
        alone = [[i] for i in positions if params[i] in self._projections]
        return [*([together] if together else []), *alone]

    def _apply(self, group, plan: Plan, grads, grad_scale, found_inf) -> None:
        param, projection = plan.params[0], self._projections.get(plan.own[0])
        if projection is None:
            return super()._apply(group, plan, grads, grad_scale, found_inf)
        packed, found_inf = self._packed[plan.own[0]], scalar_on(found_inf, param.device)
        if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
            group = {**group, "lr": scalar_on(group["lr"], param.device)}
        start = old = _weights(param, packed).clone()
        fade = None
        try:
            if projection.turn is not None:
                group, fade = {**group, "weight_decay": 0.0}, _fade(group, found_inf)
                start = projection.turned(old * fade)
                with torch.autocast(param.device.type, enabled=False):
                    grads = [grads[0].to(old.dtype) @ projection.turn]
                _weights(param, packed).copy_(start)
            super()._apply(group, plan, grads, grad_scale, found_inf)
            new = _weights(param, packed).sub_(start)
            self._pull(projection, new, start, group["lr"], found_inf)
            projection.apply_(new)
            _write(param, packed, new.add_(old if fade is None else torch.mul(old, fade, out=start)))
        except BaseException:
            # Until the last line the weights hold coordinates or an update: out of memory or Ctrl-C would leave those.
            if "master" in packed.views:
                packed.views["master"].copy_(old)
            write_compact(param, packed.layout, packed.views, old.to(param.dtype))
            raise

    def _pull(self, projection: Projection, update: Tensor, start: Tensor, lr, found_inf: Tensor | None) -> None:
        """What a projection adds to an update before it is turned back: here nothing."""


def _fade(group: dict[str, Any], found_inf: Tensor | None) -> Tensor | float:
    """What weight decay leaves of a parameter in a step: all, if the step is skipped."""
    fade = 1 - group["lr"] * group["weight_decay"]
    return fade if found_inf is None else torch.where(found_inf == 0, fade, 1.0)


def _weights(param: Tensor, packed: ParameterState) -> Tensor:
    """The active weights as they are stepped, float32 or float64: the master, a dense parameter itself, or a copy."""
    if "master" in packed.views:
        return packed.views["master"]
    return compact(param, packed.layout, packed.views).to(packed.layout.dtype)


def _write(param: Tensor, packed: ParameterState, weights: Tensor) -> None:
    layout = packed.layout
    if layout.kind == DENSE and weights.data_ptr() == param.data_ptr():
        return
    if param.dtype != layout.dtype and not layout.master:
        entry = torch.arange(layout.entries, device=param.device).view(layout.compact_shape)
        counts = step_counts(packed, by_unit=False).view(layout.compact_shape)
        weights = stochastic_round(weights, random_bits(layout.seed ^ _ROUNDING_SEED, counts, entry), param.dtype)
    write_compact(param, layout, packed.views, weights.to(param.dtype))
