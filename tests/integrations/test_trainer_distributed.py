"""The callback in several processes, by FSDP2 and by DistributedDataParallel, against one process."""

from __future__ import annotations

import json
import os
import socket
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases.sharded import start
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparse_cl.integrations import ContinualCallback
from sparse_cl.layout import whole
from sparse_cl.methods import Elastic, load_carried
from sparse_cl.models.sharding import split_over_all

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


class Split(Trainer):
    """Trains a model that FSDP2 has split: accelerate, which splits models on GPUs alone, leaves it as it is."""

    def __init__(self, **options):
        super().__init__(**options)
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _clip_grad_norm(self, model):
        return whole(super()._clip_grad_norm(model))


def records(seed):
    ids = torch.randint(3, 64, (32, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": x, "labels": x} for x in ids]


def learn(folder, processes, sharded):
    """Two domains; writes the weights at the end and what was logged."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZES))
    kind = Split if sharded else Trainer
    if sharded:
        split_over_all(model, torch.device("cpu"))
    method = Elastic(strength=20.0)
    for domain in range(2):
        args = TrainingArguments(
            str(folder / str(domain)),
            max_steps=4,
            per_device_train_batch_size=8 // processes,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = kind(model=model, args=args, train_dataset=records(domain), callbacks=[ContinualCallback(method)])
        trainer.train()
        model = trainer.model
        if not sharded:
            trainer.save_model()
    if processes > 1:
        assert (type(trainer.model_wrapped).__name__ == "DistributedDataParallel") != sharded
        assert all(hasattr(p, "placements") == sharded for p in model.parameters())
    flat = torch.cat([whole(p.detach()).flatten() for p in model.parameters()])
    if args.process_index == 0:
        torch.save(flat, folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps([log for log in trainer.state.log_history if "loss" in log][-1]))


def work(rank, folder, processes, sharded, port):
    torch.set_num_threads(1)
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in facts.items()}, ACCELERATE_USE_CPU="1")
    dist.init_process_group("gloo")
    learn(folder, processes, sharded)
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    learn(folder, 1, False)
    return folder


@pytest.mark.parametrize("sharded", [True, False], ids=["fsdp2", "ddp"])
@pytest.mark.filterwarnings("ignore")
def test_two_processes_learn_what_one_learns(alone, tmp_path, sharded):
    assert start(work, 2, tmp_path, 2, sharded, free_port()) == 0
    found, expected = (torch.load(folder / "weights.pt") for folder in (tmp_path, alone))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    said, right = (json.loads((folder / "log.json").read_text()) for folder in (tmp_path, alone))
    for name in ("loss", "old_output_drift", "old_output_drift_most"):
        assert said[name] == pytest.approx(right[name], rel=1e-3), name
    memories = [load_carried(folder / "1").memory for folder in (tmp_path, alone)]
    assert [memory.domains for memory in memories] == [2, 2]
    for name in memories[1].names:
        assert memories[0].rank(name) == memories[1].rank(name)
    if not sharded:
        assert LlamaForCausalLM.from_pretrained(tmp_path / "1").lm_head.weight.shape == (64, 32)
