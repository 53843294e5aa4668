"""A small HF Trainer run as a process of its own, so that a test can kill it: FOLDER [--die-at STEP] [--resume]."""

import argparse
import os
import signal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sparse_cl import ColumnMask, RowMask, SparseMaskedAdamW


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--param-dtype", default="float32")
    options = parser.parse_args()

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
    model = LlamaForCausalLM(config).to(getattr(torch, options.param_dtype))
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
            output_dir=options.folder,
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
        callbacks=[Die(options.die_at)] if options.die_at else [],
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model(f"{options.folder}/final")


if __name__ == "__main__":
    main()
