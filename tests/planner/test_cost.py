"""Time, money and devices: checked by hand on round numbers, and on the case of a model of 8 G parameters."""

from __future__ import annotations

import pytest
import transformers

from sparse_cl.planner.cost import cost
from sparse_cl.planner.count import AROUND, PHASES, STEP, count
from sparse_cl.planner.devices import DEVICES, USABLE, find_device
from sparse_cl.planner.model import Workload, build

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
    return transformers.LlamaConfig(**LLAMA_3_8B)


@pytest.fixture(scope="module")
def model(large):
    return build(large, "Llama-3-8B")


def counted(**changes):
    """Of a step of 40 tokens, in round numbers."""
    given = {"weights": 100, "gradients": 50, "state": 200, "kept": 10, "activations": 300, "logits": 60}
    given |= {"peaks": dict(zip(PHASES, (670, 600, 380, 500), strict=True)), "settings": {}, "remark": ""}
    given |= {"forward": 4000, "forward_moved": 2e5, "passes": [12000] * 3, "steps": [0, 600, 1800]}
    given |= {"moved": [5e5] * 3, "sent": [0] * 3, "gathered": 0}
    return {**given, **changes}


def device(**changes):
    given = {"tflops": 1e-6, "bandwidth": 1e-3, "memory": 1.0, "price": 36.0, "mfu": 0.5}
    return find_device("custom", **{**given, **changes})


def test_time_and_money_by_hand(model):
    """At 1e6 FLOP/s and half of them reached, 1e6 bytes/s, 36 dollars an hour."""
    work = Workload(domains=3, tokens=1000, batch_size=4, length=10, precision="fp32", probe_records=5, probe_stages=2)
    found = cost(model, counted(), work, device())
    assert found["token_flops"] == 12000 / 40 and found["forward_flops"] == 100
    assert found["step_flops"] == (0 + 600 + 1800) / 3
    assert found["step_seconds"] == pytest.approx((12000 + 800) / 0.5e6 + 0.5)
    assert found["steps"] == 3 * 25
    assert found["device_hours"] == found["hours"] == pytest.approx(75 * found["step_seconds"] / 3600)
    assert found["dollars"] == pytest.approx(found["device_hours"] * 36)
    tokens, passes = 2 * 3 * 5 * 10, (2 + 3) + 3 * 2
    assert found["probe_flops"] == tokens * 100 * passes
    seconds = found["probe_flops"] / 0.5e6 + tokens / 40 * passes * 2e5 / 1e6
    assert found["probe_dollars"] == pytest.approx(seconds / 100)


def test_the_optimizers_products_take_the_rate_of_float32(model):
    a100, work = DEVICES["a100"], Workload(domains=1)
    without, extra = (cost(model, counted(steps=[n]), work, a100)["step_seconds"] for n in (0, 1e12))
    assert extra - without == pytest.approx(1e12 / (a100.utilization * a100.flops_fp32))


def test_memory_is_the_largest_of_its_phases(model):
    memory = cost(model, counted(), Workload(), device())["memory"]
    assert memory["peak"] == 670 == max(memory["phases"].values())
    assert memory["temporary"] == memory["phases"][STEP] - (100 + 50 + 200 + 10)
    assert memory["observing"] == memory["phases"][AROUND] - (100 + 10)


def test_adamw_for_eight_billion_parameters(large, model):
    """In bfloat16: 16.06 GB of weights, as much of gradients, 32.1 of state, 16.06 of the step."""
    work = Workload(domains=1, batch_size=1, checkpointing=True)
    found = count("adamw", large, work)
    parameters = 8_030_261_248
    assert found["gradients"] == 2 * parameters and found["weights"] == pytest.approx(2 * parameters, rel=1e-6)
    assert found["state"] == pytest.approx(4 * parameters, rel=1e-6)
    peak = max(found["peaks"].values())
    assert peak == pytest.approx(5 * 2 * parameters, rel=0.02)
    planned = cost(model, found, work, find_device("a100"))
    assert (planned["devices"], planned["hours"]) == (2, pytest.approx(planned["device_hours"] / 2))
    tight = cost(model, found, work, find_device("a100", memory=8))
    assert tight["devices"] >= 16
    multiplied = parameters - 128256 * 4096
    assert planned["token_flops"] == pytest.approx((2 + 6) * multiplied, rel=0.08), "forward once more, and attention"


def test_what_does_not_fit_says_what_to_do(model):
    gigabytes = {"activations": 90e9, "logits": 5e9, "peaks": dict.fromkeys(PHASES, 100e9)}
    found = cost(model, counted(**gigabytes), Workload(), find_device("a100"))
    assert found["devices"] is None
    assert "activations and logits of one batch take 95.0" in found["fits"] and "--batch-size" in found["fits"]
    kept = cost(model, counted(kept=90e9, peaks=dict.fromkeys(PHASES, 100e9)), Workload(), find_device("a100"))
    assert kept["devices"] is None
    spread = cost(model, counted(state=90e9, peaks=dict.fromkeys(PHASES, 100e9)), Workload(), find_device("a100"))
    assert spread["devices"] == 2 and USABLE < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens: expected a positive number, got 0"),
        ({"domains": -1}, "domains: expected at least 1, got -1"),
        ({"used": 1.5}, r"used: expected a share in \[0, 1\], got 1.5"),
        ({"probe_records": -1}, "probe_records: expected at least 0, got -1"),
        ({"precision": "fp8"}, "precision: expected bf16 or mixed or fp32, got 'fp8'"),
    ],
)
def test_bad_workloads(arguments, message):
    with pytest.raises(ValueError, match=message):
        Workload(**arguments)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("b200", {}, "unknown device 'b200': expected a100-40, a100, h100, h200, or custom"),
        ("custom", {"tflops": 1.0, "price": 2.0}, "custom needs --bandwidth, --memory too"),
        ("h100", {"price": -1.0}, "--price: expected a positive number, got -1"),
        ("h100", {"tflops": float("nan")}, "--tflops: expected a positive number, got nan"),
        ("h100", {"mfu": 1.2}, r"--mfu: expected a share in \(0, 1\], got 1.2"),
    ],
)
def test_bad_devices(name, changes, message):
    with pytest.raises(ValueError, match=message):
        find_device(name, **changes)


def test_given_numbers_take_the_place_of_known_ones():
    free = find_device("h100", price=0.0, memory=40, tflops=500, bandwidth=1000, mfu=0.2)
    assert (free.price, free.memory, free.flops, free.flops_fp32) == (0, 40e9, 500e12, 500e12)
    assert (free.bandwidth, free.utilization, free.name) == (1e12, 0.2, "h100")
    assert find_device("h100") == DEVICES["h100"]
