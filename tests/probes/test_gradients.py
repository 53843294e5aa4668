from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.models.parts import linear_layers
from sparse_cl.models.passes import IGNORED
from sparse_cl.probes.gradients import SKETCH, GradientProbe, spearman_brown


def batch_of(seed, rows=3, length=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 256, (rows, length), generator=generator)
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.4, ids, IGNORED)
    labels[0, 2] = ids[0, 2]
    mask = torch.ones_like(ids)
    mask[1:2, -2:], labels[1:2, -2:] = 0, IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCHES = [batch_of(0), batch_of(1, rows=1), batch_of(2, rows=5, length=14)]


def planted(directions, model=None):
    """A probe of one 20 x 30 layer whose gradient in batch i is directions[i] (of 1 token)."""
    model = model or torch.nn.Linear(30, 20, bias=False, dtype=directions[0].dtype)
    return GradientProbe(model, {"layer": model}, loss=lambda m, batch: ((m.weight * batch).sum(), 1), groups=4)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_backward(model, batches, layers):
    """Mean gradient over the answer tokens of all batches in one graph, by .backward()."""
    model.zero_grad()
    nats = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        chances = logits.log_softmax(-1)
        nats += [-chances[i, j, labels[i, j]] for i, j in (labels != IGNORED).nonzero().tolist()]
    torch.stack(nats).mean().backward()
    found = {name: layer.weight.grad.clone() for name, layer in layers.items()}
    model.zero_grad(set_to_none=True)
    return found


def test_the_mean_is_over_the_answer_tokens_of_all_batches(tiny_llama):
    model = tiny_llama.double()
    expected = by_backward(model, BATCHES, linear_layers(model))
    found = GradientProbe(model).run(BATCHES)
    assert set(found.layers) == set(expected) and len(expected) == 14
    for name, gradient in expected.items():
        # Llama's RMSNorm passes through float32, whatever the model's dtype.
        assert (found.layers[name] - gradient).norm() < 1e-5 * gradient.norm()
    assert found.tokens == sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in BATCHES)


def test_transposed_layers_come_out_as_outputs_by_inputs():
    torch.manual_seed(0)
    sizes = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 24,
        "vocab_size": 300,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double().eval()
    expected = by_backward(model, BATCHES, linear_layers(model))
    found = GradientProbe(model).run(BATCHES)
    assert found.layers["transformer.h.0.mlp.c_fc"].shape == (24, 16)
    for name, gradient in expected.items():
        torch.testing.assert_close(found.layers[name], gradient.T, rtol=1e-9, atol=1e-13)


