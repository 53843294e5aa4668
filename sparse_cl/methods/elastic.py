"""Elastic fine-tuning: each layer is pulled back in the directions of its input that earlier domains use."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.models.parts import is_transposed
from sparse_cl.optim.elastic_pull import ElasticPull
from sparse_cl.optim.projected_adamw import ProjectedAdamW
from sparse_cl.probes.capacity import scarcity

from .base import Batch, Method, check_first
from .input_usage import InputUsage
from .lora import ALPHA, RANK, MergedWeights, add_adapter, merged, with_adapters
from .options import check_above_zero, check_at_least

MAX_WIDTH = 8192
"""Inputs of layers up to this width have n × n moments and bases, 256 MiB each; wider ones one entry per feature."""
_FILE = "usage.safetensors"


class Elastic(Method):
    """Full fine-tuning, pulled back to where the domain began in the directions that earlier domains use.

    With A = Σ E[x xᵀ] of a layer's inputs, summed over the earlier domains, and A = Q diag(λ) Qᵀ, AdamW runs in the
    coordinates W Q, and each step ends with the proximal step of the penalty ½ Σ κ_j ‖(W - W₀) q_j‖², W₀ the weights
    when the domain began, κ_j = strength · λ_j / μ and μ the mean λ of one domain (see `ElasticPull`, `InputUsage`).
    That is a quadratic penalty on how much the layer's outputs for earlier inputs change: EWC (Kirkpatrick et al. 2017)
    with the input half of a Kronecker-factored Fisher (Ritter, Botev & Barber 2018), where hard projection (GPM, Saha
    et al. 2021) closes some directions and leaves the others free. Embeddings learn too: the row of token v is pulled
    back by strength · token_strength · V f_v, f_v its share of the text, summed over the earlier domains, and V the
    vocabulary; a head, tied or not, as any layer by its inputs. Norms and biases are free. With nothing to protect, in
    a first domain, all this is AdamW.

    Args:
        strength: of the pull that one domain adds, in units of 1/lr: each step undoes the fraction
            lr · strength / (1 + lr · strength) of what a direction of mean use has moved.
        token_strength: strength for embeddings, relative to `strength`.
        text_weight: weight of the text given to `protect`; a domain has weight 1.
        max_width: layers with more inputs use the inputs themselves as q_j, since an n × n basis would be too large.
    """

    name = "elastic"
    protects = True
    options: tuple[str, ...] = ("strength", "token_strength", "text_weight", "max_width")
    default_lr = 2e-3

    def __init__(
        self,
        strength: float = 100.0,
        token_strength: float = 0.05,
        text_weight: float = 0.2,
        max_width: int = MAX_WIDTH,
    ) -> None:
        self.strength = check_at_least("strength", strength, 0)
        self.token_strength = check_at_least("token_strength", token_strength, 0)
        self.text_weight = check_above_zero("text_weight", text_weight)
        self.max_width = check_at_least("max_width", max_width, 0)
        self.usage: InputUsage | None = None
        self._pulls: dict[str, ElasticPull] = {}
        self._before: dict[str, Tensor] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        self._begun = False

    @property
    def _known(self) -> InputUsage:
        if self.usage is None:
            raise RuntimeError(f"{self.name}: before_domain, protect or restore comes first")
        return self.usage

    def settings(self) -> dict[str, Any]:
        return {option: getattr(self, option) for option in self.options}

    def check(self, model: nn.Module) -> None:
        for name, layer in InputUsage(model, self.max_width).modules.items():
            if is_transposed(layer):
                raise ValueError(
                    f"{name} is a {type(layer).__name__}, of whose inputs {self.name} has no account; it needs a model "
                    "of torch.nn.Linear layers. Run curvature, which takes these"
                )

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_first(self.name, self.usage is None)
        usage = InputUsage(model, self.max_width)
        usage.observe(model, batches, self.text_weight)
        self.usage = usage

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self._begin(model, batches)
        self._pulls = self._make_pulls(model) if self._known.moments else {}
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        self._check_begun("make_optimizer")
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return ProjectedAdamW(trained, lr=lr, projections=self._pulls, rest="train")

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._pulls = {}
        self._end(model, batches)

    def record(self) -> dict[str, Any]:
        """As of every method; see `InputUsage` for what counts as used."""
        return {"layers": self._layers}

    def save(self, folder: Path) -> None:
        storage.write(folder / _FILE, "usage", self._known.moments)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        self._load(model, folders[-1])
        return model

    def _begin(self, base: nn.Module, batches: Iterable[Batch]) -> None:
        """Measure, before a domain is learned, what of its gradient is free."""
        if self.usage is None:
            self.usage = InputUsage(base, self.max_width)
        self._layers = {name: {"surviving": 1.0, "leak": None} for name in self._known.modules}
        self._before, self._begun = {}, True
        if not self._known.moments:
            return
        for name, share in self._known.surviving(base, batches).items():
            self._layers[name]["surviving"] = share
        if message := scarcity(self._layers):
            warnings.warn(f"{self.name}: {message}", stacklevel=3)
        self._before = {name: weight.detach().to("cpu", copy=True) for name, weight in self._known.weights().items()}

    def _check_begun(self, call: str) -> None:
        if not self._begun:
            raise RuntimeError(
                f"{self.name}: {call} comes after before_domain(model, batches), without which earlier domains are not "
                "protected"
            )

    def _end(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Measure where a domain's change went, then remember what it uses.

        Args:
            model: what was trained, adapter and all.
        """
        self._check_begun("after_domain")
        learned = MergedWeights(model, self._known.weights())
        for name, before in self._before.items():
            self._layers[name]["leak"] = self._known.share_taken(name, learned[name].detach().cpu() - before)
        self._before = {}
        self._known.observe(model, batches)
        self._begun = False
        for name, layer in self._layers.items():
            layer |= self._known.account(name)

    def _load(self, base: nn.Module, folder: Path) -> None:
        self.usage = InputUsage(base, self.max_width)
        self._known.take(storage.read(folder / _FILE, "usage", f"a run of the method {self.name}")[0])

    def _make_pulls(self, model: nn.Module) -> dict[str, ElasticPull]:
        """Of all trained parameters that have any, by name, with their present values as anchors."""
        layers = self._known.modules | self._known.heads
        bases = {id(layer.weight): self._known.bases[name] for name, layer in layers.items()}
        embedding, shares = self._known.embedding.weight, self._known.token_shares()
        rows = self.strength * self.token_strength * len(shares) * shares
        pulls = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            basis, use = bases.get(id(parameter), (None, None))
            if use is not None or parameter is embedding:
                columns = None if use is None else self.strength * use
                pulls[name] = ElasticPull(parameter, basis, columns, rows if parameter is embedding else None)
        return pulls


