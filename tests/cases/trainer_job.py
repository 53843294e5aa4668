"""A small run of the HF Trainer, for a process of its own, so that it can be killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sparse_cl import ColumnMask, RowMask, SparseMaskedAdamW


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def job(folder: Path, dtype: torch.dtype, die_at: int | None, resume: bool) -> None:
    """Trains ten steps and saves the model in ``folder / "final"``, but for a run that dies after step ``die_at``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).to(dtype)
    masks = {}
    for name, parameter in model.named_parameters():
        if "up_proj" in name or "gate_proj" in name:
            masks[name] = RowMask(range(0, 64, 5), parameter.shape, gain=[0.5] * 13)
        elif "down_proj" in name:
            masks[name] = ColumnMask(range(0, 64, 5), parameter.shape)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 64, (16,), generator=generator) for _ in range(64)]
    optimizer = SparseMaskedAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, masks=masks)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=10,
            save_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            bf16=True,
            use_cpu=True,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=[{"input_ids": r, "labels": r} for r in rows],
        optimizers=(optimizer, None),
        callbacks=[Die(die_at)] if die_at else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
