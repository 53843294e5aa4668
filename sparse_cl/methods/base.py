"""What a continual-learning method decides: what is trained in a domain, on what, and by which optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparse_cl.models.parts import refuse_encoders, refuse_quantized
from sparse_cl.optim import Protection
from sparse_cl.subspace import SubspaceMemory

Batch = Mapping[str, Tensor]


def refuse_resized(method: str, shapes: Mapping[str, Sequence[int]], model: nn.Module) -> None:
    """Raises a ValueError if a parameter has another shape than when an earlier domain ended."""
    for name, shape in shapes.items():
        found = tuple(model.get_parameter(name).shape)
        if math.prod(found) != math.prod(shape):
            raise ValueError(
                f"{method}: {name} has shape {found}, and had {tuple(shape)} in the domain before; it cannot follow a "
                "vocabulary that grew. Add all tokens before the first domain"
            )


def check_first(method: str, first: bool) -> None:
    """Whether a text may still be protected.

    Raises:
        ValueError: a text was protected before, or a domain begun; what is remembered of it would be lost.
    """
    if not first:
        raise ValueError(f"{method}: protect comes once, before the first domain; make a new method")


class Method(ABC):
    """A method's life: `check`; where a text is to be protected, `protect`; then for each domain `before_domain`,
    `make_optimizer`, training, `after_domain`, `save`.

    One instance serves one sequence of domains, and may keep what it learns about earlier ones. In a sequence that
    was interrupted a fresh instance is given `restore` in place of the domains that were finished.

    Attributes:
        name: as given to `--method`.
        options: keyword arguments of the constructor that a user may give, each an attribute of its name.
        default_lr: used where the user gives none; chosen on the embedded model and the validation part of the embedded
            domains. Large models want smaller ones.
        kind: "ours", "baseline" (another's continual-learning method) or "bound" (no continual learner: it shows what
            could be reached).
        protects: whether `protect` does anything.
        trains_adapters: whether it takes a model that PEFT wrapped, and trains the adapter that it has.
        separate: whether each domain ends with a model of its own, so that nothing is forgotten.
        history: an entry for each domain that it learned in a trainer, as `Carried.domains` has them.
    """

    name: str
    kind: Literal["ours", "baseline", "bound"] = "ours"
    protects: bool = False
    trains_adapters: bool = False
    separate: bool = False
    options: tuple[str, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    default_lr: float

    def settings(self) -> dict[str, Any]:
        """Its options with their values, for the record of the run."""
        return {option: getattr(self, option) for option in self.options}

    def check(self, model: nn.Module) -> None:
        """Called with the base model before anything is run or written, and by each `before_domain`.

        Raises:
            ValueError: the method cannot train this model.
        """
        refuse_quantized(model, self.name, under_adapters=not self.trains_adapters)
        refuse_encoders(model, self.name)

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Called once before the first domain, where the run was given a text whose knowledge is to be kept.

        Args:
            model: the base model.
            batches: of the text, like a domain's; every token is a label. They are iterated over more than once.

        Raises:
            ValueError: the method protects no text, or has begun its first domain.
        """
        raise ValueError(f"{self.name} protects no text; leave --protect out, or run a method that does")

    def remember(self, model: nn.Module, memory: SubspaceMemory) -> None:
        """Go on from what earlier domains used, in place of `protect` and before the first domain.

        Args:
            model: what `before_domain` will be given.
            memory: of this model, such as `load_carried` reads from a model folder. It is kept, and added to.

        Raises:
            ValueError: the method keeps no such memory, has one already, or the memory is of another model.
        """
        raise ValueError(
            f"{self.name} keeps no memory of inputs, so it would not protect what was learned before; take a method "
            "that does (elastic, elastic-lora, orthogonal, orthogonal-lora), or give it none"
        )

    def steps(self, steps: int, number: int, domains: int, protected: bool = False) -> int:
        """Optimizer steps in the domain of index `number` of `domains`, where the run's setting is `steps`.

        0: the domain is not trained, and its scores are the previous domain's.

        Args:
            protected: whether a text is given to `protect` before the first domain.
        """
        return steps

    def training_data(self, number: int, datasets: Sequence[Dataset], seed: int) -> Dataset:
        """What is trained on in the domain of index `number`.

        Args:
            datasets: the training records of all domains in order; items are what `transformers`' collators take.
            seed: of whatever is drawn.
        """
        return datasets[number]

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        """Prepare for a new domain and return the model to train (the same, or wrapped).

        Args:
            model: what `before_domain` of the domain before returned; at first the base model.
            batches: of the new domain, with input_ids, labels and, where there is padding, attention_mask, each
                (batch, length), on the model's device. It can be iterated over more than once.

        Raises:
            ValueError: as `check`.
        """
        self.check(model)
        return model

    @abstractmethod
    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """A fresh optimizer for the domain; `lr` is the largest rate that it will have."""

    @property
    def own_optimizer(self) -> bool:
        """Whether it works by an optimizer of its own alone, so that `guard` refuses all others."""
        return type(self).guard is Method.guard

    def guard(self, optimizer: torch.optim.Optimizer) -> Protection | None:
        """Puts the method's protection behind an optimizer that somebody else made, between `before_domain` and
        training; None: there is nothing to protect yet.

        Raises:
            ValueError: the method needs an optimizer of its own (`make_optimizer`).
            RuntimeError: no domain was begun.
        """
        raise ValueError(
            f"{self.name} needs an optimizer of its own, which make_optimizer makes; behind another's optimizer take "
            "elastic or orthogonal"
        )

    def penalty(self, model: nn.Module) -> Tensor | None:
        """What is added to the loss of each batch, a scalar with a graph; None: nothing."""
        return None

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:  # noqa: B027
        """Called once the domain is learned, with the same arguments as `before_domain`."""

    def record(self) -> dict[str, Any]:
        """What to report on the domain that was just learned, as JSON holds it; called after `after_domain`."""
        return {}

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write into `folder`, where the model was just saved, what the method must remember.

        In a distributed run one process calls this.
        """

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        """The model as it was after the last finished domain, and the method's own memory of those finished.

        Args:
            base: the untouched base model, which this may make into the model that it returns.
            folders: one for each finished domain, in order: what `save_pretrained` and `save` wrote. At least one.
        """
        # Into the model that is there: a second one would take its room on the device for the rest of the run.
        model: Any = base  # of transformers, which no module here imports
        saved = type(model).from_pretrained(folders[-1], dtype=model.dtype)
        base.load_state_dict(saved.state_dict())
        return base
