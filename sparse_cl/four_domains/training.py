"""Training by the Hugging Face Trainer, with an optimizer of our own and one progress bar."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from sparse_cl.layout import is_sharded, whole
from sparse_cl.models.head import logits_at_labels
from sparse_cl.optim.names import plain_optimizer

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Penalty = Callable[[nn.Module], torch.Tensor | None]


class OwnOptimizerTrainer(transformers.Trainer):
    """A Trainer whose optimizer is `make_optimizer(model)`, and to whose loss `penalty(model)` is added.

    With `autocast` "bf16" forward and loss run under autocast, the penalty does not. TrainingArguments(bf16=True) would
    put autocast into the model's own forward: there it stays for scoring and probes, and once it is taken out,
    accelerate leaves it out of every later training of the model.

    `create_optimizer` is overridden, rather than an optimizer passed in, because FSDP allows only this.
    """

    model: Any
    optimizer: Any
    timer: StepTimer

    def __init__(
        self,
        *args: Any,
        make_optimizer: MakeOptimizer,
        penalty: Penalty = lambda model: None,
        autocast: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.make_optimizer, self.penalty, self.autocast = make_optimizer, penalty, autocast
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(self.model)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        own = self.accelerator.unwrap_model(model)
        autocast = torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast == "bf16")
        # Whoever asks for outputs wants those of all tokens, and another loss or a patched model takes them all.
        others = return_outputs or self.label_smoother or self.compute_loss_func or self.args.use_liger_kernel
        fewer = nullcontext(inputs) if others or self.args.torch_compile else logits_at_labels(own, inputs)
        with autocast, fewer as counted:
            result = super().compute_loss(model, counted, return_outputs=return_outputs, **kwargs)
        penalty = self.penalty(own)
        if penalty is None:
            return result
        # The Trainer adds up the losses of the batches that are accumulated, each divided already.
        penalty = penalty / self.current_gradient_accumulation_steps
        return (result[0] + penalty, *result[1:]) if return_outputs else result + penalty

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # The gradient of a masked parameter is dense: its frozen entries must not shrink the active ones' step.
        optimizer: Any = plain_optimizer(self.optimizer)
        if hasattr(optimizer, "clip_grad_norm_"):
            return optimizer.clip_grad_norm_(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)


_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Of a checkpoint: what is frozen, as the base of an adapter, is what it was when the run began."""


class SplitTrainer(OwnOptimizerTrainer):
    """The same for a model that FSDP2 has split already, on CPUs as on GPUs.

    accelerate splits models itself, but on CPUs wraps them in DistributedDataParallel, whatever it is asked for. Here
    it leaves the model alone, and `torch.distributed.checkpoint` saves and loads what each process holds.
    """

    _STATE = "parts"
    """Folder of a checkpoint that holds the model and the optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return whole(super()._clip_grad_norm(model))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Leaves the model to the checkpoint's parts."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        dcp.save(
            {"model": get_model_state_dict(self.model, options=_TRAINED), **self._optimizer_state()},
            checkpoint_id=self._parts(output_dir),
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = {"model": get_model_state_dict(self.model, options=_TRAINED)}
        dcp.load(state, checkpoint_id=self._parts(resume_from_checkpoint))
        set_model_state_dict(self.model, state["model"], options=_TRAINED)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._optimizer_state()
        dcp.load(state, checkpoint_id=self._parts(checkpoint))
        # Parameters that the optimizer freezes have no state.
        some = StateDictOptions(strict=False)
        set_optimizer_state_dict(self.model, plain_optimizer(self.optimizer), state["optimizer"], options=some)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _parts(self, checkpoint: str) -> Path:
        return Path(checkpoint) / self._STATE

    def _optimizer_state(self) -> dict[str, Any]:
        return {"optimizer": get_optimizer_state_dict(self.model, plain_optimizer(self.optimizer))}


def warmup_of(steps: int) -> int:
    """Steps in which the learning rate rises from 0; a single step has none, as it would be taken at 0."""
    return min(steps - 1, max(1, steps // 10))


class StepTimer(transformers.TrainerCallback):
    """Times each optimizer step: forward, backward, clipping and update, without loading the batch.

    On a GPU by events in its stream, which are read when training is over, so that no step waits.
    """

    WARM_UP = 2
    """First steps that are left out: they allocate."""

    def __init__(self) -> None:
        self._marks: list[tuple[Any, Any]] = []
        self._start: Any = None

    @staticmethod
    def _now() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks.append((self._start, self._now()))

    def median_seconds(self) -> float | None:
        """The median step in seconds; None where there were no more than `WARM_UP`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            seconds = [start.elapsed_time(end) / 1000 for start, end in self._marks[self.WARM_UP :]]
        else:
            seconds = [end - start for start, end in self._marks[self.WARM_UP :]]
        return statistics.median(seconds) if seconds else None


class _Bar(transformers.TrainerCallback):
    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step)  # of a run that goes on

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


def train(
    model: nn.Module,
    dataset: Dataset | Sequence[dict[str, Any]],
    collator: Callable,
    make_optimizer: MakeOptimizer,
    penalty: Penalty = lambda model: None,
    *,
    folder: Path,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    bar: tqdm,
    autocast: str | None = None,
    resume: str | None = None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    **arguments: Any,
) -> OwnOptimizerTrainer:
    """Train `model` in place and return the Trainer, whose `state.log_history` has the losses, `timer` the step time.

    The order of the data depends on `seed` and the data set's length alone, so it is the same for every method.
    The learning rate rises over the first tenth of the steps and falls linearly to 0; gradients are clipped to
    norm 1.

    Args:
        model, dataset, collator: as `transformers.Trainer` takes them.
        make_optimizer: called once with the model.
        penalty: called with the model for each batch; what it returns is added to the loss.
        folder: the Trainer's output folder.
        steps: optimizer steps.
        batch_size: per device.
        lr: peak learning rate; the optimizer must have been given the same.
        bar: moved by one for every step.
        autocast: "bf16": forward and backward under autocast; the weights and the optimizer keep their dtype, and the
            model is returned without autocast.
        resume: a checkpoint of the Trainer's to go on from.
        callbacks: further ones.
        arguments: further `transformers.TrainingArguments`, which go before those chosen here.
    """
    chosen = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": warmup_of(steps),
        "max_grad_norm": 1.0,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    timer = StepTimer()
    split = any(map(is_sharded, model.parameters()))
    trainer = (SplitTrainer if split else OwnOptimizerTrainer)(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **{**chosen, **arguments}),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[_Bar(bar), timer, *callbacks],
        make_optimizer=make_optimizer,
        penalty=penalty,
        autocast=autocast,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.timer = timer
    trainer.train(resume_from_checkpoint=resume)
    return trainer
