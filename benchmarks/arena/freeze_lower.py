"""Freezing the lower half: what is below the middle of the model never changes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sparse_cl.methods.adamw import AdamW
from sparse_cl.methods.base import Batch
from sparse_cl.methods.options import check_share
from sparse_cl.models.parts import find_blocks


class FreezeLower(AdamW):
    """AdamW on the upper blocks; the lower ones and all embeddings stay bit-identical.

    A head that is tied to the embeddings is the same matrix, and frozen with them; a head of its own is trained. Audits
    of continual fine-tuning find it about as good as methods made for the purpose.

    Args:
        frozen_share: of the blocks, rounded down, the lowest ones.
    """

    name = "freeze-lower"
    options = ("frozen_share",)

    def __init__(self, frozen_share: float = 0.5) -> None:
        self.frozen_share = check_share("frozen_share", frozen_share, one=False)

    def check(self, model: nn.Module) -> None:
        super().check(model)
        find_blocks(model)

    def frozen(self, model: nn.Module) -> list[nn.Module]:
        """The modules that stay as they are."""
        blocks = [block.module for block in find_blocks(model)]
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        return [*blocks[: int(self.frozen_share * len(blocks))], *embeddings]

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        for module in self.frozen(model):
            module.requires_grad_(False)
        return model
