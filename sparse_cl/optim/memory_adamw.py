"""Optimizers that keep what a memory remembers: the projections of its layers, followed as it grows."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparse_cl.layout import state_dtype
from sparse_cl.subspace import Subspace, SubspaceMemory, UsedRows

from .leaf import whole_of
from .low_rank import LowRankProjection
from .names import (
    ByParameter,
    Groups,
    by_name,
    by_param,
    label_of,
    name_of,
    named,
    parameters_of,
    refuse_flattened,
)
from .plan import GroupPlan
from .projected_adamw import Given, ProjectedAdamW
from .projection import Projection

Bases = ByParameter[Subspace | Tensor]


class AdapterBases(dict[Any, Subspace]):
    """The subspaces of an adapter's parameters, which says that no others are protected.

    Attributes:
        free: parameters of the adapter that need no subspace.
    """

    def __init__(self, subspaces: Mapping[Any, Subspace], free: Sequence[Tensor]) -> None:
        super().__init__(subspaces)
        self.free = list(free)


@dataclass(frozen=True)
class Known:
    """What is known of one parameter.

    Attributes:
        subspace: what is used of its inputs.
        transposed: the weight is (n, m).
        rows: of an embedding, what is used of its rows.
    """

    subspace: Subspace | Tensor
    transposed: bool = False
    rows: UsedRows | None = None


class Guard(Protocol):
    """What protects the parameters of an optimizer."""

    @property
    def memory(self) -> SubspaceMemory | Bases | None:
        """The memory in force; None: nothing is protected."""

    def stepped(self) -> set[int]:
        """The identities of the optimizer's parameters."""


guards = WeakSet[Guard]()
"""All that there are, since several optimizers may train one model."""


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
        guards.add(self)

    @abstractmethod
    def _projection(self, known: Known) -> LowRankProjection:
        """The projection that keeps what is known of a parameter."""

    def _holds_rows(self) -> bool:
        """Whether an embedding's used rows are protected."""
        return self._rest == "train"

    @property
    def memory(self) -> SubspaceMemory | Bases | None:
        """The memory in force."""
        return self._memory

    @property
    def every(self) -> int:
        """Steps between two corrections."""
        return self._every

    def set_memory(self, memory: SubspaceMemory | Bases | None) -> None:
        """Replaces the memory; moments and step counts stay, and a new domain begins: W₀ is the weights as they are.

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

    @property
    def rest(self) -> list[str]:
        """The parameters that the memory does not protect, by name or place."""
        return [label_of(self.param_groups, p) for p in parameters_of(self.param_groups) if self._is_rest(p)]

    def _plan(self, key: tuple, group: dict[str, Any], grads: list[Tensor | None]) -> GroupPlan:
        if self._projections:
            stepped = [p for p, grad in zip(group["params"], grads, strict=True) if grad is not None]
            rest = (p for p in stepped if self._is_rest(p))
            news = news_of(rest, self._memory, self.param_groups, self._rest == "train")
            warn_of_rest(news, self._rest, self._warned)
            warn_of_others(self, self._warned)
        return super()._plan(key, group, grads)

    def stepped(self) -> set[int]:
        """The identities of the weights that it steps; of a leaf, its layer's weight."""
        return {id(whole_of(p)) for p in parameters_of(self.param_groups)}

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
        return param.dim() < 2 or not is_exempt(param, self._memory)

    def _takes_part(self, param: Tensor) -> bool:
        if self._rest == "freeze" and self._projections and self._is_embedding(param):
            return False
        return super()._takes_part(param)

    def _is_embedding(self, param: Tensor) -> bool:
        return is_embedding(param, self._memory, self.param_groups)

    def _of(self, memory: SubspaceMemory | Bases | None) -> Given:
        """The projections that keep what a memory remembers."""
        given: dict[Tensor, LowRankProjection] = {}
        for param, known in known_of(self.param_groups, memory, self._holds_rows()).items():
            try:
                given[param] = self._projection(known)
                given[param].later = self._every > 1
            except (TypeError, ValueError) as error:
                raise type(error)(f"memory: parameter {self._store.name(param)}: {error}") from None
        return {**given}


def check_every(every: int) -> int:
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    return every


def is_exempt(param: Tensor, memory: SubspaceMemory | Bases | None) -> bool:
    """Whether a matrix without a basis may train: what a caller's own mapping leaves out is the caller's choice."""
    if isinstance(memory, AdapterBases):
        return any(param is other for other in memory.free)
    return not isinstance(memory, SubspaceMemory)


def is_embedding(param: Tensor, memory: SubspaceMemory | Bases | None, groups: Groups, counted: bool = False) -> bool:
    """Whether a memory knows that ``param`` belongs to an embedding; ``counted``: to one whose lookups it knows."""
    if not isinstance(memory, SubspaceMemory):
        return False
    return memory.is_embedding(param if memory.is_bound else _tables(groups, memory).get(param, ""), counted)


def news_of(
    rest: Iterable[Tensor], memory: SubspaceMemory | Bases | None, groups: Groups, trained: bool = True
) -> list[str]:
    """Names of what is left of the rest but for norms, biases and embeddings; of these those that train unobserved."""
    matrices = (p for p in rest if whole_of(p).dim() > 1 and not is_exempt(p, memory))
    return [name_of(groups, p) for p in matrices if not is_embedding(p, memory, groups, counted=trained)]


