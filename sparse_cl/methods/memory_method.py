"""What the methods that keep a memory of old inputs share: observing, measuring, saving, and fresh adapters."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.layout import like, part, whole
from sparse_cl.lora import refuse_variant
from sparse_cl.models.head import logits_only_at
from sparse_cl.models.parts import has_adapters, refuse_mixtures, refuse_shared
from sparse_cl.models.passes import answer_tokens, evaluation, reshard
from sparse_cl.optim.shards import piece_of
from sparse_cl.probes.capacity import scarcity
from sparse_cl.subspace import SubspaceMemory
from sparse_cl.subspace.layers import plain_name

from .base import Batch, Method, check_first
from .carried import memory_path, save_memory
from .lora import MergedWeights, add_adapter, agree_on_adapters, refuse_split
from .options import check_above_zero, check_at_least, check_share
from .stacked import MergedAdapters
from .surviving import only_gradients_of, surviving_shares


@contextmanager
def told_already() -> Iterator[None]:
    """Silences the warning per layer without room: one warning already said how many layers have little."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(no free direction left|not updated any more)")
        yield


def trained_by_name(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What an optimizer is given: the parameters that are not frozen."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


class MemoryMethod(Method):
    """A method that keeps a `SubspaceMemory` of what earlier domains put into the linear layers.

    Attributes:
        moved: by weight, by how much of their energy the last domain moved the layer's outputs on earlier inputs.
        by_use: whether a direction counts as taken by how much it is used, in the report, or altogether.

    Args:
        energy: share of the energy of the inputs (or gradients) that each layer's basis explains, in (0, 1].
        source: "inputs" of the layers or "gradients" of their weights, both over the probe batches of a domain that
            was just learned.
        max_rank: most directions that are kept of a layer; "auto": a quarter of its inputs, 16 to 256; None: as many
            as `energy` asks for, and then observing takes 4 n² bytes for a layer of n inputs (`SubspaceMemory`).
        text_weight: of a text given to `protect`; a domain has weight 1.

    Each method's defaults are the best of six settings on the embedded model and the validation part of its domains,
    as the learning rates of the other methods are. Real text wants others: inputs spread over more directions there.
    """

    protects = True
    by_use = False
    options: tuple[str, ...] = ("energy", "source", "max_rank")

    def __init__(self, energy: float, source: str, max_rank: int | str | None, text_weight: float = 1.0) -> None:
        check_share("energy", energy)
        if source not in ("inputs", "gradients"):
            raise ValueError(f"source: expected 'inputs' or 'gradients', got {source!r}")
        if isinstance(max_rank, int):
            check_at_least("max_rank", max_rank, 1)
        self.text_weight = check_above_zero("text_weight", text_weight)
        self.energy, self.source, self.max_rank = energy, source, max_rank
        self.memory: SubspaceMemory | None = None
        self._begun = False
        self._weights: dict[str, nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        self.moved: dict[str, float] = {}

    @property
    def _known(self) -> SubspaceMemory:
        if self.memory is None:
            raise RuntimeError(f"{self.name}: before_domain, protect or restore comes first")
        return self.memory

    def check(self, model: nn.Module) -> None:
        super().check(model)
        refuse_mixtures(model, f"whose experts {self.name} would train unprotected; take a dense model")
        for name, layer in model.named_modules():
            for adapter in getattr(layer, "lora_variant", ()):
                refuse_variant("model", name, layer, adapter)
        self._new_memory(model)

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_first(self.name, self.memory is None)
        if has_adapters(model):
            raise ValueError(
                f"{self.name}: an adapter that is to be trained cannot keep what the base knows, as its B begins at "
                "zero; take elastic-lora, or protect the base model and train it whole"
            )
        self._remember(model, self._new_memory(model))
        try:
            self._observe(model, batches)
            self._known.consolidate(self.text_weight)
        except Exception:
            self.memory = None
            raise

    def remember(self, model: nn.Module, memory: SubspaceMemory) -> None:
        """As `Method.remember`. The memory's own settings go on ruling; a warning says where this method has others."""
        if self.memory is not None:
            raise ValueError(
                f"{self.name}: remember comes once, before protect and the first domain; make a new method"
            )
        if memory.settings.source != self.source:
            raise ValueError(
                f"source: {self.name} was made for {self.source!r}, but the memory is of {memory.settings.source!r}; "
                f"make the method with source={memory.settings.source!r}"
            )
        memory.bind(model)
        self._remember(model, memory)
        others = [name for name in ("energy", "max_rank") if getattr(self, name) != getattr(memory.settings, name)]
        if others:
            theirs = ", ".join(f"{name}={getattr(memory.settings, name)!r}" for name in others)
            warnings.warn(f"{self.name}: the memory goes on with its own {theirs}", stacklevel=2)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self._begin(model, batches)
        return model

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._end(model, self._weights, batches)

    def record(self) -> dict[str, Any]:
        return {"layers": self._layers}

    def save(self, folder: Path) -> None:
        save_memory(folder, self._known)

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        self._load(model, folders[-1])
        return model

    def _new_memory(self, base: nn.Module) -> SubspaceMemory:
        return SubspaceMemory(base, max_rank=self.max_rank, energy=self.energy, source=self.source)

    def _remember(self, base: nn.Module, memory: SubspaceMemory) -> None:
        """Take a memory that is bound to `base`."""
        self.memory = memory
        if memory.settings.source == "inputs":
            with memory.watch():
                pass  # from now on only the probe batches are noted, not training
        parameters = {plain_name(name): param for name, param in base.named_parameters()}
        self._weights = {name: parameters[name] for name in memory.names}

    def _load(self, base: nn.Module, folder: Path) -> None:
        """Go on with the memory that `save` wrote."""
        self._remember(base, SubspaceMemory.load(memory_path(folder), base))

    def _begin(self, base: nn.Module, batches: Iterable[Batch]) -> None:
        """Measure, before a domain is learned, what survives of its gradient, and warn where little does.

        Args:
            base: the model without adapters; the first time, a memory of its linear layers is made.
        """
        reshard(base)
        self.check(base)
        if self.memory is None:
            self._remember(base, self._new_memory(base))
        else:
            self._known.bind(base)  # a vocabulary may have grown
            self._remember(base, self._known)
        for name, weight in self._weights.items() if has_adapters(base) and self._known.domains else ():
            if not weight.any():
                raise ValueError(
                    f"model: {name} is zero, so this is a fresh adapter, while the memory is of one that was trained; "
                    "load that one: PeftModel.from_pretrained(base, folder, is_trainable=True)"
                )
        self._layers = {name: {"surviving": 1.0} for name in self._weights}
        self._before, self._begun = {}, True
        if not self._known.domains:
            return
        for name, share in surviving_shares(base, self._weights, batches, self._taken).items():
            self._layers[name]["surviving"] = share
        self._before = {name: part(weight.detach()).to("cpu", copy=True) for name, weight in self._weights.items()}
        if message := scarcity(self._layers):
            warnings.warn(f"{self.name}: {message}", stacklevel=3)

    def _end(self, model: nn.Module, learned: Mapping[str, torch.Tensor], batches: Iterable[Batch]) -> None:
        """Measure the leak of a domain that was learned, then protect what it uses.

        Args:
            model: what was trained, adapter and all.
            learned: the tracked weights as the next domain will find them.
        """
        self._check_begun("after_domain")
        self._measure(learned)
        self._observe(model, batches)
        self._known.consolidate()
        for name, capacity in self._known.capacity(self.by_use).items():
            self._layers[name] |= capacity
        self._begun = False

    def _measure(self, learned: Mapping[str, torch.Tensor]) -> None:
        """Leak and movement of each weight. Its own call, so that no copy of the last one outlives it."""
        self.moved = {}
        for name, layer in self._layers.items():
            layer["leak"] = None
            if self._before and self._known.rank(name):
                before = whole(like(self._before[name], self._weights[name])).cpu().double()
                change = whole(learned[name].detach()).cpu().double() - before
                layer["leak"] = self._taken(name, change)
                self.moved[name] = self._moved(name, before, change)
        self._before = {}

    def _check_begun(self, call: str) -> None:
        if not self._begun:
            raise RuntimeError(
                f"{self.name}: {call} comes after before_domain(model, batches), without which earlier domains are not "
                "protected"
            )

    def _taken(self, name: str, matrix: torch.Tensor) -> float:
        """Share of the energy of a gradient or a change of a weight that is in what earlier domains use."""
        return self._known.share_inside(name, matrix, self.by_use)

    def _moved(self, name: str, before: torch.Tensor, change: torch.Tensor) -> float:
        """By how much of their energy a layer's outputs on earlier inputs moved, as its directions see them."""
        subspace = self._known.subspace(name)
        assert subspace is not None  # it has a rank
        held, moved = (
            float(subspace.energies(x.mT if self._known.is_transposed(name) else x) @ subspace.values.double())
            for x in (before.to(subspace.device), change.to(subspace.device))
        )
        return moved / held if held else 0.0

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
                # The memory's hooks were there before: of the head they see all inputs.
                seen = self._known.watch(tokens=answer_tokens(batch, "all"))
                with torch.no_grad(), seen, logits_only_at(model, None):
                    model(**{name: part for name, part in batch.items() if name != "labels"})
                self._known.observe()


class FreshAdapters(MemoryMethod):
    """A fresh LoRA adapter for each domain; the one before is merged.

    What `save` leaves is one adapter of all domains on the base as it was (`stacked`), which PEFT loads.

    Args:
        rank, alpha: of the adapters, whose change of a weight is alpha / rank · B A.
    """

    options: tuple[str, ...] = (*MemoryMethod.options, "rank", "alpha")

    def __init__(self, energy: float, source: str, max_rank: int | str | None, rank: int, alpha: int) -> None:
        super().__init__(energy, source, max_rank)
        self.rank = check_at_least("rank", rank, 1)
        self.alpha = check_at_least("alpha", alpha, 1)
        self._adapters = MergedAdapters(self.name)

    def check(self, model: nn.Module) -> None:
        super().check(model)
        refuse_shared(model)  # two adapters would be merged into the one weight

    def remember(self, model: nn.Module, memory: SubspaceMemory) -> None:
        if has_adapters(model):
            raise ValueError(
                f"model: expected the base model, which {self.name} remembers, got a {type(model).__name__}; merge its "
                "adapter (merge_and_unload), or go on from its folder by restore(base, [folder])"
            )
        super().remember(model, memory)

    @abstractmethod
    def _confine(self, adapted: nn.Module) -> None:
        """Draws the fresh adapter where earlier domains leave room."""

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        refuse_split(model)
        base = self._adapters.merge(model)
        self._begin(base, batches)
        adapted = self._adapters.begin(add_adapter(base, self.rank, self.alpha))
        self._confine(adapted)
        agree_on_adapters(adapted)
        layers: Iterator[tuple[str, Any]] = ((n, m) for n, m in adapted.named_modules() if hasattr(m, "lora_A"))
        unseen = [name for name, layer in layers if not self._known.has_seen(layer.get_base_layer().weight)]
        if self._known.domains and unseen:
            warnings.warn(
                f"{self.name}: {len(unseen)} adapters are trained unprotected, as the memory never saw what goes into "
                f"their layers; the first is {unseen[0]}",
                stacklevel=2,
            )
        return adapted

    def _follow(self, model: nn.Module) -> None:
        """Goes on with the parameters of the model, which fully_shard may have split since it was given out."""
        reshard(model)
        self._weights = self._known.follow()
        for name, before in self._before.items():
            piece = piece_of(self._weights[name])
            if piece is not None and tuple(before.shape) == piece.shape:
                self._before[name] = before[piece.offset[0] : piece.offset[0] + piece.size[0]]

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._check_begun("after_domain")
        self._follow(model)
        self._end(model, MergedWeights(model, self._weights), batches)

    def save(self, folder: Path) -> None:
        """As `Method.save`; and earlier domains' adapters go into the one that the model wrote, before its own."""
        self._adapters.save(folder)
        super().save(folder)

    def restore(self, base: nn.Module, folders: Sequence[Path], remembers: bool = True) -> nn.Module:
        """As `Method.restore`.

        Args:
            remembers: False: the adapter is of a method that keeps no memory, such as `lora`. It is merged then, and
                what the model knows can be protected.
        """
        if not remembers:
            return self._adapters.merge(self._adapters.restore(base, folders, lambda model: None))
        return self._adapters.restore(base, folders, lambda model: self._load(model, folders[-1]))