def test_bfloat16_models_sum_in_float32(tiny_llama):
    probe = GradientProbe(tiny_llama.bfloat16())
    once, often = probe.run(BATCHES), probe.run(BATCHES * 40)
    for name, gradient in once.layers.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(often.layers[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny_llama, fails):
    model = tiny_llama.train()
    mine = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" not in name)
        p.grad = mine[name] if p.requires_grad else None
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    probe = GradientProbe(model)
    if fails:
        with pytest.raises(ValueError, match="input_ids"):
            probe.run([BATCHES[0], {"attention_mask": torch.ones(1, 2)}])
    else:
        assert probe.run(BATCHES).layers["model.layers.0.self_attn.q_proj"].abs().sum() > 0
    assert all(module.training for module in model.modules())
    for name, p in model.named_parameters():
        assert p.requires_grad == ("q_proj" not in name)
        assert p.grad is (mine[name] if p.requires_grad else None)
        assert torch.equal(p, weights[name])
    assert all((grad == 7).all() for grad in mine.values())


def test_split_half_is_the_cosine_of_even_and_odd_batches():
    draws = [normal(seed, 20, 30) + 0.7 * normal(99, 20, 30) for seed in range(6)]
    found = planted(draws).run(draws)
    even, odd = sum(draws[0::2]).flatten(), sum(draws[1::2]).flatten()
    expected = float(torch.nn.functional.cosine_similarity(even, odd, 0))
    assert found.split_half["layer"] == pytest.approx(expected, rel=1e-12)
    assert found.split_half[""] == pytest.approx(expected, rel=1e-12)
    assert found.reliability() == pytest.approx(2 * expected / (1 + expected))


def test_reliability_is_what_a_second_sample_shows():
    signal, ratios = normal(99, 20, 30), []
    for seed in range(40):
        noise = [signal + 3 * normal(1000 + 20 * seed + i, 20, 30) for i in range(16)]
        one, other = planted(noise).run(noise[:8]), planted(noise).run(noise[8:])
        pair = [found.layers["layer"].flatten() for found in (one, other)]
        ratios.append((one.reliability(), float(torch.nn.functional.cosine_similarity(*pair, 0))))
    predicted, seen = (sum(values) / 40 for values in zip(*ratios, strict=True))
    assert 0.4 < seen < 0.6
    assert predicted == pytest.approx(seen, abs=0.02)


@pytest.mark.parametrize("column", [False, True])
def test_sketches_keep_inner_products(column):
    # One column with nearly all of the energy is what a massive activation makes.
    errors = []
    for seed in range(60):
        a, b = normal(2 * seed, 40, 64), normal(2 * seed + 1, 40, 64)
        if column:
            a[:, 5] *= 100
            b[:, 5] *= 100
        layer = torch.nn.Linear(64, 40, bias=False, dtype=torch.float64)
        loss = lambda m, batch: ((m.weight * batch).sum(), 1)  # noqa: E731
        probe = GradientProbe(layer, {"layer": layer}, loss=loss, seed=seed)
        sketch_a, sketch_b = probe.run([a]).sketches["layer"], probe.run([b]).sketches["layer"]
        errors.append(float((sketch_a * sketch_b).sum() - (a * b).sum()) / float(a.norm() * b.norm()))
    errors = torch.tensor(errors)
    assert errors.std() < 1.5 * SKETCH**-0.5
    assert errors.mean().abs() < 4 * SKETCH**-0.5 / 60**0.5


@given(st.integers(1, 9), st.integers(2, 5))
def test_groups_are_dealt_in_turn_and_add_up_to_the_mean(batches, groups):
    draws = [normal(seed, 3, 4) for seed in range(batches)]
    layer = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
    loss = lambda m, batch: ((m.weight * batch).sum(), 1)  # noqa: E731
    probe = GradientProbe(layer, {"layer": layer}, loss=loss, groups=groups)
    found = probe.run(draws)
    assert found.sketches["layer"].shape[0] == min(groups, batches)
    torch.testing.assert_close(found.layers["layer"], sum(draws) / batches)
    for group, sketch in enumerate(found.sketches["layer"]):
        # Twelve entries fold onto places of their own: each is there, up to its sign.
        expected = sum(draws[group::groups]).flatten().abs()
        torch.testing.assert_close(sketch.abs()[:12], expected)


def test_a_zero_half_has_no_cosine_and_json_has_no_nan():
    draws = [normal(0, 20, 30), torch.zeros(20, 30, dtype=torch.float64)]
    record = planted(draws).run(draws).to_json()
    assert record["layers"]["layer"]["reliability"] is None
    json.dumps(record, allow_nan=False)
    single = planted(draws).run(draws[:1])
    assert single.split_half == {"layer": None, "": None}


def test_spearman_brown():
    assert spearman_brown(0.5) == pytest.approx(2 / 3)
    assert spearman_brown(1.0) == 1.0
    assert spearman_brown(-0.6) is None and spearman_brown(None) is None


def test_errors_name_what_is_wrong(tiny_llama):
    with pytest.raises(ValueError, match="groups: expected at least 2, got 1"):
        GradientProbe(tiny_llama, groups=1)
    with pytest.raises(ValueError, match="got none"):
        GradientProbe(tiny_llama, {})
    with pytest.raises(ValueError, match="Embedding|LlamaRMSNorm for norm"):
        GradientProbe(tiny_llama, {"norm": tiny_llama.model.norm})
    probe = GradientProbe(tiny_llama)
    with pytest.raises(ValueError, match="no batch; is the domain empty"):
        probe.run([])
    with pytest.raises(ValueError, match="1 without any"):
        probe.run([{**BATCHES[0], "labels": torch.full_like(BATCHES[0]["labels"], IGNORED)}])
    outside = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match="outside: the loss of batch 1 does not depend"):
        GradientProbe(tiny_llama, {"outside": outside}).run(BATCHES)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in .*, batch 1"):
        probe.run(BATCHES)
