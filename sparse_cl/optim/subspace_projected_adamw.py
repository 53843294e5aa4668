"""AdamW whose updates stay orthogonal to the subspaces that earlier domains use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparse_cl.subspace import Subspace, SubspaceMemory

from .leaf import weight_of
from .names import ByParameter, by_name, by_param, names_of, parameters_of
from .projected_adamw import Given, ProjectedAdamW
from .projection import Projection
from .subspace_projection import SubspaceProjection

Bases = ByParameter[Subspace | Tensor]


class SubspaceProjectedAdamW(ProjectedAdamW):
    """:class:`ProjectedAdamW` whose updates ΔW (m, n) satisfy ΔW U = 0 for given bases U (n, r).

    What is projected is AdamW's full update, weight decay included, of the float32 master. A parameter without a basis
    is stepped as by :class:`SparseMaskedAdamW`.

    With a row mask the compact rows are projected. With a column mask of columns C they are projected out of the range
    of the rows C of U; if there are as many used directions as columns, nothing is free. With element and 2:4 masks a
    few conjugate-gradient steps find the nearest update on the mask: what is masked stays bit-identical, while the leak
    is below 1e-6 only where each row has about twice as many active weights as there are used directions.

    The bound ‖ΔW U‖²_F ≤ 1e-6 ‖ΔW‖²_F holds for float32 parameters, and for the masters of bfloat16 and float16 ones;
    rounding such a master to its parameter adds to the parameter's own leak, and without masters there is no bound.
    Products are made in float32; where the caller allows TF32 on a GPU, in TF32, and twice if the basis is of what is
    used, which keeps the bound (see ``tests/optim/test_projected_step.py``).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, masks, master_weights: as for
            :class:`SparseMaskedAdamW`; but with element and 2:4 masks a step synchronises with the host, and cannot be
            captured.
        memory: a :class:`SubspaceMemory`, whose bases are followed as they grow; or ``{parameter or its name: Subspace
            or an orthonormal (n, r) tensor}``.
        rest: what happens to parameters that a basis cannot protect, once there is any basis: those of fewer than two
            dimensions (biases, norms) and embeddings that the memory knows of. ``"freeze"``, as GPM does, or
            ``"train"``. An unprotected residual path undoes the protection of the rest.

    Raises:
        TypeError, ValueError: as there; a basis that fits no parameter, is not orthonormal, has another width or
            device; a memory of another model.
    """

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        memory: SubspaceMemory | Bases | None = None,
        rest: str = "freeze",
        **options: Any,
    ) -> None:
        if memory is not None and options.get("projections"):
            raise ValueError("projections: expected none where there is a memory, which makes its own; leave one out")
        self._memory: SubspaceMemory | Bases | None = None
        super().__init__(params, *arguments, rest=rest, **options)
        if memory is not None:
            self.set_memory(memory)

    @property
    def memory(self) -> SubspaceMemory | Bases | None:
        """The memory in force."""
        return self._memory

    def set_memory(self, memory: SubspaceMemory | Bases | None) -> None:
        """Replaces the memory; moments and step counts stay.

        Raises:
            TypeError, ValueError: as the constructor; the optimizer is as before then.
        """
        given = self._of(memory)
        fitted = self._fit(given, "memory")
        self._memory, self._argument = memory, "memory"
        self._take(given, fitted)

    def set_projections(self, projections: ByParameter[Projection]) -> None:
        super().set_projections(projections)
        self._memory, self._argument = None, "projections"  # it is no longer followed

    set_projections.__doc__ = ProjectedAdamW.set_projections.__doc__

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memory": self._memory, "_argument": self._argument}

    def _current(self) -> Given:
        return super()._current() if self._memory is None else self._of(self._memory)

    def _facts(self) -> tuple:
        version = self._memory.version if isinstance(self._memory, SubspaceMemory) else None
        return (*super()._facts(), version)

    def _is_rest(self, param: Tensor) -> bool:
        memory = self._memory
        if param.dim() < 2:
            return True
        if not isinstance(memory, SubspaceMemory) or param in self._projections:
            return False
        if memory.is_bound:
            return memory.is_embedding(param)
        return names_of(self.param_groups).get(param) in memory.embeddings

    def _of(self, memory: SubspaceMemory | Bases | None) -> Given:
        """The projections that keep out of the subspaces of a memory."""
        if memory is None:
            return {}
        if isinstance(memory, SubspaceMemory):
            found = self._of_memory(memory)
        elif isinstance(memory, Mapping):
            found = by_param(self.param_groups, memory, "memory", "basis")
        else:
            raise TypeError(
                f"memory: expected a SubspaceMemory or {{parameter or name: basis}}, got {type(memory).__name__}"
            )
        given: Given = {}
        for param, basis in found.items():
            if basis is None:
                continue
            try:
                given[param] = SubspaceProjection(basis)
            except (TypeError, ValueError) as error:
                raise type(error)(f"memory: parameter {self._store.name(param)}: {error}") from None
        return given

    def _of_memory(self, memory: SubspaceMemory) -> dict[Tensor, Subspace | None]:
        if memory.is_bound:
            # By the weight, since a leaf is its layer's parameter but not the memory's.
            weights = {param: weight_of(param) for param in parameters_of(self.param_groups)}
            found = {param: memory.subspace(w) for param, w in weights.items() if memory.tracks(w)}
            if not found:
                raise ValueError(
                    f"memory: no parameter of this optimizer is tracked, not even {memory.names[0]!r}: it was made for "
                    "another model; call memory.bind(model), or build it from the model that is trained"
                )
            return found
        names = by_name(self.param_groups)
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
