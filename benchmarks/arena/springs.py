"""Baselines with a penalty on the distance from where the weights were: plain, and with Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_cl import SparseMaskedAdamW, storage
from sparse_cl.methods.adamw import AdamW
from sparse_cl.methods.base import Batch
from sparse_cl.methods.options import check_at_least
from sparse_cl.models.parts import refuse_shared
from sparse_cl.probes.curvature import CurvatureProbe
from sparse_cl.probes.gradients import watched_layers

from .ewc import EWC

_FILE = "factors.safetensors"


class L2SP(AdamW):
    """AdamW on the loss + α/2 ‖W - W₀‖² (Li, Grandvalet & Davoine 2018), W₀ the weights where each domain begins.

    Args:
        alpha: α.
    """

    name = "l2-sp"
    options = ("alpha",)

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = check_at_least("alpha", alpha, 0)
        self._start: list[tuple[nn.Parameter, Tensor]] = []

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self._start = [(p, p.detach().clone()) for p in model.parameters()]
        return super().before_domain(model, batches)

    def penalty(self, model: nn.Module) -> Tensor | None:
        return self.alpha / 2 * torch.stack([(p - start).square().sum() for p, start in self._start]).sum()

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._start = []


class KFACLaplace(EWC):
    """`EWC` with Kronecker factors (Ritter, Botev & Barber 2018): λ/2 Σ tr(Dᵀ S D A) of the linear layers' changes D.

    A = E[x xᵀ] and S = E[δ δᵀ] with labels drawn from the model, each summed over domains; of what is no linear layer
    of the blocks, the diagonal Fisher. The penalty is in the loss, and so passes through Adam.
    """

    name = "kfac-laplace"

    def __init__(self, ewc_lambda: float = 100.0, gamma: float = 1.0) -> None:
        super().__init__(ewc_lambda, gamma)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._layers: list[tuple[nn.Parameter, Tensor, tuple[Tensor, Tensor]]] = []

    def check(self, model: nn.Module) -> None:
        super().check(model)
        refuse_shared(model)

    def penalty(self, model: nn.Module) -> Tensor | None:
        rest = super().penalty(model)
        if rest is None:
            return None
        moved = [(p - start, *factors) for p, start, factors in self._layers]
        return rest + self.ewc_lambda / 2 * torch.stack([((s @ d @ a) * d).sum() for d, s, a in moved]).sum()

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        for name, new in CurvatureProbe(model).run(batches).layers.items():
            pair = new.outputs.float(), new.inputs.float()
            if old := self.factors.get(f"{name}.weight"):
                pair = pair[0] + self.gamma * old[0], pair[1] + self.gamma * old[1]
            self.factors[f"{name}.weight"] = pair
        super().after_domain(model, batches)

    def save(self, folder: Path) -> None:
        super().save(folder)
        kinds = ("rows", "columns")
        tensors = {f"{n}:{kind}": f for n, pair in self.factors.items() for kind, f in zip(kinds, pair, strict=True)}
        storage.write(folder / _FILE, "factors", tensors)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        found, _ = storage.read(folders[-1] / _FILE, "factors", "KFACLaplace.save")
        names = {f"{name}.weight" for name in watched_layers(base, None)}
        self.factors = {name: (found[f"{name}:rows"], found[f"{name}:columns"]) for name in names}
        return super().restore(base, folders)

    def _hold(self, model: nn.Module, fisher: dict[str, Tensor]) -> None:
        super()._hold(model, fisher)
        layers = {model.get_parameter(name): pair for name, pair in self.factors.items()}
        self._springs = [spring for spring in self._springs if spring[0] not in layers]
        self._layers = [(p, p.detach().clone(), (s.to(p.device), a.to(p.device))) for p, (s, a) in layers.items()]


class KFACRows(KFACLaplace):
    """`KFACLaplace` with one second moment a row from the second domain on, as `elastic` has: what that is worth."""

    name = "kfac-rows"

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        if not self._layers:
            return super().make_optimizer(model, lr)
        return SparseMaskedAdamW(model.named_parameters(), lr=lr, second_moment="row")
