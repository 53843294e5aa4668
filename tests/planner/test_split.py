"""What a dry run counts of a model that FSDP2 splits, against what FSDP2's arithmetic says, and its time."""

from __future__ import annotations

import functools

import pytest
import transformers
from torch import distributed

from sparse_cl import ElasticAdamW
from sparse_cl.methods import METHODS
from sparse_cl.planner.cost import cost
from sparse_cl.planner.count import STEP, count
from sparse_cl.planner.devices import MACHINE, find_device
from sparse_cl.planner.model import Workload, build

WIDTH, NEURONS, WORDS, RANK = 32, 72, 90, 4
#: Of the one block, and of all else, which stays whole from the forward pass to the end of the backward pass.
BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * NEURONS + 2 * WIDTH
ROOT = 2 * WORDS * WIDTH + WIDTH
ROTARY = 8 * 4


@functools.cache
def config():
    return transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )


def work(domains=1, **changes):
    return Workload(domains=domains, batch_size=2, length=24, **{"precision": "fp32", **changes})


@functools.cache
def counted(gpus, precision="fp32"):
    return count("adamw", config(), work(precision=precision), gpus=gpus)


def test_each_holds_its_part_and_what_it_computes_is_as_ever(gpus=4):
    one, found = counted(1), counted(gpus)
    parameters = 4 * (BLOCK + ROOT) // gpus  # 32, 72 and 90 rows: 90 on 4 are 23
    padded = 2 * 4 * WIDTH * (-(-WORDS // gpus) * gpus - WORDS) // gpus
    assert found["weights"] == pytest.approx(parameters + padded + ROTARY, abs=64)
    assert found["gradients"] == pytest.approx(parameters + padded, abs=64)
    assert found["state"] == pytest.approx(2 * (parameters + padded), abs=200)
    assert one["gathered"] == 0 and found["gathered"] >= 4 * (BLOCK + ROOT)
    for same in ("activations", "logits", "passes", "forward"):
        assert found[same] == one[same]
    assert found["peaks"][STEP] <= 6 * (parameters + padded) + ROTARY
    assert max(found["peaks"].values()) >= sum(found[k] for k in ("weights", "state", "activations", "logits"))


@pytest.mark.parametrize(("precision", "gather"), [("fp32", 4), ("mixed", 2)])
def test_what_is_sent(precision, gather):
    """Blocks are gathered in both passes, all else once; each gradient is reduced once, in float32."""
    whole = gather * (2 * BLOCK + ROOT) + 4 * (BLOCK + ROOT)
    assert counted(2, precision)["sent"] == [whole // 2]
    assert counted(1, precision)["sent"] == [0]


def test_a_budget_sends_a_number_for_each_direction(monkeypatch):
    def within_a_budget(self, model, lr):
        return ElasticAdamW(
            model.named_parameters(), lr, memory=self.memory if self._known.domains else None, budget=0.1
        )

    monkeypatch.setattr(METHODS["elastic"], "make_optimizer", within_a_budget)
    found = count("elastic", config(), work(2), gpus=2, max_rank=RANK)
    first, second = found["sent"]
    assert first == counted(2)["sent"][0]
    # Seven matrices and the head have directions, the embedding rows that are weighed together; all in float64, and of
    # two processes each passes on half of the numbers, twice.
    assert 8 * RANK * 8 <= second - first <= 8 * (8 * RANK + WORDS)


def test_an_adapter_is_split_with_the_model(gpus=4):
    one, found = (count("lora", config(), work(), gpus=g, rank=RANK) for g in (1, gpus))
    assert found["gradients"] == one["gradients"] / gpus
    assert found["state"] == pytest.approx(one["state"] / gpus, abs=64)


def test_the_processes_are_gone_afterwards_and_real_ones_are_refused():
    counted(2)
    assert not distributed.is_initialized()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="gpus: the other processes are imagined, but this one is one of several"):
            count("adamw", config(), work(), gpus=2)
    finally:
        distributed.destroy_process_group()


def test_time_is_the_longer_of_computing_and_sending():
    model = build(config(), "tiny")
    fast, slow = (find_device("custom", tflops=1, bandwidth=1000, memory=1, price=1, link=link) for link in (1e6, 1e-6))
    a, b = (cost(model, counted(2), work(tokens=960), device, 2) for device in (fast, slow))
    assert a["step_seconds"] == a["compute_seconds"] == b["compute_seconds"] > a["sent_seconds"]
    assert b["step_seconds"] == b["sent_seconds"] == counted(2)["sent"][0] / 1e3
    assert a["steps"] == 10 and a["gpus"] == a["devices"] == 2  # of 2 × 2 × 24 tokens
    assert b["device_hours"] == pytest.approx(2 * 10 * b["step_seconds"] / 3600) and b["hours"] * 2 == b["device_hours"]


def test_what_does_not_fit_is_said():
    small = find_device("custom", tflops=1, bandwidth=1, memory=1e-4, price=1, link=1)
    found = cost(build(config(), "tiny"), counted(2), work(), small, 2)
    assert found["devices"] is None and found["fits"].startswith("does not fit 2 devices: each would hold 0.0 of")


def test_links():
    h100 = find_device("h100")
    assert h100.between(MACHINE) == 450e9 and h100.between(MACHINE + 1) == 400e9
    assert find_device("h100", link=10).between(64) == 10e9
    unknown = find_device("custom", tflops=1, bandwidth=1, memory=1, price=1)
    with pytest.raises(
        ValueError, match="--gpus 2: how fast custom devices send to each other is unknown; give --link"
    ):
        unknown.between(2)
