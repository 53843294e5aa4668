"""Parameters of which each process holds a part: the DTensors of FSDP2 and of tensor parallelism."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_cl.layout import is_sharded
from sparse_cl.masks import Mask

from .leaf import owner_of
from .names import Groups, name_of, parameters_of


@dataclass(frozen=True)
class Piece:
    """The block of a weight that this process holds.

    Attributes:
        shape: of the whole weight.
        offset, size: where the block begins in each dimension, and its shape.
        mesh: the processes, a ``DeviceMesh``.
        dims: the dimensions of the mesh over which the weight is split; over others it is replicated.
        number: which of the blocks it is.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    mesh: Any
    dims: tuple[int, ...]
    number: int

    @property
    def shared(self) -> tuple[Any, tuple[int, ...]]:
        """What two pieces have in common if the same processes hold what belongs to them."""
        return self.mesh, self.dims

    @property
    def has_rows(self) -> bool:
        """Whether the rows of this block are whole."""
        return self.size[1:] == self.shape[1:]


def piece_of(param: Any) -> Piece | None:
    """What this process holds of ``param``; None if it holds the whole weight as an ordinary tensor.

    Raises:
        ValueError: it is split in another way than into rows or columns.
    """
    if not is_sharded(param):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements
    # A strided shard, which FSDP2 makes over tensor parallelism, is no Shard.
    split = {i: getattr(p, "dim", None) for i, p in enumerate(placements) if not p.is_replicate()}
    if mesh.ndim > 2 or not set(split.values()) <= {0, 1} or any(p.is_partial() for p in placements):
        raise ValueError(
            f"is placed as {placements} on a mesh of {mesh.ndim} dimensions; expected Replicate, Shard(0) or Shard(1) "
            "on a mesh of one or two (FSDP2, HSDP, tensor parallelism)"
        )
    size, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    number = 0
    for i in split:
        number = number * mesh.size(i) + mesh.get_local_rank(i)
    # Where the weight has fewer rows than there are processes, some hold none, and begin past its end.
    offset = tuple(min(o, s) for o, s in zip(offset, param.shape, strict=True))
    return Piece(tuple(param.shape), offset, tuple(size), mesh, tuple(split), number)


def check_piece(what: str, param: Any) -> None:
    """Raises a ValueError that begins with ``what`` if a step cannot take ``param`` as it is split."""
    try:
        piece_of(param)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from None
    owner = owner_of(param)
    if owner is not None and is_sharded(owner.weight) and not is_sharded(param):
        raise ValueError(
            f"{what} is the leaf of an ActiveLinear whose weight is split over processes, while the leaf is whole; let "
            "fully_shard split both"
        )


def gradient_of(param: Any) -> Any:
    """The gradient of what this process holds of ``param``."""
    grad = param.grad
    if type(grad) is Tensor or not is_sharded(grad):
        return grad
    if is_sharded(param) and (grad.placements, grad.device_mesh) != (param.placements, param.device_mesh):
        # Kept, so that what clips it and what steps it see one tensor.
        param.grad = grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


def from_all(mesh: Any, value: Any) -> list[Any]:
    """``value`` of every process of a mesh, in the same order everywhere. All of them must call it."""
    from torch.distributed import all_gather_object

    found = [value]
    for dim in range(mesh.ndim):
        lists: list[Any] = [None] * mesh.size(dim)
        all_gather_object(lists, found, mesh.get_group(dim))
        found = [one for part in lists for one in part]
    return found


def added(value: Tensor, mesh: Any, dims: Iterable[int]) -> Tensor:
    """The sum of what processes have along dimensions of a mesh. All of them must call it."""
    from torch.distributed import all_reduce

    total = value.to(mesh.device_type, copy=True, memory_format=torch.contiguous_format)
    for dim in dims:
        all_reduce(total, group=mesh.get_group(dim))
    return total.to(value.device)


def summed(value: Tensor, piece: Piece | None) -> Tensor:
    """The sum of what the holders of a weight's other pieces have; of a weight that is whole, ``value`` itself.

    All processes of the mesh must call it.
    """
    return value if piece is None else added(value, *piece.shared)


def check_agreement(groups: Groups, masks: Mapping[Tensor, Mask], more: Mapping[str, str]) -> None:
    """Raises a ValueError in all processes if they differ in their options or masks, or in what ``more`` says.

    All of them must call it.
    """
    from torch.distributed import get_rank

    split: list[Any] = [param for param in parameters_of(groups) if is_sharded(param)]
    meshes = dict.fromkeys(param.device_mesh for param in split)
    if not meshes:
        return
    facts = {
        f"{key} of group {number}": _shown(value)
        for number, group in enumerate(groups)
        for key, value in group.items()
        if key != "params"
    }
    facts |= more
    for param in parameters_of(groups):
        owner = owner_of(param)
        mask = masks.get(param) if owner is None else owner.mask
        facts[f"the mask of parameter {name_of(groups, param)}"] = "none" if mask is None else _digest(mask)
    for mesh in meshes:
        (first, theirs), *others = from_all(mesh, (get_rank(), facts))
        for rank, found in others:
            for what in theirs.keys() | found.keys():
                a, b = theirs.get(what, "absent"), found.get(what, "absent")
                if a != b:
                    raise ValueError(
                        f"processes differ: {what} is {a} in process {first} and {b} in process {rank}; give all of "
                        "them the same"
                    )


def _shown(value: Any) -> str:
    return str(value.tolist() if isinstance(value, Tensor) else value)


def _digest(mask: Mask) -> str:
    """A mask in words that are the same for equal masks alone."""
    hashed = hashlib.sha256()
    for section in mask.sections().values():
        hashed.update(section.cpu().numpy().tobytes())
    return f"{mask!r} (sha256 {hashed.hexdigest()[:16]})"
