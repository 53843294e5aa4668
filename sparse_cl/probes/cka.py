"""Linear centred kernel alignment, unbiased and streamed."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_cl.reference.precision import full_precision
from sparse_cl.subspace.moments import row_blocks

from .features import Moment

MIN_TOKENS = 4
"""The unbiased estimator divides by n (n − 3)."""


class PairedMoments:
    """Two feature matrices X (t, n) and Y (t, m) of the same tokens, streamed: all that their unbiased CKA needs.

    The unbiased HSIC of Song et al. 2012 (eq. 5), with which Nguyen et al. 2021 debias CKA, is for linear kernels
    K = X Xᵀ and L = Y Yᵀ, their diagonals set to zero, a polynomial of Σx, Σy, XᵀY, Σ‖y‖²x, Σ‖x‖²y and Σ‖x‖²‖y‖². So
    no t × t matrix is made, and nothing is estimated by minibatches.

    24 n² bytes for a width of n.
    """

    def __init__(self, x: Moment, y: Moment):
        """x, y: empty ones; each about a point near its mean."""
        self.x, self.y = x, y
        self.cross = x.sum.new_zeros(len(x.sum), len(y.sum))
        # Σ w v for the rows v of one matrix weighted by the squared norms w of another's: by v, then w.
        self.weighted = {pair: (self.x, self.y)["xy".index(pair[0])].sum.clone() for pair in ("xx", "xy", "yx", "yy")}
        self.norms = {pair: x.sum.new_zeros(()) for pair in ("xx", "xy", "yy")}

    @classmethod
    def about(cls, x: Tensor, y: Tensor) -> PairedMoments:
        return cls(Moment.about(x), Moment.about(y))

    def empty(self) -> PairedMoments:
        """One about the same points, that this can be joined with."""
        return PairedMoments(self.x.empty(), self.y.empty())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Counts rows (t, n) and (t, m)."""
        self.x.add(x)
        self.y.add(y)
        blocks = zip(row_blocks(x, self.x.shift.dtype), row_blocks(y, self.y.shift.dtype), strict=True)
        for a, b in blocks:
            rows = {"x": a - self.x.shift, "y": b - self.y.shift}
            with full_precision(x.device):
                self.cross += rows["x"].mT @ rows["y"]
            rows = {which: v.double() for which, v in rows.items()}
            squares = {which: v.square().sum(1) for which, v in rows.items()}
            for pair, total in self.weighted.items():
                total += squares[pair[1]] @ rows[pair[0]]
            for pair, total in self.norms.items():
                total += squares[pair[0]] @ squares[pair[1]]

    def joined(self, other: PairedMoments) -> PairedMoments:
        """The moments of the tokens of both; they must be about one point."""
        both = PairedMoments(self.x.joined(other.x), self.y.joined(other.y))
        both.cross = self.cross + other.cross
        both.weighted = {pair: total + other.weighted[pair] for pair, total in self.weighted.items()}
        both.norms = {pair: total + other.norms[pair] for pair, total in self.norms.items()}
        return both

    def hsic(self, pair: str) -> Tensor:
        """Unbiased HSIC of "xx", "xy" or "yy": 0-d float64. It does not depend on the shifts."""
        first, second = ({"x": self.x, "y": self.y}[which] for which in pair)
        product = self.cross if pair == "xy" else first.product
        n = first.count
        if n < MIN_TOKENS:
            raise ValueError(f"batches: expected at least {MIN_TOKENS} tokens for CKA, got {n}")
        # tr(KL), 1ᵀK1, 1ᵀL1 and 1ᵀKL1, for kernels without their diagonals.
        trace = product.square().sum() - self.norms[pair]
        sum_k = first.sum.square().sum() - first.product.trace()
        sum_l = second.sum.square().sum() - second.product.trace()
        both = (
            first.sum @ product @ second.sum
            - first.sum @ self.weighted[pair]
            - second.sum @ self.weighted[pair[::-1]]
            + self.norms[pair]
        )
        return (trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))

    def cka(self) -> float | None:
        """HSIC(X, Y) / √(HSIC(X, X) HSIC(Y, Y)): 1 for rotated and scaled features, about 0 for unrelated ones.

        It can be below 0. None where an unbiased HSIC is not positive: features that do not vary, or too few tokens.
        """
        own = torch.stack([self.hsic("xx"), self.hsic("yy")])
        return (self.hsic("xy") / own.prod().sqrt()).item() if (own > 0).all() else None