def warn_of_rest(names: Sequence[str], how: str | None, warned: set[str]) -> None:
    """Says once which matrices a memory does not protect, as it never saw what goes into them.

    Args:
        how: the optimizer's `rest`; None: it has no such choice, and trains them.
    """
    news = [name for name in names if name not in warned]
    warned.update(news)
    if news:
        done, other = "frozen", "; rest='train' trains them unprotected"
        if how != "freeze":
            done, other = "trained unprotected", "; rest='freeze' leaves them as they are" if how else ""
        warnings.warn(
            f"memory: {len(news)} parameters of two or more dimensions are {done}, as it never saw what goes into "
            f"them: {', '.join(news[:4])}{', …' if len(news) > 4 else ''}{other}",
            stacklevel=2,
        )


def warn_of_others(guard: Guard, warned: set[str]) -> None:
    """Says once which parameters the memory knows that have gradients and that no optimizer with its protection has."""
    memory = guard.memory
    if not isinstance(memory, SubspaceMemory):
        return
    own = set[int]().union(*(other.stepped() for other in (guard, *guards) if other.memory is memory))
    found = (name for name, param in memory.seen().items() if param.grad is not None and id(param) not in own)
    news = [name for name in found if name not in warned]
    warned.update(news)
    if news:
        warnings.warn(
            f"memory: {len(news)} weights that it knows have gradients and are not in this optimizer, {news[0]} the "
            "first; another optimizer that steps them has to be protected too: protect(other, memory). What nobody "
            "trains, freeze: requires_grad_(False)",
            stacklevel=2,
        )


def known_of(groups: Groups, memory: SubspaceMemory | Bases | None, with_rows: bool = True) -> dict[Tensor, Known]:
    """What is known of each parameter; those that nothing is known of are absent.

    Raises:
        TypeError: neither a memory nor a mapping.
        ValueError: a memory of another model.
        RuntimeError: parameters have been flattened.
    """
    if memory is None:
        return {}
    refuse_flattened(groups, "memory")
    if isinstance(memory, Mapping):
        found = by_param(groups, memory, "memory", "basis")
        return {param: Known(basis) for param, basis in found.items() if basis is not None}
    if not isinstance(memory, SubspaceMemory):
        raise TypeError(
            f"memory: expected a SubspaceMemory or {{parameter or name: basis}}, got {type(memory).__name__}"
        )
    keys: dict[Tensor, Any]
    if memory.is_bound:
        # By the weight, since a leaf is its layer's parameter but not the memory's.
        weights = {param: whole_of(param) for param in parameters_of(groups)}
        keys = {param: weight for param, weight in weights.items() if memory.tracks(weight)}
        if not keys and not any(map(memory.is_embedding, weights.values())):
            raise ValueError(
                f"memory: no parameter of this optimizer is tracked, not even {memory.names[0]!r}: it was made for "
                "another model; call memory.bind(model), or build it from the model that is trained"
            )
    else:
        keys = _by_name(groups, memory)
    result: dict[Tensor, Known] = {}
    for param, key in keys.items():
        if (subspace := memory.subspace(key)) is not None:
            result[param] = Known(subspace.to(param.device), memory.is_transposed(key))
    tables = {} if memory.is_bound else _tables(groups, memory)
    for param in parameters_of(groups) if with_rows else ():
        if (rows := memory.used_rows(param if memory.is_bound else tables.get(param, ""))) is not None:
            own = result.get(param) or Known(_nothing_of(param))
            result[param] = replace(own, rows=rows.to(param.device))
    return result


def _nothing_of(param: Tensor) -> Subspace:
    """The subspace of an embedding that is no layer's weight too."""
    return Subspace(torch.zeros(param.shape[1], 0, dtype=state_dtype(param.dtype), device=param.device))


def _tables(groups: Groups, memory: SubspaceMemory) -> dict[Tensor, str]:
    """The embeddings that a memory bound to no model knows, with its own names of them."""
    names = by_name(groups)
    found = {name: named(names, name) for name in memory.embeddings}
    return {param: name for name, param in found.items() if param is not None}


def _by_name(groups: Groups, memory: SubspaceMemory) -> dict[Tensor, str]:
    names = by_name(groups)
    if not names:
        raise ValueError(
            "memory: it is bound to no model, and the parameters have no names; call memory.bind(model), or pass "
            "model.named_parameters() as params"
        )
    found = {name: named(names, name) for name in memory.names}
    for name, param in found.items():
        shape = None if param is None else tuple(whole_of(param).shape)
        expected = memory.shape(name)[::-1] if memory.is_transposed(name) else memory.shape(name)
        if shape != expected:
            raise ValueError(
                f"memory: it tracks {name!r} of shape {expected}, but this optimizer has "
                f"{'no parameter of that name' if shape is None else f'it in shape {shape}'}: it was made for "
                "another model, or only some parameters are trained; call memory.bind(model)"
            )
    return {param: name for name, param in found.items() if param is not None}
