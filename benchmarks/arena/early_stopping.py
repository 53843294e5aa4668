"""Less training: what is not learned cannot overwrite."""

from __future__ import annotations

import math

from sparse_cl.methods.adamw import AdamW
from sparse_cl.methods.options import check_share


class EarlyStopping(AdamW):
    """AdamW with fewer steps in each domain, and a schedule that ends with them.

    Over its shares and rates it draws the curve that a method has to beat: learning against forgetting, where the only
    remedy is to learn less.

    Args:
        share: of a domain's steps, rounded up.
    """

    name = "early-stopping"
    options = ("share",)

    def __init__(self, share: float = 0.5) -> None:
        self.share = check_share("share", share)

    def steps(self, steps: int, number: int, domains: int, protected: bool = False) -> int:
        return math.ceil(self.share * steps)
