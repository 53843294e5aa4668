"""SOAP: AdamW in the eigenbasis of Shampoo's preconditioner, without any pull."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sparse_cl.methods.adamw import AdamW


class SOAP(torch.optim.Optimizer):
    """Vyas et al. 2024, algorithm 3: with L = EMA[G Gᵀ], R = EMA[Gᵀ G] and their eigenvectors Q_L, Q_R, Adam's second
    moment is that of Q_Lᵀ G Q_R, and the update is turned back.

    The bases are computed at the first step and every `frequency` steps after it (by eigh, where the paper takes one
    step of a power iteration). A side longer than `most` is not turned; vectors get plain AdamW.

    Args:
        params, lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.
        frequency: steps between two bases.
        most: longest side that has one.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        frequency: int = 10,
        most: int = 2048,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "frequency": frequency, "most": most})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)
        return loss

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        sides = [side for side in range(2) if p.dim() == 2 and p.shape[side] <= group["most"]]
        if not state:
            state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            state |= {f"moment{side}": p.new_zeros(p.shape[side], p.shape[side]) for side in sides}
        state["step"] += 1
        step: int = state["step"]
        for side in sides:
            rows = grad if side == 0 else grad.mT
            state[f"moment{side}"].lerp_(rows @ rows.mT, 1 - beta2)
            if (step - 1) % group["frequency"] == 0:
                state[f"basis{side}"] = torch.linalg.eigh(state[f"moment{side}"].double())[1].flip(1).to(p)
        bases = [state.get("basis0"), state.get("basis1")]
        state["m"].lerp_(grad, 1 - beta1)
        turned = _turn(grad, bases)
        state["v"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
        denominator = (state["v"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = _turn(_turn(state["m"], bases) / denominator, [None if b is None else b.mT for b in bases])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] / (1 - beta1**step))


def _turn(x: Tensor, bases: list[Tensor | None]) -> Tensor:
    """Q_Lᵀ x Q_R, of the bases that there are."""
    left, right = bases
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


class SOAPMethod(AdamW):
    """Sequential full fine-tuning by `SOAP`: what the basis does without a pull."""

    name = "soap"

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return SOAP(model.parameters(), lr=lr)
