"""Time, money and devices: checked by hand on round numbers, and on the case of a model of 8 G parameters."""

from __future__ import annotations

import pytest
import torch
import transformers

from sparse_cl.planner.activations import activation_bytes, logit_bytes
from sparse_cl.planner.cost import Workload, cost, train_flops
from sparse_cl.planner.demands import demand
from sparse_cl.planner.devices import DEVICES, USABLE, find_device
from sparse_cl.planner.shapes import shape_of_config

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def large():
    return shape_of_config(transformers.LlamaConfig(**LLAMA_3_8B), "Llama-3-8B")


@pytest.fixture(scope="module")
def small():
    sizes = {**LLAMA_3_8B, "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return shape_of_config(transformers.LlamaConfig(**sizes), "small", torch.float32)


def device(**changes):
    given = {"tflops": 1e-6, "bandwidth": 1e-3, "memory": 1.0, "price": 36.0, "utilization": 0.5}
    return find_device("custom", **{**given, **changes})


def test_time_and_money_by_hand(small):
    """At 1e6 FLOP/s and half of them reached, 1e6 bytes/s, 36 dollars an hour."""
    work = Workload(domains=3, tokens=1000, batch_size=4, length=10, precision="fp32", probe_records=5, probe_stages=2)
    found = cost("adamw", small, work, device())
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 100 * 32
    weights = matrices + 100 * 32 + 5 * 32
    forward = 2 * matrices + 2 * 4 * 10 * 32
    assert found.token_flops == 3 * forward
    assert found.step_seconds == pytest.approx(40 * 3 * forward / 0.5e6 + 28 * weights / 1e6)
    assert found.steps == 3 * 25
    assert found.device_hours == found.hours == pytest.approx(75 * found.step_seconds / 3600)
    assert found.dollars == pytest.approx(found.device_hours * 36)
    passes = work.forward_passes + 3 * work.backward_passes
    assert found.probe_flops == 2 * 3 * 5 * 10 * forward * passes
    assert found.probe_dollars == pytest.approx(found.probe_flops / 0.5e6 / 100)


def test_projections_by_hand(small):
    """Before domains 0, 1, 2, 3 a layer of width n has 0, .2n, .4n, .6n used directions; of the last .4n are free."""
    work = Workload(used=0.8, precision="fp32")
    found = cost("orthogonal", small, work, device())
    layers = 2 * [(32, 32)] * 4 + 2 * [(48, 32)] * 2 + 2 * [(32, 48)] + [(100, 32)]
    expected = 0
    for rows, width in layers:
        ranks = [round(share * width) for share in (0, 0.2, 0.4, 0.6)]
        expected += 4 * rows * width * sum(min(rank, width - rank) for rank in ranks) / 4
    assert found.projection_flops == expected
    narrow = cost("orthogonal", small, work, device(), max_rank=2)
    assert narrow.projection_flops == sum(4 * rows * width * (0 + 2 + 4 + 6) / 4 for rows, width in layers)


def test_projections_take_the_rate_of_float32(large):
    work = Workload(used=0.4)
    quick = cost("orthogonal", large, work, find_device("a100"))
    slow = 4 * DEVICES["a100"].flops_fp32
    a100 = DEVICES["a100"]
    products = work.step_tokens * quick.token_flops / (0.4 * a100.flops)
    moved = quick.demand.step_bytes / a100.bandwidth
    assert quick.step_seconds - products - moved == pytest.approx(10 * quick.projection_flops / slow)


def test_memory_is_the_largest_of_its_phases(small):
    work = Workload(batch_size=2, length=16, precision="fp32")
    memory = cost("adamw", small, work, device()).memory
    held = memory.weights + memory.state
    assert memory.phases["start of the backward pass"] == held + memory.activations + memory.logits
    assert memory.phases["optimizer's step"] == held + memory.gradients + memory.temporary
    assert memory.peak == max(memory.phases.values())
    asked = demand("adamw", small)
    kept, again = (activation_bytes(small, asked, "fp32", 32, checkpointing) for checkpointing in (False, True))
    assert again == kept // 2 + 2 * 32 * 32 * 4, "one of two blocks, and both inputs"
    assert logit_bytes(small, "fp32", 32) == 32 * 100 * 16


def test_devices_that_share_the_state(large):
    """AdamW in bfloat16: 16.06 GB of weights, as much of gradients, 32.1 of state, 16.06 of the step."""
    work = Workload(batch_size=1, checkpointing=True)
    peak = cost("adamw", large, work, find_device("a100")).memory.peak
    assert peak == pytest.approx(5 * 2 * 8_030_261_248, rel=1e-3)
    units = 2 * 2 * 128256 * 4096  # the head twice, in bfloat16, is whole on every device
    for count, gigabytes in ((1, peak / USABLE), (2, (peak / 2 + units) / USABLE), (4, (peak / 4 + units) / USABLE)):
        enough = find_device("a100", memory=gigabytes / 1e9 * 1.0001)
        assert cost("adamw", large, work, enough).devices == count
    found = cost("adamw", large, work, find_device("a100"))
    assert (found.devices, found.hours) == (2, pytest.approx(found.device_hours / 2))


def test_what_does_not_fit_says_what_to_do(large):
    batch = cost("lora", large, Workload(batch_size=512), find_device("a100"))
    assert batch.devices is None
    assert "activations and logits of one batch alone take" in batch.fits and "--batch-size" in batch.fits
    protected = cost("orthogonal", large, Workload(), find_device("a100"))
    assert protected.devices is None and "bases of directions are not spread over several" in protected.fits
    tight = cost("adamw", large, Workload(batch_size=1), find_device("a100", memory=8))
    assert tight.devices is not None and tight.devices > 16


def test_a_hundred_hours_for_four_domains_of_8b_are_more_tokens_than_usual(large):
    """A first estimate was 80 to 120 A100 hours for LoRA and probing. Usual sets, 20 to 50 M tokens a domain, cost a
    tenth of that; it takes about 300 M tokens a domain, or several runs."""

    def hours(tokens, **changes):
        found = cost("lora", large, Workload(tokens=tokens, **changes), find_device("a100"))
        assert found.devices == 1
        return found.device_hours + found.probe_device_hours

    assert 5 < hours(20e6) < hours(50e6, checkpointing=True) < 25
    assert 80 < hours(300e6) < hours(300e6, checkpointing=True) < 125
    per_token = hours(2e9) / 8e9 * 3600 * 0.4 * 312e12
    products = train_flops(large, demand("lora", large), 512, False)
    assert per_token == pytest.approx(products, rel=0.02), "no more than the products at that rate"
    assert products == pytest.approx(4 * large.multiplied, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens: expected a positive number, got 0"),
        ({"domains": -1}, "domains: expected a positive number, got -1"),
        ({"used": 1.5}, r"used: expected a share in \[0, 1\], got 1.5"),
        ({"probe_records": -1}, "probe_records: expected zero or more, got -1"),
        ({"precision": "fp8"}, "precision: expected one of bf16, mixed, fp32, got 'fp8'"),
    ],
)
def test_bad_workloads(arguments, message):
    with pytest.raises(ValueError, match=message):
        Workload(**arguments)


