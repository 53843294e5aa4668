"""LoRA with strong weight decay."""

from __future__ import annotations

from sparse_cl.methods.lora import ALPHA, RANK, LoRA


class LoRAWeightDecay(LoRA):
    """LoRA with weight decay 0.3: decay of A and B draws the model back to its base, where nothing was forgotten.

    Audits of continual fine-tuning find it about as good as methods made for the purpose.
    """

    name = "lora-wd"

    def __init__(self, rank: int = RANK, alpha: int = ALPHA, weight_decay: float = 0.3) -> None:
        super().__init__(rank, alpha, weight_decay)
