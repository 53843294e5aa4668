"""One method through the domains: train each in turn, score every domain after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from sparse_cl.methods import Method

from .data import Domain
from .encoding import EncodedRecords, pad
from .evaluate import METRICS, evaluate_domain, text_bits_per_byte
from .memory import peak_memory_bytes, reset_peak_memory
from .settings import Settings
from .training import train

PROBE_RECORDS = 128
"""Training records of a new domain that a method may look at before and after it."""


class DomainBatches:
    """The first records of a domain as batches on a device; iterated over afresh each time."""

    def __init__(
        self, encoded: EncodedRecords, batch_size: int, device: torch.device, records: int = PROBE_RECORDS
    ) -> None:
        self.encoded, self.batch_size, self.device = encoded, batch_size, device
        self.records = min(records, len(encoded))

    def __len__(self) -> int:
        return -(-self.records // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, self.records, self.batch_size):
            stop = min(start + self.batch_size, self.records)
            items = [self.encoded[i] for i in range(start, stop)]
            ids, mask = pad([item["input_ids"] for item in items], 0, self.device)
            labels, _ = pad([item["labels"] for item in items], -100, self.device)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Scores:
    """Scores after one stage: for each domain in order, a value of each of `METRICS`; and of the reference text."""

    domains: list[dict[str, float | None]]
    reference: float | None

    def to_json(self) -> dict[str, Any]:
        return {"domains": self.domains, "reference": self.reference}


def score_all(
    model: nn.Module,
    tokenizer: Any,
    domains: Sequence[Domain],
    reference: str | None,
    settings: Settings,
    *,
    split: str = "test",
    tick: Callable[[], object] = lambda: None,
) -> Scores:
    """Scores of the model on every domain and on the reference text; `tick` as in `evaluate_domain`."""
    scores = [
        evaluate_domain(
            model,
            tokenizer,
            domain,
            max_length=settings.max_length,
            max_records=settings.eval_records,
            split=split,
            tick=tick,
        )
        for domain in domains
    ]
    text = None
    if reference is not None:
        text = text_bits_per_byte(model, tokenizer, reference, settings.max_length)
        tick()
    return Scores(scores, text)


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state tensors (moments, master weights, counts)."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


@dataclass
class Progress:
    """What a sequence has so far; `stages` starts with the base model's scores.

    `domain_records` has, for each finished domain, its name and what the method reports on it (`Method.record`).
    """

    stages: list[Scores]
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    state_bytes: int = 0
    losses: list[dict[str, Any]] | None = None
    domain_records: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "stages": [stage.to_json() for stage in self.stages]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        return cls(**{**data, "stages": [Scores(**stage) for stage in data["stages"]]})


def matrix(stages: Sequence[Scores], metric: str) -> list[list[float | None]]:
    """R of one metric, a row a stage."""
    return [[scores[metric] for scores in stage.domains] for stage in stages]


def stage_folder(folder: Path, number: int, domain: str) -> Path:
    """Where the model is saved after the `number`-th domain (from 1)."""
    return folder / f"{number}-{domain}"


def run_sequence(
    method: Method,
    base: nn.Module,
    tokenizer: Any,
    domains: Sequence[Domain],
    reference: str | None,
    settings: Settings,
    folder: Path,
    progress: Progress,
    on_stage: Callable[[Progress], None] = lambda progress: None,
    *,
    split: str = "test",
) -> nn.Module:
    """Learn the domains that `progress` has not yet, and return the model.

    Args:
        base: the untouched base model; it is trained in place.
        folder: of this method; the model after each domain is saved in `stage_folder`.
        progress: with the base's scores at least; it is brought up to date after each domain, then `on_stage` is
            called with it.
        split: what is scored: "test", or "validation" to choose settings.
    """
    done = len(progress.stages) - 1
    finished = [stage_folder(folder, number, domain.name) for number, domain in enumerate(domains[:done], 1)]
    model = method.restore(base, finished) if finished else base
    lr = settings.lr_of(method.name)
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    evaluations = len(domains) * len(METRICS) + (reference is not None)
    reset_peak_memory()
    total = (settings.steps + evaluations) * (len(domains) - done)
    datasets = [EncodedRecords(domain.train, tokenizer, settings.max_length) for domain in domains]
    with tqdm(total=total, mininterval=0.5) as bar:
        for number, domain in enumerate(domains[done:], done + 1):
            steps = method.steps(settings.steps, number - 1, len(domains))
            if not steps:
                progress.stages.append(progress.stages[-1])
                on_stage(progress)
                continue
            start = time.perf_counter()
            bar.set_description(f"{method.name}: learning {domain.name} ({number}/{len(domains)})")
            encoded = datasets[number - 1]
            batches = DomainBatches(encoded, settings.batch_size, next(model.parameters()).device)
            # An adapter is initialised here: it must not depend on what this process drew before.
            transformers.set_seed(settings.seed)
            model = method.before_domain(model, batches)
            trainer = train(
                model,
                method.training_data(number - 1, datasets, settings.seed),
                collator,
                lambda m: method.make_optimizer(m, lr),
                method.penalty,
                folder=stage_folder(folder, number, domain.name),
                steps=steps,
                batch_size=settings.batch_size,
                lr=lr,
                seed=settings.seed,
                bar=bar,
            )
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            progress.state_bytes = max(progress.state_bytes, optimizer_state_bytes(optimizer))
            method.after_domain(model, batches)
            trainer.save_model()
            # The Trainer pickles its arguments beside the weights; nothing here reads them, and pickles are unsafe.
            (Path(trainer.args.output_dir) / "training_args.bin").unlink(missing_ok=True)
            if trainer.is_world_process_zero():
                method.save(stage_folder(folder, number, domain.name))
            progress.domain_records.append({"domain": domain.name, **method.record()})
            progress.losses = (progress.losses or []) + [
                {"domain": domain.name, "step": entry["step"], "loss": float(entry["loss"])}
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
            progress.seconds += time.perf_counter() - start
            bar.set_description(f"{method.name}: scoring after {domain.name}")
            progress.stages.append(
                score_all(model, tokenizer, domains, reference, settings, split=split, tick=bar.update)
            )
            progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory_bytes())
            on_stage(progress)
    return model
