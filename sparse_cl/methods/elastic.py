"""Elastic fine-tuning: each layer is pulled back in the directions of its input that earlier domains use."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.optim.elastic_pull import ElasticPull
from sparse_cl.optim.projected_adamw import ProjectedAdamW
from sparse_cl.probes.capacity import scarcity
from sparse_cl.probes.gradients import GradientProbe
from sparse_cl.probes.inputs import InputProbe
from sparse_cl.probes.parts import find_blocks, is_transposed

from .base import Batch, Method
from .options import check_above_zero, check_at_least

_FILE = "usage.safetensors"
_TOKENS = "tokens"
_GRADIENT_BATCHES = 4
"""Batches whose mean gradient is asked how much of it is free; more change the answer little."""


class Elastic(Method):
    """Full fine-tuning, pulled back to where the domain began in the directions that earlier domains use.

    With A = Σ E[x xᵀ] of a layer's inputs, summed over the earlier domains, and A = Q diag(λ) Qᵀ, AdamW runs in the
    coordinates W Q, and each step ends with the proximal step of the penalty ½ Σ κ_j ‖(W - W₀) q_j‖², W₀ the weights
    when the domain began, κ_j = strength · λ_j / μ and μ the mean λ of one domain (see `ElasticPull`). That is a
    quadratic penalty on how much the layer's outputs for earlier inputs change: EWC (Kirkpatrick et al. 2017) with the
    input half of a Kronecker-factored Fisher (Ritter, Botev & Barber 2018), where hard projection (GPM, Saha et al.
    2021) closes some directions and leaves the others free. Embeddings learn too: the row of token v is pulled back by
    strength · token_strength · V f_v, f_v its share of the text, summed over the earlier domains, and V the vocabulary;
    a head, tied or not, as any layer by its inputs. Norms and biases are free. With nothing to protect, in a first
    domain, all this is AdamW.

    Args:
        strength: of the pull that one domain adds, in units of 1/lr: in each step a direction of mean use goes back by
            lr · strength / (1 + lr · strength) of its way.
        token_strength: of that of embeddings beside that of layers.
        text_weight: what the text given to `protect` adds beside a domain.
    """

    name = "elastic"
    protects = True
    options = ("strength", "token_strength", "text_weight")
    default_lr = 2e-3

    def __init__(self, strength: float = 100.0, token_strength: float = 0.05, text_weight: float = 1.0) -> None:
        self.strength = check_at_least("strength", strength, 0)
        self.token_strength = check_at_least("token_strength", token_strength, 0)
        self.text_weight = check_above_zero("text_weight", text_weight)
        self.moments: dict[str, Tensor] = {}
        """By the first layer that reads an input Σ E[x xᵀ] over texts, and under "tokens" (V,) Σ of each token's share
        of them, a text times `text_weight`; float32, on the CPU."""
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}  # Q, and λ / μ
        self._pulls: dict[str, ElasticPull] = {}
        self._before: dict[str, Tensor] = {}
        self._layers: dict[str, dict[str, Any]] = {}

    def settings(self) -> dict[str, Any]:
        return {option: getattr(self, option) for option in self.options}

    def check(self, model: nn.Module) -> None:
        for name in self._inputs(model):
            if is_transposed(layer := model.get_submodule(name)):
                raise ValueError(
                    f"{name} is a {type(layer).__name__}, of whose inputs {self.name} has no account; it needs a model "
                    "of torch.nn.Linear layers. Run curvature, which takes these"
                )

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._observe(model, batches, self.text_weight)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        inputs = self._inputs(model)
        self._layers = {name: {"surviving": 1.0, "leak": None} for name in inputs}
        self._before, self._pulls = {}, {}
        if not self.moments:
            return model
        self._pulls = self._make_pulls(model)
        gradients = GradientProbe(model, {name: model.get_submodule(name) for name in inputs})
        for name, gradient in gradients.run(islice(batches, _GRADIENT_BATCHES)).layers.items():
            self._layers[name]["surviving"] = 1.0 - self._share_held(name, gradient)
        if message := scarcity(self._layers):
            warnings.warn(f"{self.name}: {message}", stacklevel=2)
        self._before = {name: _weight(model, name).detach().to("cpu", copy=True) for name in inputs}
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return ProjectedAdamW(model.named_parameters(), lr=lr, projections=self._pulls, rest="train")

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        for name, before in self._before.items():
            self._layers[name]["leak"] = self._share_held(name, _weight(model, name).detach().cpu() - before)
        self._before, self._pulls = {}, {}
        self._observe(model, batches)
        for name, key in self._inputs(model).items():
            use = self._bases[key][1]
            used = round(float((use / (1 + use)).sum(dtype=torch.float64)))
            self._layers[name] |= {"width": len(use), "used": used, "free": len(use) - used}

    def record(self) -> dict[str, Any]:
        """As of every method; a direction counts as used by h = (λ/μ)/(1 + λ/μ), between 0 and 1, whatever the
        learning rate and the strength are, and so does the energy of gradients and changes in it."""
        return {"layers": self._layers}

    def save(self, folder: Path) -> None:
        storage.write(folder / _FILE, "usage", self.moments)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        self.moments, _ = storage.read(folders[-1] / _FILE, "usage", f"a run of the method {self.name}")
        self._set_bases(model)
        return model

    def _inputs(self, model: nn.Module) -> dict[str, str]:
        """Linear layers of the blocks → the first layer that reads the same input."""
        found = {}
        for block in find_blocks(model):
            for part in (block.attention, block.mlp):
                found |= dict.fromkeys(part.into, next(iter(part.into))) | {part.out_name: part.out_name}
        return found

    def _observe(self, model: nn.Module, batches: Iterable[Batch], weight: float = 1.0) -> None:
        """Add what a text puts into the layers, as the model is now: each text counts alike, however long it is."""
        names = list(dict.fromkeys(self._inputs(model).values())) + _head_names(model)
        seen = InputProbe(model, {name: model.get_submodule(name) for name in names}, tokens="all").run(batches)
        found = {name: sum(half.moment for half in halves).cpu() / seen.tokens for name, halves in seen.halves.items()}
        tokens = torch.zeros(model.get_input_embeddings().num_embeddings, dtype=torch.float64)
        for batch in batches:
            kept = batch["input_ids"][batch["attention_mask"].bool()]
            tokens += torch.bincount(kept.cpu(), minlength=len(tokens))
        found[_TOKENS] = (tokens / tokens.sum()).float()
        for name, moment in found.items():
            self.moments[name] = weight * moment + self.moments.get(name, 0.0)
        self._set_bases(model)

    def _set_bases(self, model: nn.Module) -> None:
        self._bases = {}
        texts = float(self.moments[_TOKENS].sum(dtype=torch.float64))
        for name, moment in self.moments.items():
            if name != _TOKENS:
                weight = _weight(model, name)
                values, vectors = torch.linalg.eigh(moment.to(weight.device, torch.float64))
                values = values.clamp(min=0)
                dtype = torch.promote_types(weight.dtype, torch.float32)
                self._bases[name] = vectors.to(dtype), (values * texts / values.mean()).to(dtype)

    def _make_pulls(self, model: nn.Module) -> dict[str, ElasticPull]:
        """Of all parameters that have any, by name, with their present values as anchors."""
        bases = {id(_weight(model, name)): self._bases[key] for name, key in self._inputs(model).items()}
        bases |= {id(_weight(model, name)): self._bases[name] for name in _head_names(model)}
        embedding = model.get_input_embeddings().weight
        shares = self.moments[_TOKENS].to(embedding.device)
        rows = self.strength * self.token_strength * len(shares) * shares
        pulls = {}
        for name, parameter in model.named_parameters():
            basis, use = bases.get(id(parameter), (None, None))
            if basis is not None or parameter is embedding:
                columns = None if use is None else self.strength * use
                pulls[name] = ElasticPull(parameter, basis, columns, rows if parameter is embedding else None)
        return pulls

    def _share_held(self, name: str, matrix: Tensor) -> float:
        pull = self._pulls[f"{name}.weight"]
        return pull.share_held(matrix, 1 / self.strength) if self.strength else 0.0


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_submodule(name).weight


def _head_names(model: nn.Module) -> list[str]:
    """The name of the module that makes the logits, if it is a linear layer."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head and isinstance(module, nn.Linear)]
