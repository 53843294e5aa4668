"""MoFO: of each weight only the entries with the largest momentum are stepped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_cl.methods.base import Method
from sparse_cl.methods.options import check_at_least, check_share


class MoFOAdamW(Optimizer):
    """AdamW whose step is applied only where |m| is among the largest of its tensor (Chen et al. 2024).

    All moments are kept and updated, in float32 or wider, and weight decay stays dense, as in the authors' release;
    so every entry moves. As there, tensors of one dimension (norms, biases) are stepped whole.

    Args:
        params: as any optimizer takes them.
        lr, betas, eps, weight_decay: AdamW's.
        fraction: of the entries of a tensor that are stepped, rounded down, at least one; entries that tie with the
            last of them are stepped too.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fraction: float = 0.15,
    ) -> None:
        check_share("fraction", fraction)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fraction": fraction}
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts to the parameter's dtype what is no step count.
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        for number, p in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state_dict["state"].get(number, {}):
                    self.state[p][name] = state_dict["state"][number][name].to(p.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
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
        lr, (beta1, beta2), state = group["lr"], group["betas"], self.state[p]
        wide = torch.promote_types(p.dtype, torch.float32)
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
        state["step"] += 1
        grad = grad.to(wide)
        m = state["exp_avg"].lerp_(grad, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = v.sqrt().div_((1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        update = m.div(root)
        if p.dim() > 1 and group["fraction"] < 1:
            magnitude = m.abs()
            kept = max(1, int(p.numel() * group["fraction"]))
            least = magnitude.flatten().kthvalue(p.numel() - kept + 1).values
            update.mul_(magnitude >= least)
        p.add_(update, alpha=-lr / (1 - beta1 ** state["step"]))


class MoFO(Method):
    """Full fine-tuning by `MoFOAdamW`.

    Args:
        fraction: of each weight that a step moves; the authors recommend 0.05 to 0.2.
        weight_decay: of all entries.
    """

    name = "mofo"
    kind = "baseline"
    options = ("fraction", "weight_decay")
    default_lr = 2e-3

    def __init__(self, fraction: float = 0.15, weight_decay: float = 0.01) -> None:
        self.fraction = check_share("fraction", fraction)
        self.weight_decay = check_at_least("weight_decay", weight_decay, 0)

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return MoFOAdamW(model.parameters(), lr=lr, weight_decay=self.weight_decay, fraction=self.fraction)