class ElasticLoRA(Elastic):
    """A fresh LoRA adapter each domain whose A is pulled to 0 in directions that earlier domains use.

    The adapter of the domain before is merged. ΔW = s B A reaches an old input x through A x alone, so the pull of
    `Elastic` is on A, with 0 as its anchor; B is free. A starts as PEFT draws it, each direction divided by 1 + u_j
    (see `InputUsage`). Embeddings, head, norms and biases stay as they are.

    Args:
        strength: as of `Elastic`; adapters want a weaker pull, as their rates are larger and B gives them a scale.
        text_weight, max_width: as of `Elastic`.
        rank, alpha: of the adapters; s = alpha / rank.
    """

    name = "elastic-lora"
    options: tuple[str, ...] = ("strength", "text_weight", "max_width", "rank", "alpha")
    default_lr = 4e-3

    def __init__(
        self,
        strength: float = 10.0,
        text_weight: float = 0.2,
        max_width: int = MAX_WIDTH,
        rank: int = RANK,
        alpha: int = ALPHA,
    ) -> None:
        super().__init__(strength, text_weight=text_weight, max_width=max_width)
        self.rank = check_at_least("rank", rank, 1)
        self.alpha = check_at_least("alpha", alpha, 1)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        base = merged(model)
        self._begin(base, batches)
        adapted = add_adapter(base, self.rank, self.alpha)
        self._pulls = self._confine(adapted) if self._known.moments else {}
        return adapted

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._pulls = {}
        self._end(model, batches)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = merged(with_adapters(base, folders[:-1]))
        self._load(model, folders[-1])
        return with_adapters(model, folders[-1:])

    @torch.no_grad()
    def _confine(self, adapted: nn.Module) -> dict[str, ElasticPull]:
        """Draws each A again, outside the used directions; returns the pulls by name."""
        layers = {id(layer): name for name, layer in self._known.modules.items()}
        names = {id(parameter): name for name, parameter in adapted.named_parameters()}
        pulls = {}
        adapters: Iterator[Any] = (module for module in adapted.modules() if hasattr(module, "lora_A"))
        for module in adapters:
            if layer := layers.get(id(module.get_base_layer())):
                a = module.lora_A["default"].weight
                basis, use = self._known.bases[layer]
                use = use.to(a.dtype)
                if basis is None:
                    a.div_(1 + use)
                else:
                    basis = basis.to(a.dtype)
                    a.copy_((a @ basis / (1 + use)) @ basis.mT)
                pulls[names[id(a)]] = ElasticPull(torch.zeros_like(a), basis, self.strength * use)
        return pulls
