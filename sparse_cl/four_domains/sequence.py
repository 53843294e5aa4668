"""One method through the domains: train each in turn, score every domain after each."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from sparse_cl.data.encoding import EncodedRecords, pad
from sparse_cl.methods import Method
from sparse_cl.models.passes import evaluation
from sparse_cl.models.processes import processes
from sparse_cl.optim.names import plain_optimizer

from .evaluate import METRICS, drift_nats, evaluate_domain, text_bits_per_byte
from .files import check_complete, complete
from .memory import peak_memory_bytes, reset_peak_memory
from .prepared import Prepared
from .protection import in_windows
from .state import state_bytes
from .training import train

PROBE_RECORDS = 128
"""Training records of a new domain that a method may look at before and after it."""
DRIFT_WINDOWS = 16
"""Windows of the reference text, its first ones, on which a model's distribution is compared with the base's."""


class DomainBatches:
    """Records from the whole of a domain, evenly spaced, as batches on a device; iterated over afresh each time."""

    def __init__(
        self,
        encoded: EncodedRecords | Sequence[Any],
        batch_size: int,
        device: torch.device,
        records: int = PROBE_RECORDS,
    ) -> None:
        self.encoded, self.batch_size, self.device = encoded, batch_size, device
        self.records = min(records, len(encoded))

    def __len__(self) -> int:
        return -(-self.records // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, self.records, self.batch_size):
            stop = min(start + self.batch_size, self.records)
            items = [self.encoded[i * len(self.encoded) // self.records] for i in range(start, stop)]
            ids, mask = pad([item["input_ids"] for item in items], 0, self.device)
            labels, _ = pad([item["labels"] for item in items], -100, self.device)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Scores:
    """Scores after one stage: for each domain in order, a value of each of `METRICS`; and of the reference text.

    Attributes:
        reference: bits per byte of the reference text; None: there is none.
        drift: KL(base ‖ model) on the first `DRIFT_WINDOWS` windows of it, in nats a token.
    """

    domains: list[dict[str, float | None]]
    reference: float | None
    drift: float | None = None


def score_all(model: nn.Module, prepared: Prepared, learned: int, tick: Callable[[], object] = lambda: None) -> Scores:
    """Scores of the model on the domains and on the reference text.

    Args:
        learned: how many domains it has learned. Before any there is no drift, and all are scored; afterwards those
            that are not have None where `Settings.score` says so. For the drift the base model is loaded
            and let go: kept beside the model it would count in every method's memory.
        tick: called `prepared.scores(learned)` times, to move a progress bar.
    """
    settings, tokenizer, reference = prepared.settings, prepared.tokenizer, prepared.reference
    domains = [
        evaluate_domain(
            model,
            tokenizer,
            domain,
            max_length=settings.max_length,
            max_records=settings.eval_records,
            split=settings.split,
            metrics=settings.metrics,
            tick=tick,
        )
        for domain in prepared.domains[: prepared.scored(learned)]
    ]
    domains += [dict.fromkeys(METRICS) for _ in prepared.domains[len(domains) :]]
    if reference is None:
        return Scores(domains, None)
    with evaluation(model):
        text, nats = text_bits_per_byte(model, tokenizer, reference, settings.max_length), None
        tick()
        if learned:
            windows = in_windows(tokenizer, reference, settings.max_length, DRIFT_WINDOWS)
            nats = drift_nats(prepared.load_base().eval(), model, [window["input_ids"] for window in windows])
        tick()
    return Scores(domains, text, nats)


@dataclass
class Progress:
    """What a sequence has so far; `stages` starts with the base model's scores.

    Attributes:
        stages: Scores before the first domain and after each.
        seconds: training and what the method does around it, scoring left out.
        step_seconds: the median optimizer step of each trained domain; None: too few steps to say.
        peak_memory_bytes: largest of any domain's training.
        state_bytes: the largest state of the optimizer and the method, see `state_bytes`.
        losses: of training, as the Trainer logs them.
        domain_records: for each trained domain, its name and what the method reports on it (`Method.record`).
    """

    stages: list[Scores]
    seconds: float = 0.0
    step_seconds: list[float | None] = field(default_factory=list)
    peak_memory_bytes: int = 0
    state_bytes: int = 0
    losses: list[dict[str, Any]] | None = None
    domain_records: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        return cls(**{**data, "stages": [Scores(**stage) for stage in data["stages"]]})

    def back_to(self, domains: Sequence[str]) -> None:
        """Forget what came after these domains, the first ones of the sequence."""
        self.stages = self.stages[: len(domains) + 1]
        # A domain of no steps has scores and no record.
        trained = sum(record["domain"] in domains for record in self.domain_records)
        self.domain_records = self.domain_records[:trained]
        self.step_seconds = self.step_seconds[:trained]
        self.losses = [entry for entry in self.losses or [] if entry["domain"] in domains]


def stage_folder(folder: Path, number: int, domain: str) -> Path:
    """Where the model is saved after the `number`-th domain (from 1)."""
    return folder / f"{number}-{domain}"


def finished_folders(folder: Path, domains: Sequence[str], steps: Sequence[int], progress: Progress) -> list[Path]:
    """Folders of the finished domains that were trained, each checked to be whole.

    Where one is absent `progress` goes back to before it: that domain and those after it are learned again.

    Args:
        folder: of the method.
        domains: names, in order.
        steps: of each domain; one of 0 steps has no folder.

    Raises:
        CheckpointError: a folder is there and not whole.
    """
    found = []
    finished = len(progress.stages) - 1
    for number, (domain, count) in enumerate(zip(domains[:finished], steps, strict=False), 1):
        path = stage_folder(folder, number, domain)
        if not count:
            continue
        if not path.exists():
            warnings.warn(f"{path} is absent; {folder.name} learns {domain} again", stacklevel=2)
            progress.back_to(domains[: number - 1])
            break
        check_complete(path)
        found.append(path)
    return found


class _Learner:
    """Trains domain after domain; what each of them needs is held here."""

    def __init__(self, method: Method, prepared: Prepared, folder: Path) -> None:
        self.method, self.settings, self.folder = method, prepared.settings, folder
        self.datasets = [
            EncodedRecords(domain.train, prepared.tokenizer, self.settings.max_length) for domain in prepared.domains
        ]
        self.lr = self.settings.lr_of(method.name)
        self.collator = transformers.DataCollatorForSeq2Seq(prepared.tokenizer, label_pad_token_id=-100)

    def learn(self, model: nn.Module, number: int, name: str, steps: int, progress: Progress, bar: tqdm) -> nn.Module:
        """Train on the `number`-th domain (from 1), save, and bring all of `progress` but the scores up to date."""
        method, settings = self.method, self.settings
        batches = DomainBatches(self.datasets[number - 1], settings.batch_size, next(model.parameters()).device)
        # An adapter is initialised here: it must not depend on what this process drew before.
        transformers.set_seed(settings.seed)
        model = method.before_domain(model, batches)
        # Written aside and moved whole: a run that is killed leaves no half model in a domain's place.
        building = self.folder / "unfinished"
        if processes().is_main_process:
            shutil.rmtree(building, ignore_errors=True)
        processes().wait_for_everyone()
        trainer = train(
            model,
            method.training_data(number - 1, self.datasets, settings.seed),
            self.collator,
            lambda m: method.make_optimizer(m, self.lr),
            method.penalty,
            folder=building,
            steps=steps,
            batch_size=settings.batch_size,
            lr=self.lr,
            seed=settings.seed,
            bar=bar,
            autocast=settings.autocast,
        )
        progress.state_bytes = max(progress.state_bytes, state_bytes(method, plain_optimizer(trainer.optimizer)))
        method.after_domain(model, batches)
        trainer.save_model()
        # The Trainer pickles its arguments beside the weights; nothing here reads them, and pickles are unsafe.
        (building / "training_args.bin").unlink(missing_ok=True)
        processes().wait_for_everyone()
        if processes().is_main_process:
            method.save(building)
            complete(building, stage_folder(self.folder, number, name))
        progress.domain_records.append({"domain": name, **method.record()})
        progress.step_seconds.append(trainer.timer.median_seconds())
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses = [{"domain": name, "step": entry["step"], "loss": float(entry["loss"])} for entry in logged]
        progress.losses = (progress.losses or []) + losses
        return model


def run_sequence(
    method: Method,
    base: nn.Module,
    prepared: Prepared,
    folder: Path,
    progress: Progress,
    on_stage: Callable[[Progress], None] = lambda progress: None,
) -> nn.Module:
    """Learn the domains that `progress` does not have yet, and return the model.

    A domain that was trained and not scored when the run ended is trained again: then the model that is scored is
    the one that was trained, whatever a method's `restore` makes of it.

    Args:
        base: the untouched base model; it is trained in place.
        folder: of this method; the model after each domain is saved in `stage_folder`.
        progress: with the base's scores at least; it is brought up to date after each domain, then `on_stage` is
            called with it.

    Raises:
        CheckpointError: the folder of a finished domain is not whole.
    """
    domains, settings = prepared.domains, prepared.settings
    protects = prepared.protected is not None and method.protects
    steps = [method.steps(settings.steps, number, len(domains), protects) for number in range(len(domains))]
    finished = finished_folders(folder, [domain.name for domain in domains], steps, progress)
    done = len(progress.stages) - 1
    learner = _Learner(method, prepared, folder)
    if finished:
        model = method.restore(base, finished)
    else:
        model = base
        if protects:
            assert prepared.protected is not None
            transformers.set_seed(settings.seed)
            windows = in_windows(prepared.tokenizer, prepared.protected, settings.max_length)
            method.protect(model, DomainBatches(windows, settings.batch_size, next(model.parameters()).device))
    # A domain of no steps counts as learned with the one before it.
    learned = [next((i for i in range(n + 1, len(steps)) if steps[i]), len(steps)) for n in range(len(steps))]
    ticks = sum(
        count + prepared.scores(known) for count, known in zip(steps[done:], learned[done:], strict=True) if count
    )
    with tqdm(total=ticks, mininterval=0.5) as bar:
        for number, domain in enumerate(domains[done:], done + 1):
            if not steps[number - 1]:
                progress.stages.append(progress.stages[-1])
                on_stage(progress)
                continue
            reset_peak_memory()
            start = time.perf_counter()
            bar.set_description(f"{method.name}: learning {domain.name} ({number}/{len(domains)})")
            model = learner.learn(model, number, domain.name, steps[number - 1], progress, bar)
            progress.seconds += time.perf_counter() - start
            progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory_bytes())
            bar.set_description(f"{method.name}: scoring after {domain.name}")
            progress.stages.append(score_all(model, prepared, learned[number - 1], bar.update))
            on_stage(progress)
    return model
