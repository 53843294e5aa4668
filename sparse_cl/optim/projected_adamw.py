"""AdamW whose updates pass projections that the caller made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_cl.masks import Mask

from .projected_step import Scratch
from .projection import WholeProjection
from .state import PROJECTION
from .subspace_projected_adamw import SubspaceProjectedAdamW


class ProjectedAdamW(SubspaceProjectedAdamW):
    """AdamW whose whole update of a parameter, weight decay included, passes a projection.

    As in :class:`SubspaceProjectedAdamW` it is applied to the float32 master, after AdamW: AdamW divides entry by
    entry, and would turn a projected gradient back.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, and further options: as :class:`SubspaceProjectedAdamW`.
        projections: {parameter or its name: projection}, a ``LowRankPull``, ``ElasticPull`` or ``CurvatureProjection``;
            one that takes nothing leaves plain AdamW.
        rest: what happens to parameters without a projection once there is any: ``"freeze"`` or ``"train"``.

    Raises:
        ValueError: as there; masks (what a mask leaves of an update has other coordinates); a projection for another
            shape or device; AdamW in turned coordinates on a half-precision parameter without a master.
    """

    def __init__(
        self, params, *arguments: Any, projections: Mapping[Tensor | str, WholeProjection] | None = None, **own: Any
    ):
        _refuse_masks(own.get("masks"))
        super().__init__(params, *arguments, memory=projections, **own)

    def set_masks(self, masks: Mapping[Tensor | str, Mask], carry: str = "intersection") -> None:
        _refuse_masks(masks)
        super().set_masks(masks, carry)

    def _resolve_memory(self, memory) -> dict[Tensor, WholeProjection]:
        found = self._by_param(memory or {}, "projections", "projection")
        for param, projection in found.items():
            where = f"projections: parameter {self._name(param)}"
            if not isinstance(projection, WholeProjection):
                raise TypeError(
                    f"{where}: expected a LowRankPull, ElasticPull or CurvatureProjection, got "
                    f"{type(projection).__name__}"
                )
            if not projection.fits(tuple(param.shape)):
                raise ValueError(
                    f"{where} has shape {tuple(param.shape)}, but its projection is for {projection.expected}"
                )
            if projection.device != param.device:
                raise ValueError(
                    f"{where} is on {param.device}, but its projection is on {projection.device}; make it there"
                )
            if projection.turn is not None and param.element_size() < 4 and not self._options_of(param)["master"]:
                raise ValueError(
                    f"{where} is {param.dtype} without a master, which cannot be turned into the directions of its "
                    "projection; leave master_weights on"
                )
        return found

    def _options_of(self, param: Tensor) -> dict[str, Any]:
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        return self._options(param, group)

    def _take(self, subspaces: dict[Tensor, WholeProjection]) -> None:
        self._subspaces = subspaces
        for param, old in self._projections.items():
            if subspaces.get(param) is not old:
                # What it kept is of other directions, or of where an earlier domain began.
                for name in [name for name in self.state.get(param, ()) if name.startswith(PROJECTION)]:
                    del self.state[param][name]
        self._projections = {param: projection for param, projection in subspaces.items() if projection.any}
        for param, projection in self._projections.items():
            if not projection.free and self._name(param) not in self._warned:
                self._warned.add(self._name(param))
                warnings.warn(
                    f"parameter {self._name(param)}: all its directions are protected, so it is not updated any more",
                    stacklevel=4,
                )
        self._group_plans, self._scratch = {}, Scratch()
        self._seen = self._state_of_memory()

    def _is_rest(self, param: Tensor) -> bool:
        return param not in self._subspaces


def _refuse_masks(masks: Mapping[Tensor | str, Mask] | None) -> None:
    if masks:
        raise ValueError(
            "masks: what a mask leaves of an update lies in other directions; use SubspaceProjectedAdamW with "
            "masks, or leave them out"
        )