def test_longer_sequences_than_the_model_takes(large):
    with pytest.raises(ValueError, match="length: expected at most the model's context of 8192 tokens, got 8193"):
        cost("adamw", large, Workload(length=8193), find_device("h100"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("b200", {}, "unknown device 'b200': expected a100-40, a100, h100, h200, or custom"),
        ("custom", {"tflops": 1.0, "price": 2.0}, "custom needs --bandwidth, --memory too"),
        ("h100", {"price": -1.0}, "--price: expected a positive number, got -1"),
        ("h100", {"tflops": float("nan")}, "--tflops: expected a positive number, got nan"),
        ("h100", {"utilization": 1.2}, r"--mfu: expected a share in \(0, 1\], got 1.2"),
    ],
)
def test_bad_devices(name, changes, message):
    with pytest.raises(ValueError, match=message):
        find_device(name, **changes)


def test_given_numbers_take_the_place_of_known_ones():
    free = find_device("h100", price=0.0, memory=40, tflops=500, bandwidth=1000, utilization=0.2)
    assert (free.price, free.memory, free.flops, free.flops_fp32) == (0, 40e9, 500e12, 500e12)
    assert (free.bandwidth, free.utilization, free.name) == (1e12, 0.2, "h100")
    assert find_device("h100") == DEVICES["h100"]
