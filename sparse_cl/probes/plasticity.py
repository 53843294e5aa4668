"""Plasticity: how many steps a model needs to learn something new."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.models.losses import answer_loss
from sparse_cl.models.passes import IGNORED, Batch, evaluation

from .checks import check_least
from .pairing import paired_weights
from .result import Result, plain

Task = Callable[[int], Batch]
"""A probing task by its seed: one batch, all of which is learned at each step."""


@dataclass(frozen=True)
class RandomSequences:
    """Random responses to random prompts, to be memorised: what was learned before cannot help.

    Random-label tasks are how plasticity is measured by Lyle et al. 2023 and Dohare et al. 2024.

    Attributes:
        vocabulary: ids are drawn uniformly from [0, vocabulary).
        sequences: how many pairs.
        prompt_length, response_length: in tokens.
    """

    vocabulary: int
    sequences: int = 32
    prompt_length: int = 8
    response_length: int = 8

    def __post_init__(self) -> None:
        check_least(2, vocabulary=self.vocabulary)
        lengths = {"prompt_length": self.prompt_length, "response_length": self.response_length}
        check_least(1, sequences=self.sequences, **lengths)

    def __call__(self, seed: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, each (sequences, prompt_length + response_length) int64."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.sequences, self.prompt_length + self.response_length)
        ids = torch.randint(self.vocabulary, shape, generator=generator)
        labels = ids.clone()
        labels[:, : self.prompt_length] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@dataclass(frozen=True)
class Fit(Result):
    """How one task was learned.

    Attributes:
        seed: of the task.
        steps: optimizer steps until the loss was at most the target; None where it was not within max_steps.
        losses: before each step, and after the last; nats per token.
        loss_after: after the fixed number of steps.
    """

    seed: int
    steps: int | None
    losses: tuple[float, ...]
    loss_after: float


@dataclass(frozen=True)
class Plasticity(Result):
    """Result of `steps_to_fit`.

    Attributes:
        fits: one a seed.
        target: loss in nats per token; max_steps; fixed_steps; lr: as they were given.
    """

    fits: tuple[Fit, ...]
    target: float
    max_steps: int
    fixed_steps: int
    lr: float

    @property
    def median_steps(self) -> float | None:
        """Median over the seeds; None where half of them did not reach the target, so that it is not known."""
        steps = [self.max_steps + 1 if fit.steps is None else fit.steps for fit in self.fits]
        median = statistics.median(steps)
        reached = statistics.median_high(steps) <= self.max_steps
        return float(median) if reached else None

    @property
    def range_steps(self) -> tuple[int | None, int | None]:
        """Least and most over the seeds; None: more than `max_steps`."""
        steps = [fit.steps for fit in self.fits]
        reached = [step for step in steps if step is not None]
        return min(reached, default=None), None if None in steps else max(reached)

    @property
    def median_loss(self) -> float:
        """Median loss after the fixed number of steps."""
        return statistics.median(fit.loss_after for fit in self.fits)

    def to_json(self) -> dict[str, Any]:
        over_seeds = {name: plain(getattr(self, name)) for name in ("median_steps", "range_steps", "median_loss")}
        return super().to_json() | over_seeds


@dataclass(frozen=True)
class PlasticityChange(Result):
    """Result of `plasticity`: the same tasks, learned from both checkpoints."""

    before: Plasticity
    after: Plasticity

    @property
    def extra_steps(self) -> tuple[int | None, ...]:
        """Steps after less steps before, a task; above 0: plasticity was lost. None where either missed the target."""
        return tuple(
            None if a.steps is None or b.steps is None else b.steps - a.steps
            for a, b in zip(self.before.fits, self.after.fits, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "extra_steps": list(self.extra_steps)}


def steps_to_fit(
    model: nn.Module,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    task: Task | None = None,
    lr: float = 1e-4,
    target: float = 0.5,
    max_steps: int = 100,
    fixed_steps: int = 20,
    fitted: Callable[[], object] = lambda: None,
) -> Plasticity:
    """Number of AdamW steps in which a copy of the model learns a held-out task, from the same start for each seed.

    All of the task is one batch, the learning rate is constant, there is no weight decay and no dropout, and all
    parameters are trained, in float32 (float64 for those in float64). The model itself stays as it is.

    Args:
        model: a causal language model with `logits` in its output; its adapters merged.
        seeds: of the tasks; the spread over them is the interval.
        task: what is learned; None: `RandomSequences` of the model's vocabulary.
        lr: of AdamW.
        target: loss in nats per token that counts as learned.
        max_steps: where it gives up.
        fixed_steps: at which the loss is compared, whether the target was reached or not; at most `max_steps`.
        fitted: called after each task, to move a progress bar.

    Raises:
        ValueError: no seed, or a seed twice; lr, target or numbers of steps that are not positive;
            a loss that is not finite.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected at least one, each once, got {list(seeds)}")
    for name, value in (("lr", lr), ("target", target), ("max_steps", max_steps), ("fixed_steps", fixed_steps)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if fixed_steps > max_steps:
        raise ValueError(f"fixed_steps: expected at most max_steps = {max_steps}, got {fixed_steps}")
    task = RandomSequences(_vocabulary(model)) if task is None else task
    fits: list[Fit] = []
    for seed in seeds:
        losses = _losses(model, task(seed), lr, target, max_steps, fixed_steps)
        fits.append(Fit(seed, _reached(losses, target), tuple(losses), losses[fixed_steps]))
        fitted()
    return Plasticity(tuple(fits), target, max_steps, fixed_steps, lr)


def plasticity(
    before: nn.Module, after: nn.Module, seeds: Sequence[int] = (0, 1, 2), **options: Any
) -> PlasticityChange:
    """The same tasks learned from both checkpoints, in the same order, by `steps_to_fit`, whose `options` it takes.

    The null is no change: a checkpoint compared with itself gives the same numbers.

    Raises:
        ValueError: checkpoints of different structure; and those of `steps_to_fit`.
    """
    for _ in paired_weights(before, after):
        pass
    return PlasticityChange(steps_to_fit(before, seeds, **options), steps_to_fit(after, seeds, **options))


def _vocabulary(model: nn.Module) -> int:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        raise ValueError(f"task: {type(model).__name__} tells no vocabulary; pass task=RandomSequences(vocabulary)")
    return embeddings.weight.shape[0]


def _reached(losses: Sequence[float], target: float) -> int | None:
    """After how many steps the loss was at most the target."""
    return next((number for number, loss in enumerate(losses) if loss <= target), None)


def _losses(model: nn.Module, batch: Batch, lr: float, target: float, max_steps: int, fixed_steps: int) -> list[float]:
    """Of a copy that learns the batch: before each step and after the last, which is no earlier than `fixed_steps`."""
    learner = copy.deepcopy(model).requires_grad_(True)
    if next(learner.parameters()).dtype != torch.float64:
        learner.float()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr, weight_decay=0.0)
    losses: list[float] = []
    with evaluation(learner), torch.enable_grad():
        for done in range(max_steps + 1):
            summed, count = answer_loss(learner, batch)
            loss = summed / count
            losses.append(loss.item())
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss of the probing task is {losses[-1]} after {done} steps; lower lr, {lr:g} now"
                )
            if done == max_steps or (done >= fixed_steps and _reached(losses, target) is not None):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses
