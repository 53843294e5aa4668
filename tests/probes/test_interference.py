from __future__ import annotations

import json
import math

import pytest
import torch

from sparse_cl.models.losses import mean_loss
from sparse_cl.probes.gradients import GradientProbe
from sparse_cl.probes.interference import interference

DOMAINS = ("a", "b", "c")


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(model, batch):
    """½ (θ-t)ᵀ H (θ-t) of one domain, batch = (H, t), as the sum over 2 tokens."""
    curvature, target = batch
    offset = model.weight.flatten() - target
    return offset @ curvature @ offset, 2


def setting(seed=0):
    model = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(normal(seed, 3, 4))
    batches = {}
    for number, domain in enumerate(DOMAINS):
        root = normal(10 + number, 12, 12)
        batches[domain] = [(root @ root.T / 12, normal(20 + number, 12))]
    probe = GradientProbe(model, {"layer": model}, loss=quadratic)
    return model, batches, {domain: probe.run(own) for domain, own in batches.items()}


def test_on_quadratics_both_are_known_exactly():
    model, batches, gradients = setting()
    start = model.weight.detach().flatten().clone()
    found = interference(model, batches, gradients, modules={"layer": model}, loss=quadratic, step=0.05)
    length = 0.05 * float(start.norm())
    assert (found.domains, found.step) == (DOMAINS, pytest.approx(length))
    for i, a in enumerate(DOMAINS):
        curvature, target = batches[a][0]
        slope = curvature @ (start - target)
        assert found.loss[i] == pytest.approx(float((start - target) @ slope) / 2)
        for j, b in enumerate(DOMAINS):
            other, goal = batches[b][0]
            uphill = other @ (start - goal)
            move = -length * uphill / uphill.norm()
            first = float(slope @ move)
            assert found.first_order[i][j] == pytest.approx(first, rel=1e-9)
            assert found.measured[i][j] == pytest.approx(first + float(move @ curvature @ move) / 2, rel=1e-9)
            assert found.relative()[i][j] == pytest.approx(found.measured[i][j] / found.loss[i])
    json.dumps(found.to_json(), allow_nan=False)


def test_small_steps_measure_what_the_gradients_say(tiny_llama):
    model = tiny_llama.double()
    batches = {
        domain: [{"input_ids": torch.randint(1, 256, (3, 12), generator=torch.Generator().manual_seed(seed))}]
        for seed, domain in enumerate(DOMAINS)
    }
    gradients = {domain: GradientProbe(model).run(own) for domain, own in batches.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = interference(model, batches, gradients, step=1e-4)
    largest = max(abs(value) for row in found.first_order for value in row)
    for first, measured in zip(found.first_order, found.measured, strict=True):
        assert measured == pytest.approx(first, abs=0.01 * largest)
    assert all(found.first_order[i][i] < 0 for i in range(3))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("calls", [1, 4, 8])
def test_weights_are_put_back_on_error_too(tiny_llama, calls):
    batches = {domain: [{"input_ids": torch.tensor([[1, 2 + i, 3]])}] for i, domain in enumerate("ab")}
    gradients = {domain: GradientProbe(tiny_llama).run(own) for domain, own in batches.items()}
    weights = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    left = iter(range(calls - 1))

    def loss(model, batch):
        next(left)
        return torch.tensor(1.0), 1

    tiny_llama.train()
    if calls < 7:
        with pytest.raises((StopIteration, RuntimeError)):
            interference(tiny_llama, batches, gradients, loss=loss)
    else:
        assert interference(tiny_llama, batches, gradients, loss=loss).measured == [[0, 0], [0, 0]]
    assert all(torch.equal(p, weights[name]) for name, p in tiny_llama.named_parameters())
    assert all(module.training for module in tiny_llama.modules())


def test_a_step_that_rounding_loses_is_warned_about(tiny_llama):
    model = tiny_llama.bfloat16()
    batches = {"a": [{"input_ids": torch.tensor([[1, 2, 3]])}]}
    gradients = {"a": GradientProbe(model).run(batches["a"])}
    with pytest.warns(UserWarning, match=r"rounding to torch.bfloat16 loses \d+% of the step on a"):
        interference(model, batches, gradients)


def test_the_default_step_on_a_real_model(shared_folder):
    pytest.importorskip("transformers")
    from sparse_cl.data.encoding import EncodedRecords
    from sparse_cl.four_domains.domains import load_domains
    from sparse_cl.four_domains.sequence import DomainBatches
    from sparse_cl.models.loading import load_model

    model, tokenizer = load_model(str(shared_folder / "models" / "base-5m"))
    (domain,) = load_domains(["math"], str(shared_folder / "data"), 0)
    encoded = EncodedRecords(domain.train[:8], tokenizer, 128)
    batches = {"math": list(DomainBatches(encoded, 4, torch.device("cpu")))}
    found = interference(model, batches, {"math": GradientProbe(model).run(batches["math"])})
    assert found.loss[0] == pytest.approx(mean_loss(model, batches["math"]))
    assert -0.08 < found.relative()[0][0] < -0.01


def test_errors_name_what_is_wrong():
    model, batches, gradients = setting()
    options = {"modules": {"layer": model}, "loss": quadratic}
    with pytest.raises(ValueError, match="expected the domains of the gradients, a, b, c, got a"):
        interference(model, {"a": batches["a"]}, gradients, **options)
    for step in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="step: expected a positive number"):
            interference(model, batches, gradients, step=step, **options)
    with pytest.raises(ValueError, match="those of b can be read only once"):
        interference(model, {**batches, "b": iter(batches["b"])}, gradients, **options)
    with pytest.raises(ValueError, match=r"other has \(3, 4\) weights in the model and none in a"):
        interference(model, batches, gradients, modules={"layer": model, "other": model}, loss=quadratic)
    flat = GradientProbe(model, {"layer": model}, loss=lambda m, batch: (0 * m.weight.sum(), 1)).run([None])
    with pytest.raises(ValueError, match="got zeros for c"):
        interference(model, batches, {**gradients, "c": flat}, **options)
