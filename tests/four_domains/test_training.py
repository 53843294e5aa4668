"""The Trainer with the logits of labelled tokens alone trains as it does with all."""

from __future__ import annotations

from contextlib import nullcontext

import peft
import pytest
import torch
from cases.families import MIXTURES, make
from cases.methods import copy_of
from tqdm.auto import tqdm

from sparse_cl.four_domains import training
from sparse_cl.models import head


def records():
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        ids = torch.randint(1, 60, (6,), generator=generator)
        labels = torch.where(torch.rand(6, generator=generator) < 0.5, ids, -100)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def together(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def trained(model, folder, **arguments):
    training.train(
        model,
        list(records()),
        together,
        lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1),
        folder=folder,
        steps=2,
        batch_size=2,
        lr=0.1,
        seed=0,
        bar=tqdm(disable=True),
        **arguments,
    )
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def adapted(base):
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return peft.get_peft_model(copy_of(base), config)


def mixture(_):
    return make("Mixtral", {**MIXTURES["Mixtral"], "num_experts_per_tok": 1, "output_router_logits": True})


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (copy_of, {}),
        (copy_of, {"gradient_accumulation_steps": 2}),
        (adapted, {"gradient_accumulation_steps": 2}),
        (mixture, {}),
        (copy_of, {"label_smoothing_factor": 0.1}),
    ],
    ids=["plain", "accumulated", "adapter", "mixture", "smoothed"],
)
def test_training_ends_where_all_logits_end(tiny_llama, tmp_path, monkeypatch, model, arguments):
    seen = []
    only_at = head.logits_only_at
    monkeypatch.setattr(head, "logits_only_at", lambda *given: seen.append(1) or only_at(*given))
    fewer = trained(model(tiny_llama), tmp_path / "fewer", **arguments)
    monkeypatch.setattr(training, "logits_at_labels", lambda model, inputs: nullcontext(inputs))
    for name, weight in trained(model(tiny_llama), tmp_path / "all", **arguments).items():
        torch.testing.assert_close(fewer[name], weight, rtol=1e-5, atol=1e-6)
    steps = 2 * arguments.get("gradient_accumulation_steps", 1)
    assert len(seen) == (0 if "label_smoothing_factor" in arguments else steps)
