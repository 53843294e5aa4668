"""DeepSpeed's ZeRO, which flattens parameters: nothing is stepped, and the error says what splits a model instead."""

from __future__ import annotations

import importlib.util
import json
import socket

import pytest
import torch
from cases.forked import exit_code
from cases.fsdp_flattened import MAKERS, memory_of, network
from cases.trainers import records, trainer_of
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_cl.integrations import ContinualCallback
from sparse_cl.methods import Elastic

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

STAGES = (1, 2, 3)
KINDS = {"plain": lambda params, _: torch.optim.AdamW(params), **MAKERS}


def config(stage):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }


def step(stage, kind, born_empty):
    """What a step of a kind of optimizer says, and whether it or what came before moved any weight.

    Args:
        born_empty: the model is made by ZeRO, before there is an optimizer.
    """
    import deepspeed

    memory = memory_of(network())
    with deepspeed.zero.Init(config_dict_or_path=config(stage), enabled=born_empty):
        model = network()
    said = ""
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=born_empty):
        before = [p.detach().clone() for p in model.parameters()]
    try:
        if not born_empty:
            memory.bind(model)
        optimizer = KINDS[kind](model.named_parameters(), memory)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage))
        engine.backward(engine(torch.ones(2, 8)).square().mean())
        engine.step()
    except (RuntimeError, ValueError) as error:
        said = str(error)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    return said, moved


def train(stage, folder):
    """What a Trainer with the callback says."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
    trainer = trainer_of(
        model,
        records(0),
        folder,
        [ContinualCallback(Elastic())],
        deepspeed={**config(stage), "train_micro_batch_size_per_gpu": "auto"},
    )
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error), trainer.state.global_step > 0
    return "", True


def work(folder):
    import deepspeed

    # Which would have to be compiled; without it torch's gloo does all.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    found = {f"{kind} {stage} {False}": step(stage, kind, False) for stage in STAGES for kind in KINDS}
    found |= {f"{kind} 3 {True}": step(3, kind, True) for kind in KINDS}
    found |= {f"trainer {stage}": train(stage, folder / str(stage)) for stage in STAGES}
    (folder / "found.json").write_text(json.dumps(found))
    deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "ACCELERATE_USE_CPU": "1"}
    assert exit_code(work, folder, DS_ACCELERATOR="cpu", **one, **place) == 0
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("stage", "born_empty"), [*((stage, False) for stage in STAGES), (3, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_refused_before_anything_moves(found, stage, born_empty, kind):
    said, moved = found[f"{kind} {stage} {born_empty}"]
    if kind == "plain":
        assert (said, moved) == ("", True), "what is refused is what would have been ignored"
        return
    assert not moved
    assert "ZeRO" in said and "flatten" in said and "FSDP2 (torch's fully_shard)" in said


@pytest.mark.parametrize("stage", STAGES)
def test_the_callback_refuses_zero_when_training_begins(found, stage):
    said, moved = found[f"trainer {stage}"]
    assert not moved
    assert said.startswith("ContinualCallback:") and "FSDP2" in said and "no DeepSpeed" in said
