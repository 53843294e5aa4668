"""Tables of rows, such as an embedding's: layers whose inputs are one-hot, so that used rows stand for directions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.layout import whole

#: Rows of the first lookup that are compared with what the module returned.
_COMPARED = 64


class UsedRows:
    """The rows of a table (V, n) that earlier domains look up, and how often: a value.

    Args:
        index: (k,) int64, ascending.
        values: f (k,), above 0: the share of a domain's lookups that are of each, Σ w_d f_d over domains.
    """

    def __init__(self, index: Tensor, values: Tensor) -> None:
        self.index, self.values = index, values

    @property
    def usage(self) -> Tensor:
        """k f_v (k,): 1 for a row that one domain looks up as often as an average one of those in use."""
        return self.values * len(self.index)

    def to(self, device: torch.device) -> UsedRows:
        return UsedRows(self.index.to(device), self.values.to(device))


@dataclass
class Table:
    """One embedding: what is used of its rows, and what was looked up since the last consolidation.

    Attributes:
        height: V, rows.
        param: None while the memory is bound to no model.
        modules: embeddings that have this weight.
        shares: (V,) float32, Σ w_d f_d over earlier domains; None before the first.
        counts: (V,) float64, lookups of the domain that is observed; None before the first.
        opaque: whether a module was seen to return anything but rows of its weight, times a number.
    """

    name: str
    height: int
    param: Tensor | None = None
    modules: list[nn.Module] = field(default_factory=list)
    shares: Tensor | None = None
    counts: Tensor | None = None
    opaque: bool = False

    def used(self) -> UsedRows | None:
        """The used rows, where the parameter is now; None while there are none."""
        if self.shares is None:
            return None
        index = self.shares.nonzero().flatten()
        found = UsedRows(index, self.shares[index])
        return found if self.param is None else found.to(self.param.device)

    def looked_up(self, ids: Any, rows: Any, weight: Tensor) -> Tensor | None:
        """The ids that a forward pass looked up; None if the module does anything but that.

        Args:
            ids, rows: the module's first argument and what it returned.
            weight: the module's, as it is in the pass.
        """
        if isinstance(ids, Tensor) and ids.numel() == 0:
            return None
        if not self.opaque and self.counts is None:
            self.opaque = not self._is_lookup(ids, rows, weight)
        return None if self.opaque else ids

    def count(self, lookups: Tensor) -> None:
        """Adds how often each row (V,) was looked up in the domain that is observed."""
        self.counts = lookups if self.counts is None else self.counts.to(lookups.device) + lookups

    def _is_lookup(self, ids: Any, rows: Any, weight: Tensor) -> bool:
        """Subclasses compute positions, or scale what they return."""
        if not isinstance(ids, Tensor) or ids.is_floating_point() or not isinstance(rows, Tensor) or ids.numel() == 0:
            return False
        if rows.shape[:-1] != ids.shape or rows.shape[-1] != weight.shape[-1]:
            return False
        ids = ids.flatten()[:_COMPARED]
        if int(ids.min()) < 0 or int(ids.max()) >= self.height:
            return False
        expected, found = whole(weight).detach()[ids].double(), rows.detach().flatten(0, -2)[:_COMPARED].double()
        scale = found.norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny)
        off = (found - expected * scale).abs() - 0.02 * found.abs()
        return bool((off <= 0.01 * found.abs().max()).all())

    def end_domain(self, weight: float, fade: float) -> None:
        """Adds what was looked up to what is remembered."""
        if self.shares is not None:
            self.shares = self.shares * fade
        if self.counts is not None and bool(self.counts.any()):
            new = (self.counts / self.counts.sum() * weight).float()
            self.shares = new if self.shares is None else self.shares.to(new.device) + new
        self.counts = None

    def fit(self, height: int) -> None:
        """Takes a table that has grown: new rows are used by nobody."""
        for name in ("shares", "counts"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, torch.nn.functional.pad(old, (0, height - len(old))))
        self.height = height
