"""Soft orthogonal fine-tuning: each input direction of a layer learns the less, the more earlier domains use it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.optim.damping import Damping
from sparse_cl.optim.projected_adamw import ProjectedAdamW
from sparse_cl.probes.capacity import scarcity
from sparse_cl.probes.gradients import GradientProbe
from sparse_cl.probes.inputs import InputProbe
from sparse_cl.probes.parts import find_blocks, is_transposed

from .base import Batch, Method

_FILE = "usage.safetensors"
_TOKENS = "tokens"
_GRADIENT_BATCHES = 4
"""Batches whose mean gradient is asked how much of it survives; more change the answer little."""


class SoftOrthogonal(Method):
    """Full fine-tuning in the eigenbasis of what earlier domains put into each layer, damped direction by direction.

    With A = Σ_domains E[x xᵀ] = Q diag(λ) Qᵀ of a layer's inputs, its update is AdamW(G Q) diag(c) Qᵀ with
    c_j = 1/(1 + (λ_j/τ)^p): hard projection (GPM, Saha et al. 2021; Adam-NSCL, Wang et al. 2021) is p → ∞ and AdamW in
    the ordinary coordinates. That earlier knowledge may be reused in part is the idea of SGP (Saha & Roy 2023).
    Embeddings learn too: the rows of tokens that earlier domains use are damped, r_v = 1/(1 + f_v/s) with f_v the
    token's share of the text summed over domains; and a head, tied or not, is damped as any layer, by its inputs. In
    the first domain, with nothing to protect, all this is AdamW.

    Args:
        energy: τ of a layer is the eigenvalue at which the larger ones have this share of Σ λ, in (0, 1].
        head_energy: the same of the head.
        sharpness: p > 0.
        frequency: s, in units of the share that a token would have if all had the same.
        rest: gain of norms, biases and whatever else has no inputs to go by, in [0, 1]; 0 freezes them.
        text_weight: what the text given to `protect` counts beside a domain's.
    """

    name = "soft-orthogonal"
    protects = True
    options = ("energy", "head_energy", "sharpness", "frequency", "rest", "text_weight")
    default_lr = 3e-3

    def __init__(
        self,
        energy: float = 0.95,
        head_energy: float = 0.8,
        sharpness: float = 2.0,
        frequency: float = 10.0,
        rest: float = 1.0,
        text_weight: float = 1.0,
    ) -> None:
        for name, share in (("energy", energy), ("head_energy", head_energy)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {share}")
        for name, positive in (("sharpness", sharpness), ("frequency", frequency), ("text_weight", text_weight)):
            if not positive > 0:
                raise ValueError(f"{name}: expected a number above 0, got {positive}")
        if not 0 <= rest <= 1:
            raise ValueError(f"rest: expected a gain in [0, 1], got {rest}")
        self.energy, self.head_energy, self.sharpness = energy, head_energy, sharpness
        self.frequency, self.rest, self.text_weight = frequency, rest, text_weight
        self.moments: dict[str, Tensor] = {}
        """Σ_domains E[x xᵀ], float32, on the CPU, by the first layer that reads this input; and under "tokens", (V,),
        Σ_domains of each token's share."""
        self.dampings: dict[str, Damping] = {}
        self._before: dict[str, Tensor] = {}
        self._layers: dict[str, dict[str, Any]] = {}

    def settings(self) -> dict[str, Any]:
        return {option: getattr(self, option) for option in self.options}

    def check(self, model: nn.Module) -> None:
        for block in find_blocks(model):
            for part in (block.attention, block.mlp):
                for name, layer in (*part.into.items(), (part.out_name, part.out)):
                    if is_transposed(layer):
                        raise ValueError(
                            f"{name} is a {type(layer).__name__}, of whose inputs {self.name} has no account; it needs "
                            "a model of torch.nn.Linear layers. Run curvature, which takes these"
                        )

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._observe(model, batches, self.text_weight)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self._layers = {name: {"surviving": 1.0, "leak": None} for name in self._inputs(model)}
        self._before = {}
        if not self.dampings:
            return model
        gradients = GradientProbe(model).run(islice(batches, _GRADIENT_BATCHES)).layers
        for name, layer in self._layers.items():
            if (gradient := gradients.get(name)) is not None:
                layer["surviving"] = self.dampings[f"{name}.weight"].share_kept(gradient)
        if message := scarcity(self._layers):
            warnings.warn(f"{self.name}: {message}", stacklevel=2)
        self._before = {
            name: model.get_parameter(f"{name}.weight").detach().to("cpu", copy=True) for name in self._layers
        }
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return ProjectedAdamW(model.named_parameters(), lr=lr, projections=self.dampings)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        for name, before in self._before.items():
            change = model.get_parameter(f"{name}.weight").detach().cpu().double() - before.double()
            self._layers[name]["leak"] = 1.0 - self.dampings[f"{name}.weight"].share_kept(change)
        self._before = {}
        self._observe(model, batches)
        for name, layer in self._layers.items():
            gains = self.dampings[f"{name}.weight"].columns
            free = round(float(gains.sum(dtype=torch.float64)))
            layer |= {"width": len(gains), "used": len(gains) - free, "free": free}

    def record(self) -> dict[str, Any]:
        return {"layers": self._layers}

    def save(self, folder: Path) -> None:
        storage.write(folder / _FILE, "usage", self.moments)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        self.moments, _ = storage.read(folders[-1] / _FILE, "usage", f"a run of the method {self.name}")
        self._set_dampings(model)
        return model

    def _inputs(self, model: nn.Module) -> dict[str, str]:
        """Linear layers of the blocks → the first layer that reads the same input."""
        found = {}
        for block in find_blocks(model):
            for part in (block.attention, block.mlp):
                found |= dict.fromkeys(part.into, next(iter(part.into))) | {part.out_name: part.out_name}
        return found

    def _head(self, model: nn.Module) -> tuple[str, nn.Module] | None:
        head = model.get_output_embeddings()
        return next(((name, head) for name, module in model.named_modules() if module is head), None)

    def _observe(self, model: nn.Module, batches: Iterable[Batch], weight: float = 1.0) -> None:
        """Add what a text puts into the layers, as the model is now: each text counts alike, however long it is."""
        head = self._head(model)
        modules = {name: model.get_submodule(name) for name in dict.fromkeys(self._inputs(model).values())}
        seen = InputProbe(model, modules | ({head[0]: head[1]} if head else {}), tokens="all").run(batches)
        found = {name: sum(half.moment for half in halves).cpu() / seen.tokens for name, halves in seen.halves.items()}
        tokens = torch.zeros(model.get_input_embeddings().num_embeddings)
        for batch in batches:
            ids = batch["input_ids"][batch["attention_mask"].bool()]
            tokens += torch.bincount(ids, minlength=len(tokens)).cpu()
        found[_TOKENS] = tokens / tokens.sum()
        for name, moment in found.items():
            old = self.moments.get(name)
            self.moments[name] = weight * moment if old is None else old + weight * moment
        self._set_dampings(model)

    def _set_dampings(self, model: nn.Module) -> None:
        inputs, head = self._inputs(model), self._head(model)
        turns = {
            name: self._turn(
                moment, model.get_submodule(name).weight, self.energy if name in inputs else self.head_energy
            )
            for name, moment in self.moments.items()
            if name != _TOKENS
        }
        self.dampings = {f"{name}.weight": Damping(*turns[key]) for name, key in inputs.items()}
        parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        embedding = model.get_input_embeddings().weight
        shares = self.moments[_TOKENS].to(embedding.device) * len(embedding)
        rows = 1 / (1 + shares / self.frequency)
        if head and head[1].weight is embedding:
            self.dampings[parameters[id(embedding)]] = Damping(*turns[head[0]], rows)
        else:
            self.dampings[parameters[id(embedding)]] = Damping(None, None, rows)
            if head:
                self.dampings[f"{head[0]}.weight"] = Damping(*turns[head[0]])
        for name, parameter in self._rest(model):
            if self.rest:
                ones = torch.full(parameter.shape[-1:], self.rest, device=parameter.device)
                self.dampings[name] = Damping(None, ones)

    def _rest(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in model.named_parameters():
            if name not in self.dampings and parameter.dim():
                yield name, parameter

    def _turn(self, moment: Tensor, parameter: Tensor, energy: float) -> tuple[Tensor, Tensor]:
        """Q and c of a layer's inputs, where its weight is."""
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        values, vectors = torch.linalg.eigh(moment.to(parameter.device, torch.float64))
        values = values.clamp(min=0)
        descending = values.flip(0)
        enough = int((descending.cumsum(0) < energy * values.sum()).sum())
        threshold = descending[min(enough, len(values) - 1)].clamp(min=torch.finfo(torch.float64).tiny)
        gains = 1 / (1 + (values / threshold) ** self.sharpness)
        return vectors.to(dtype), gains.to(dtype)
