"""TRL's trainers take the callback as the Trainer of transformers does."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of
from cases.trainers import records

from sparse_cl.integrations import ContinualCallback
from sparse_cl.methods import Elastic, load_carried

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

QUIET = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
QUIET |= {
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "bf16": False,
}


def sft(model, tokenizer, folder, seed, **options):
    data = datasets.Dataset.from_list([{"input_ids": record["input_ids"]} for record in records(seed)])
    args = trl.SFTConfig(str(folder), max_length=8, pad_token=tokenizer.eos_token, **QUIET)
    return trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, **options)


@pytest.mark.parametrize("adapter", [False, True])
def test_sft(tiny_llama, tokenizer, tmp_path, adapter):
    import peft

    model = tiny_llama
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    sft(model, tokenizer, tmp_path / "0", 0, callbacks=[ContinualCallback(Elastic())]).train()
    trainer = sft(model, tokenizer, tmp_path / "1", 1, callbacks=[ContinualCallback(Elastic(), memory=tmp_path / "0")])
    trainer.train()
    assert load_carried(tmp_path / "1").memory.domains == 2
    assert [entry for entry in trainer.state.log_history if entry.get("old_output_drift", 0) > 0]


def test_dpo(tiny_llama, tokenizer, tmp_path):
    rows = [{"prompt": "one two", "chosen": " three", "rejected": " four"}] * 8
    args = trl.DPOConfig(str(tmp_path), max_length=16, **QUIET)
    trainer = trl.DPOTrainer(
        tiny_llama,
        ref_model=copy_of(tiny_llama),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[ContinualCallback(Elastic())],
    )
    trainer.train()
    assert load_carried(tmp_path).memory.domains == 1
    assert torch.isfinite(next(tiny_llama.parameters())).all()
