"""Nulls of `elastic`: the same pull, without what it knows of the old inputs, or with AdamW's own moments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparse_cl.methods.elastic import Elastic
from sparse_cl.optim import ElasticAdamW
from sparse_cl.optim.low_rank import LowRankProjection
from sparse_cl.optim.memory_adamw import Known
from sparse_cl.subspace import Subspace

NULLS = ("directions", "strengths", "one", "moments")


class ElasticNull(Elastic):
    """`Elastic` whose pull knows less: what it loses by that is what the knowledge is worth.

    Rows of embeddings are pulled as by `Elastic`.

    Args:
        null: "directions": as many random ones, with the strengths; "strengths": these in random order; "one": their
            mean for all; "moments": it knows all, but each entry has a second moment, as in AdamW, not each row.
    """

    name = "elastic-null"
    kind = "baseline"
    options = (*Elastic.options, "null")

    def __init__(self, *arguments: Any, null: str = "directions", **options: Any) -> None:
        super().__init__(*arguments, **options)
        if null not in NULLS:
            raise ValueError(f"null: expected {', '.join(map(repr, NULLS))}, got {null!r}")
        self.null = null

    def _adamw(self, *arguments: Any, **options: Any) -> ElasticAdamW:
        if self.null == "moments":
            return super()._adamw(*arguments, **{**options, "second_moment": "entry"})
        return _NullAdamW(self.null, *arguments, **options)


class _NullAdamW(ElasticAdamW):
    def __init__(self, null: str, *arguments: Any, **options: Any) -> None:
        self._null, self._draw = null, torch.Generator().manual_seed(torch.initial_seed())
        super().__init__(*arguments, **options)

    def _projection(self, known: Known) -> LowRankProjection:
        assert isinstance(known.subspace, Subspace)
        return super()._projection(replace(known, subspace=self._without(known.subspace)))

    def _without(self, known: Subspace) -> Subspace:
        basis, values = known.basis, known.values
        if self._null == "directions":
            drawn = torch.randn(basis.shape, generator=self._draw, dtype=torch.float64)
            basis = torch.linalg.qr(drawn)[0].to(basis)
        elif self._null == "strengths":
            values = values[torch.randperm(len(values), generator=self._draw).to(values.device)]
        else:
            values = torch.full_like(values, float(values.mean())) if len(values) else values
        return Subspace(basis, values, known.outside, known.mean)
