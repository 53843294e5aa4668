"""OSF: the weight's own largest singular directions stay, the others are trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparse_cl.methods.base import Batch, Method
from sparse_cl.methods.options import check_share
from sparse_cl.models.parts import is_transposed


class OSF(Method):
    """Orthogonal subspace fine-tuning (Nayak et al. 2025) by PEFT, merged after each domain and decomposed anew.

    Each linear layer but the head is U S V by its singular values; the largest stay frozen, and the rest of U, S and V
    is trained by AdamW, with gradients projected off the frozen directions. AdamW divides those gradients element by
    element, so its updates enter the frozen directions again (see tests/test_methods_osf.py for how much). Embeddings,
    norms and the head stay as they were. PEFT has one share for all layers and domains; the paper's own grows with a
    layer's importance.

    Args:
        effective_rank: share of each layer's singular directions that stay frozen.
    """

    name = "osf"
    kind = "baseline"
    options = ("effective_rank",)
    default_lr = 2e-3

    def __init__(self, effective_rank: float = 0.5) -> None:
        self.effective_rank = float(check_share("effective_rank", effective_rank, one=False))
        self._wrapper: Any = None

    def check(self, model: nn.Module) -> None:
        super().check(model)
        for name, module in model.named_modules():
            if is_transposed(module):
                raise ValueError(
                    f"{name} is a {type(module).__name__}, which PEFT's OSF leaves out; osf needs a model of "
                    "torch.nn.Linear layers. Run another method, or another model"
                )

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        import peft

        # The layers are replaced inside the model, which so stays what the Trainer saves as an ordinary model.
        config = peft.OSFConfig(effective_rank=self.effective_rank, target_modules="all-linear")
        self._wrapper = peft.get_peft_model(model, config)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        # `unload` would drop what was trained.
        self._wrapper.merge_and_unload()
        self._wrapper = None
