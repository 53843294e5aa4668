"""Orthogonal fine-tuning: no update enters the directions of a layer's input that earlier domains used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.lora import orthogonal_lora
from sparse_cl.models.parts import is_transposed, refuse_mixtures
from sparse_cl.models.passes import answer_tokens, evaluation
from sparse_cl.optim import SubspaceProjectedAdamW
from sparse_cl.probes.capacity import scarcity
from sparse_cl.subspace import Subspace, SubspaceMemory

from .base import Batch, Method, check_first
from .lora import ALPHA, RANK, MergedWeights, add_adapter, merged, with_adapters
from .options import check_share
from .surviving import only_gradients_of, surviving_shares

_FILE = "memory.safetensors"


@contextmanager
def told_already() -> Iterator[None]:
    """Silences the warning per layer without room: one warning already said how many layers have little."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(no free direction left|not updated any more)")
        yield


class SubspaceMethod(Method):
    """What the methods that keep a memory of subspaces share: observing, measuring, saving.

    Args:
        energy: share of the energy of the inputs (or gradients) that each layer's basis explains, in (0, 1].
        source: "inputs" of the layers or "gradients" of their weights, both over the probe batches of a domain that
            was just learned.
        max_rank: most directions that a domain may add to a layer; None: as many as `energy` asks for, and then
            observing takes 4 n² bytes for a layer of n inputs (`SubspaceMemory`).

    Each method's defaults are the best of six settings on the embedded model and the validation part of its domains,
    as the learning rates of the other methods are. Real text wants others: inputs spread over more directions there.
    """

    protects = True
    options: tuple[str, ...] = ("energy", "source", "max_rank")

    def __init__(self, energy: float, source: str, max_rank: int | None) -> None:
        check_share("energy", energy)
        if source not in ("inputs", "gradients"):
            raise ValueError(f"source: expected 'inputs' or 'gradients', got {source!r}")
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank: expected at least 1, or none for no limit, got {max_rank}")
        self.energy, self.source, self.max_rank = energy, source, max_rank
        self.memory: SubspaceMemory | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._layers: dict[str, dict[str, Any]] = {}

    @property
    def _known(self) -> SubspaceMemory:
        if self.memory is None:
            raise RuntimeError(f"{self.name}: before_domain, protect or restore comes first")
        return self.memory

    def settings(self) -> dict[str, Any]:
        return {"energy": self.energy, "source": self.source, "max_rank": self.max_rank}

    def check(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if is_transposed(module):
                raise ValueError(
                    f"{name} is a {type(module).__name__}, whose inputs no subspace memory follows; {self.name} needs "
                    "a model of torch.nn.Linear layers. Run another method, or another model"
                )
        refuse_mixtures(model, f"whose experts {self.name} would train unprotected; take a dense model")
        self._new_memory(model)

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_first(self.name, self.memory is None)
        self._remember(model, self._new_memory(model))
        self._observe(model, batches)
        self._known.consolidate()

    def record(self) -> dict[str, Any]:
        return {"layers": self._layers}

    def save(self, folder: Path) -> None:
        self._known.save(folder / _FILE)

    def _new_memory(self, base: nn.Module) -> SubspaceMemory:
        return SubspaceMemory(base, max_rank=self.max_rank, energy=self.energy, source=self.source)

    def _remember(self, base: nn.Module, memory: SubspaceMemory) -> None:
        """Take a memory that is bound to `base`."""
        self.memory = memory
        if memory.settings.source == "inputs":
            with memory.watch():
                pass  # from now on only the probe batches are noted, not training
        parameters = dict(base.named_parameters())
        self._weights = {name: parameters[name] for name in memory.names}

    def _load(self, base: nn.Module, folder: Path) -> None:
        """Go on with the memory that `save` wrote."""
        self._remember(base, SubspaceMemory.load(folder / _FILE, base))

    def _begin(self, base: nn.Module, batches: Iterable[Batch]) -> None:
        """Measure, before a domain is learned, what survives of its gradient, and warn where little does.

        Args:
            base: the model without adapters; the first time, a memory of its linear layers is made.
        """
        if self.memory is None:
            self._remember(base, self._new_memory(base))
        self._layers = {name: {"surviving": 1.0} for name in self._weights}
        self._before = {}
        if not self._known.domains:
            return
        for name, share in surviving_shares(base, self._weights, batches, self._known.share_inside).items():
            self._layers[name]["surviving"] = share
        self._before = {name: weight.detach().to("cpu", copy=True) for name, weight in self._weights.items()}
        if message := scarcity(self._layers):
            warnings.warn(f"{self.name}: {message}", stacklevel=3)

    def _end(self, model: nn.Module, learned: Mapping[str, torch.Tensor], batches: Iterable[Batch]) -> None:
        """Measure the leak of a domain that was learned, then protect what it uses.

        Args:
            model: what was trained, adapter and all.
            learned: the tracked weights as the next domain will find them.
        """
        leak = self._known.leak(self._before, learned) if self._before else {}
        for name, layer in self._layers.items():
            layer["leak"] = leak[name] if leak and self._known.rank(name) else None
        self._before = {}
        self._observe(model, batches)
        self._known.consolidate()
        for name, capacity in self._known.capacity().items():
            self._layers[name] |= capacity

    def _observe(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        with evaluation(model):
            if self.source == "gradients":
                with only_gradients_of(model, self._weights.values()):
                    for batch in batches:
                        model(**batch).loss.backward()
                        self._known.observe()
                        model.zero_grad(set_to_none=True)
                return
            for batch in batches:
                with torch.no_grad(), self._known.watch(tokens=answer_tokens(batch, "all")):
                    model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
                self._known.observe()


class Orthogonal(SubspaceMethod):
    """Full fine-tuning whose every update, weight decay included, is projected (GPM's subspaces, Saha et al. 2021).

    Linear layers are protected by their subspaces. From the second domain on, everything else (embeddings, a head tied
    to them, norms, biases) is frozen, the optimizer's default: it has no subspace and would undo the rest.
    """

    name = "orthogonal"
    default_lr = 2e-3

    def __init__(self, energy: float = 0.95, source: str = "inputs", max_rank: int | None = None) -> None:
        super().__init__(energy, source, max_rank)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self._begin(model, batches)
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        with told_already():
            return SubspaceProjectedAdamW(model.named_parameters(), lr=lr, memory=self.memory)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._end(model, self._weights, batches)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        self._load(model, folders[-1])
        return model


class OrthogonalLoRA(SubspaceMethod):
    """A fresh LoRA adapter each domain, in the complement of its layers' subspaces; the one before is merged.

    O-LoRA (Wang et al. 2023) keeps adapters apart from each other; here they are kept apart from the inputs that
    earlier domains had, which is what the earlier domains' outputs depend on.
    """

    name = "orthogonal-lora"
    default_lr = 4e-3

    def __init__(
        self,
        energy: float = 0.99,
        source: str = "inputs",
        max_rank: int | None = None,
        rank: int = RANK,
        alpha: int = ALPHA,
    ) -> None:
        super().__init__(energy, source, max_rank)
        self.rank, self.alpha = rank, alpha
        self._subspaces: dict[nn.Parameter, Subspace] = {}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "rank": self.rank, "alpha": self.alpha}

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        base = merged(model)
        self._begin(base, batches)
        adapted = add_adapter(base, self.rank, self.alpha)
        with told_already():
            self._subspaces = orthogonal_lora(adapted, self._known)
        return adapted

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        with told_already():
            return SubspaceProjectedAdamW(trained, lr=lr, memory=self._subspaces)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._end(model, MergedWeights(model, self._weights), batches)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = merged(with_adapters(base, folders[:-1]))
        self._load(model, folders[-1])
        return with_adapters(model, folders[-1:])
