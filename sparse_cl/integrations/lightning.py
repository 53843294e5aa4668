"""A callback for Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from torch import nn

from sparse_cl.methods import Method
from sparse_cl.optim.names import plain_optimizer

from .domain import Domain


class ContinualLightning(lightning.Callback):
    """As `ContinualCallback`, for Lightning: one process, one optimizer, automatic optimization.

        trainer = lightning.Trainer(callbacks=[ContinualLightning(Elastic(), model=lambda module: module.model)])

    Checkpoints hold the protection's state; `fit(ckpt_path=...)` goes on with the same bits. `old_output_drift` is
    logged. When training ends, what the model remembers is in `carried`, and in `<folder>/sparse_cl/` where a folder is
    given. `gradient_clip_val` counts active entries alone, under bf16-mixed too.

    Args:
        method, memory, name, records: as for `ContinualCallback`.
        model: which part of the LightningModule is the language model; by default its attribute `model`.
        folder: where what the model carries is written.
    """

    def __init__(
        self,
        method: Method,
        *,
        memory: str | Path | None = None,
        model: Callable[[Any], nn.Module] = lambda module: module.model,
        folder: str | Path | None = None,
        name: str = "domain",
        records: int = 128,
    ) -> None:
        self.method, self.memory, self.model = method, memory, model
        self.folder, self.name, self.records = folder, name, records
        self.domain: Domain | None = None
        self._resumes: dict[str, Any] | None = None
        self._began = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size > 1 or len(trainer.optimizers) != 1:
            raise RuntimeError(
                f"ContinualLightning: expected one process and one optimizer, got {trainer.world_size} and "
                f"{len(trainer.optimizers)}. Train in one process with one optimizer, or by the HF Trainer"
            )
        # Lightning clips under bf16-mixed only where the optimizer says that it does not unscale gradients itself.
        plain_optimizer(trainer.optimizers[0])._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.domain = Domain(
            self.method,
            self.model(pl_module),
            trainer.train_dataloader,
            trainer.optimizers[0],
            memory=self.memory,
            records=self.records,
            resumes=self._resumes,
        )
        self.memory = None  # the method has it now, whatever becomes of this training
        self._resumes, self._began = None, trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.domain is None or trainer.global_step == self._began:
            return  # gradients are accumulated still
        self.domain.prove()
        if trainer.logger is not None and trainer.global_step % trainer.log_every_n_steps == 0:
            drift = self.domain.drift()
            if drift:
                pl_module.log("old_output_drift", sum(drift.values()) / len(drift))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.domain is None:
            return
        self.domain.end(self.folder, name=self.name, steps=trainer.global_step)
        self.carried = self.domain.carried()
        self.domain = None

    def state_dict(self) -> dict[str, Any]:
        # Lightning leaves out a state that is empty, and a resumed domain would count as one that begins.
        return {} if self.domain is None else {"domain": self.domain.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumes = state_dict.get("domain", state_dict)
