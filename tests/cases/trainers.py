"""Small domains as trainers take them, and a Trainer without a word on the screen."""

from __future__ import annotations

import torch
import transformers


def records(seed, count=16, length=8):
    """Records over a seventh of the vocabulary, whose first two tokens are no labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(40 * seed + 1, 40 * seed + 40, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100, -100, *ids[2:]]})
    return found


def trainer_of(model, data, folder, callbacks=(), optimizers=(None, None), kind=transformers.Trainer, **options):
    chosen = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2}
    args = transformers.TrainingArguments(
        str(folder),
        **{**chosen, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, **options},
    )
    trainer = kind(model=model, args=args, train_dataset=data, callbacks=list(callbacks), optimizers=optimizers)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
