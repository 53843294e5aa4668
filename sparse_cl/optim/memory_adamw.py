"""Optimizers that keep what a memory remembers: the projections of its layers, followed as it grows."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparse_cl.subspace import Subspace, SubspaceMemory

from .leaf import weight_of
from .low_rank import LowRankProjection
from .names import ByParameter, Groups, by_name, by_param, names_of, parameters_of
from .projected_adamw import Given, ProjectedAdamW
from .projection import Projection

Bases = ByParameter[Subspace | Tensor]


class MemoryAdamW(ProjectedAdamW):
    """What :class:`SubspaceProjectedAdamW` and :class:`ElasticAdamW` share."""

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        memory: SubspaceMemory | Bases | None = None,
        rest: str = "freeze",
        every: int = 1,
        **options: Any,
    ) -> None:
        self._every = check_every(every)
        if every > 1 and options.get("capturable"):
            raise ValueError("every: expected 1 where capturable is set: a CUDA graph repeats one kind of step")
        if memory is not None and options.get("projections"):
            raise ValueError("projections: expected none where there is a memory, which makes its own; leave one out")
        self._memory: SubspaceMemory | Bases | None = None
        super().__init__(params, *arguments, rest=rest, **options)
        if memory is not None:
            self.set_memory(memory)

    @abstractmethod
    def _projection(self, subspace: Subspace | Tensor, transposed: bool) -> LowRankProjection:
        """The projection that keeps what a subspace says of a parameter."""

    @property
    def memory(self) -> SubspaceMemory | Bases | None:
        """The memory in force."""
        return self._memory

    def set_memory(self, memory: SubspaceMemory | Bases | None) -> None:
        """Replaces the memory; moments and step counts stay, and a new domain begins: W₀ is the weights as they are.

        Raises:
            TypeError, ValueError: as the constructor; the optimizer is as before then.
        """
        given = self._of(memory)
        fitted = self._fit(given, "memory")
        self._memory, self._argument = memory, "memory"
        self._take(given, fitted)
        self._warn_of_rest()

    def set_projections(self, projections: ByParameter[Projection]) -> None:
        super().set_projections(projections)
        self._memory, self._argument = None, "projections"  # it is no longer followed

    set_projections.__doc__ = ProjectedAdamW.set_projections.__doc__

    @property
    def rest(self) -> list[str]:
        """The parameters that the memory does not protect, by name or place."""
        return [self._store.name(p).strip("'") for p in parameters_of(self.param_groups) if self._is_rest(p)]

    def _warn_of_rest(self) -> None:
        """Embeddings, norms and biases are what the documentation says; matrices that no memory saw are news."""
        if self._rest != "train" or not isinstance(self._memory, SubspaceMemory) or not self._projections:
            return
        found = [p for p in parameters_of(self.param_groups) if p.dim() > 1 and self._is_rest(p)]
        news = [self._store.name(p) for p in found if not self._is_embedding(p)]
        if news:
            warnings.warn(
                f"memory: {len(news)} parameters of two or more dimensions are trained unprotected, as it never saw "
                f"what goes into them; the first is {news[0]}. rest='freeze' leaves them as they are",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memory": self._memory, "_argument": self._argument}

    def _current(self) -> Given:
        return super()._current() if self._memory is None else self._of(self._memory)

    def _facts(self) -> tuple:
        version = self._memory.version if isinstance(self._memory, SubspaceMemory) else None
        return (*super()._facts(), version)

    def _is_rest(self, param: Tensor) -> bool:
        if param in self._given:
            # A head that is an embedding too is protected as the one, and as the other it would undo the rest.
            return self._rest == "freeze" and self._is_embedding(param)
        memory = self._memory
        if param.dim() < 2 or not isinstance(memory, SubspaceMemory):
            return param.dim() < 2
        # What a memory tracks and never saw run, no old output depends on.
        name = names_of(self.param_groups).get(param)
        return not (memory.tracks(weight_of(param)) if memory.is_bound else name in memory.names)

    def _takes_part(self, param: Tensor) -> bool:
        if self._rest == "freeze" and self._projections and self._is_embedding(param):
            return False
        return super()._takes_part(param)

    def _is_embedding(self, param: Tensor) -> bool:
        memory = self._memory
        if not isinstance(memory, SubspaceMemory):
            return False
        return (
            memory.is_embedding(param)
            if memory.is_bound
            else names_of(self.param_groups).get(param) in (memory.embeddings)
        )

    def _of(self, memory: SubspaceMemory | Bases | None) -> Given:
        """The projections that keep what a memory remembers."""
        given: dict[Tensor, LowRankProjection] = {}
        for param, (subspace, transposed) in subspaces_of(self.param_groups, memory).items():
            try:
                given[param] = self._projection(subspace, transposed)
                given[param].later = self._every > 1
            except (TypeError, ValueError) as error:
                raise type(error)(f"memory: parameter {self._store.name(param)}: {error}") from None
        return {**given}


def check_every(every: int) -> int:
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    return every


def subspaces_of(groups: Groups, memory: SubspaceMemory | Bases | None) -> dict[Tensor, tuple[Subspace | Tensor, bool]]:
    """By parameter what is used of its inputs, and whether it is transposed; those that nothing is known of are absent.

    Raises:
        TypeError: neither a memory nor a mapping.
        ValueError: a memory of another model.
    """
    if memory is None:
        return {}
    if isinstance(memory, Mapping):
        found = by_param(groups, memory, "memory", "basis")
        return {param: (basis, False) for param, basis in found.items() if basis is not None}
    if not isinstance(memory, SubspaceMemory):
        raise TypeError(
            f"memory: expected a SubspaceMemory or {{parameter or name: basis}}, got {type(memory).__name__}"
        )
    keys: dict[Tensor, Any]
    if memory.is_bound:
        # By the weight, since a leaf is its layer's parameter but not the memory's.
        weights = {param: weight_of(param) for param in parameters_of(groups)}
        keys = {param: weight for param, weight in weights.items() if memory.tracks(weight)}
        if not keys:
            raise ValueError(
                f"memory: no parameter of this optimizer is tracked, not even {memory.names[0]!r}: it was made for "
                "another model; call memory.bind(model), or build it from the model that is trained"
            )
    else:
        keys = _by_name(groups, memory)
    result: dict[Tensor, tuple[Subspace | Tensor, bool]] = {}
    for param, key in keys.items():
        if (subspace := memory.subspace(key)) is not None:
            result[param] = (subspace.to(param.device), memory.is_transposed(key))
    return result


def _by_name(groups: Groups, memory: SubspaceMemory) -> dict[Tensor, str]:
    names = by_name(groups)
    if not names:
        raise ValueError(
            "memory: it is bound to no model, and the parameters have no names; call memory.bind(model), or pass "
            "model.named_parameters() as params"
        )
    for name in memory.names:
        shape = tuple(weight_of(names[name]).shape) if name in names else None
        expected = memory.shape(name)[::-1] if memory.is_transposed(name) else memory.shape(name)
        if shape != expected:
            raise ValueError(
                f"memory: it tracks {name!r} of shape {expected}, but this optimizer has "
                f"{'no parameter of that name' if shape is None else f'it in shape {shape}'}: it was made for "
                "another model, or only some parameters are trained; call memory.bind(model)"
            )
    return {names[name]: name for name in memory.names}
