"""The activation probe against one that stores every activation, and against planted ones."""

import pytest
import torch
import transformers
from cases.activation import Given, planted, record, scored
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.scores import ActivationScores

GROUPS = 3


def make_batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 50, (4, 9), generator=generator)
        lengths = torch.randint(4, 10, (4, 1), generator=generator)
        mask = (torch.arange(9) < lengths).long()
        labels = torch.where((torch.arange(9) >= 3) & mask.bool(), ids, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def kept(batch, tokens):
    mask = batch["attention_mask"].bool()
    if tokens == "all":
        return mask
    mask = mask & (torch.arange(mask.shape[1]) > 0)
    return mask & (batch["labels"] != -100) if tokens == "answers" else mask


@pytest.fixture(scope="module", params=["Llama", "Phi3", "GPT2", "OPT"])
def model(request):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    glu = {**sizes, "intermediate_size": 20, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}
    settings = {
        "Llama": glu,
        "Phi3": glu,
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 20, "vocab_size": 50},
        "OPT": {**sizes, "ffn_dim": 20, "word_embed_proj_dim": 16, "pad_token_id": 0},
    }[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval().double()


def stored(model, batches, tokens):
    """Part → every activation of the second block's neurons: (tokens, neurons), by its formula."""
    mlp = [m for m in model.modules() if {"down_proj", "fc2", "c_proj"} & {n for n, _ in m.named_children()}]
    mlp = [m for m in mlp if not any(n in dict(m.named_children()) for n in ("q_proj", "c_attn"))][-1]
    first = getattr(mlp, "fc1", mlp)  # OPT's MLP is part of its layer

    def inputs(_, add):
        return [first.register_forward_hook(lambda m, args, out: add(args[0].view(4, 9, -1)))]

    x = torch.cat(record(model, inputs, batches, lambda batch: kept(batch, tokens)))
    with torch.no_grad():
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).chunk(2, -1)
            found = {"gate": nn.functional.silu(gate), "up": up}
        elif hasattr(mlp, "gate_proj"):
            found = {"gate": nn.functional.silu(mlp.gate_proj(x)), "up": mlp.up_proj(x)}
        elif hasattr(mlp, "fc1"):
            return {"product": mlp.fc1(x).relu()}
        else:
            return {"product": nn.functional.gelu(mlp.c_fc(x), approximate="tanh")}
    return {**found, "product": found["gate"] * found["up"]}


@pytest.mark.parametrize("tokens", ["answers", "text", "all"])
def test_all_sums_are_those_of_stored_activations(model, tokens):
    batches = make_batches()
    scores = ActivationProbe(model, tokens=tokens, groups=GROUPS, top_share=0.2).run(batches)
    sequences = torch.cat([i * 4 + kept(b, tokens).nonzero()[:, 0] for i, b in enumerate(batches)])
    expected = stored(model, batches, tokens)
    layer = list(scores.parts)[-1]
    assert scores.parts[layer].keys() == expected.keys()
    assert scores.tokens == len(sequences)
    for part, values in expected.items():
        found, a = scores.parts[layer][part], values.abs()
        for group in range(GROUPS):
            torch.testing.assert_close(found.magnitude[group], a[sequences % GROUPS == group].sum(0))
        torch.testing.assert_close(scores.mean(part)[layer], a.mean(0))
        descending = a.sort(1, descending=True).values
        top = (a >= descending[:, 3:4]) & (a > 0)
        torch.testing.assert_close(scores.frequency(part)[layer], top.double().mean(0))
        held = descending.cumsum(1) / descending.sum(1, keepdim=True)
        shares = (0.05, 0.1, 0.5, 0.75, 1.0)
        for share, value in zip(shares, scores.curve(part, shares)[layer], strict=True):
            torch.testing.assert_close(value, held[:, round(share * 20) - 1].mean())
        for level in (0.9, 0.99):
            # The fewest neurons that hold the level; at 1 - 1e-12 of it, so that rounding does not decide.
            fewest = (held < level * (1 - 1e-12)).sum(1) + 1
            assert scores.needed(level, part)[layer] == pytest.approx(float((fewest / 20).double().mean()))


def test_the_top_is_what_brute_force_frees(model):
    batches = make_batches()
    scores = ActivationProbe(model, tokens="all").run(batches)
    masks = scores.top(0.25)
    mean = stored(model, batches, "all")["product"].abs().mean(0)
    neurons = mean.argsort(descending=True)[:5].sort().values.tolist()
    layer = list(scores.parts)[-1]
    parameters = dict(model.named_parameters())
    found = 0
    for place in scores.where[layer]:
        indices = masks[place.parameter].index.tolist()
        assert masks[place.parameter].shape == parameters[place.parameter].shape
        assert indices == neurons + [n + 20 for n in neurons] * (place.copies - 1)
        found += 1
    assert found >= 2


def test_memory_and_results_do_not_depend_on_how_sequences_are_batched():
    values = torch.randn(12, 5, 2, 30)
    one, other = (scored(values, size, ranked_tokens=1000) for size in (12, 3))
    for name, tensor in one.tensors().items():
        assert tensor.shape == other.tensors()[name].shape
        torch.testing.assert_close(tensor, other.tensors()[name], rtol=1e-5, atol=1e-6)
    assert {t.numel() for t in scored(values[:3]).tensors().values()} == {t.numel() for t in one.tensors().values()}


@given(st.data())
def test_any_shape(data):
    sequences, length, width = (data.draw(st.integers(1, top)) for top in (6, 5, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    values = torch.randn(sequences, length, 1, width, generator=generator, dtype=torch.float64)
    # Neurons that are off, tokens that are off, and equal magnitudes.
    values = values.round(decimals=data.draw(st.sampled_from([0, 12]))) * (torch.rand(width, generator=generator) < 0.8)
    groups, ranked = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    batch = data.draw(st.integers(1, 6))
    scores = scored(values, batch, groups=groups, ranked_tokens=ranked, top_share=data.draw(st.floats(0.01, 1.0)))
    part = scores.parts["layer0"]["product"]
    rows = values.reshape(-1, width)
    numbers = torch.arange(sequences).repeat_interleave(length) % groups
    for group in range(groups):
        torch.testing.assert_close(part.magnitude[group], rows[numbers == group].abs().sum(0), rtol=1e-12, atol=1e-12)
    assert part.tokens.tolist() == [int((numbers == group).sum()) for group in range(groups)]
    ranks = torch.cat([b.reshape(-1, width)[:: -(-len(b) * length // ranked)] for b in values.split(batch)])
    assert part.ranked.sum() == len(ranks)
    assert all(-(-len(b) * length // -(-len(b) * length // ranked)) <= ranked for b in values.split(batch))
    assert part.profile.sum() == pytest.approx(int((ranks != 0).any(1).sum()), abs=1e-9)
    assert (part.top <= (ranks != 0).sum(0)).all()
    curve = scores.curve()["layer0"]
    assert (curve.diff() >= -1e-12).all()
    assert 0 <= scores.needed(0.9)["layer0"] <= scores.needed(0.99)["layer0"] <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_as_exact_as_the_activations(dtype):
    values = torch.randn(6, 700, 1, 24).to(dtype)  # more rows than a block has
    found = scored(values).parts["layer0"]["product"].magnitude.sum(0)
    torch.testing.assert_close(found, values.double().abs().sum((0, 1, 2)), rtol=2e-6, atol=0)


def test_a_planted_set_is_the_top_and_no_token_needs_more():
    active = [2, 3, 17]
    values = torch.zeros(16, 4, 1, 60)
    values[..., active] = torch.rand(16, 4, 1, 3) + 1
    scores = scored(values, top_share=0.1)
    assert scores.mean()["layer0"].topk(3).indices.sort().values.tolist() == active
    frequency = scores.frequency()["layer0"]
    assert frequency.nonzero().flatten().tolist() == active
    assert (frequency[active] == 1).all()
    assert scores.needed(0.99)["layer0"] == 3 / 60
    assert scores.curve(shares=(0.05, 1.0))["layer0"].tolist() == pytest.approx([1.0, 1.0])


def test_massive_activations_are_left_out_where_they_are_and_nowhere_else():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(8, 64, 1, 50, generator=generator).double()
    values = plain.clone()
    values[1, 3, 0, 7], values[5, 60, 0, 7], values[6, 2, 0, 9] = 5000.0, -3000.0, 2000.0
    values[2, 2, 0, 11] = 99.0  # neither above 100 nor above a thousand medians
    values[2, 2, 0, 12] = 300.0  # above 100, but not above a thousand medians
    scores = scored(values)
    part = scores.parts["layer0"]["product"]
    assert part.massive_entries == 3
    torch.testing.assert_close(part.massive.nonzero(), torch.tensor([[1, 7], [5, 7], [6, 9]]))
    without = values.clone()
    without[1, 3, 0, 7] = without[5, 60, 0, 7] = without[6, 2, 0, 9] = 0
    torch.testing.assert_close(scores.mean(massive=False)["layer0"], without.abs().mean((0, 1, 2)))
    torch.testing.assert_close(scores.mean()["layer0"], values.abs().mean((0, 1, 2)))
    assert scored(plain).parts["layer0"]["product"].massive_entries == 0


def test_massive_activations_are_found_without_waiting_for_the_device(monkeypatch):
    values = torch.randn(8, 64, 2, 50, generator=torch.Generator().manual_seed(0)).double()
    values[1, 3, 0, 7], values[5, 60, 0, 7], values[6, 2, 0, 9] = 5000.0, -3000.0, 2000.0
    expected = scored(values)
    monkeypatch.setattr("sparse_cl.probes.activation._waits", lambda device: True)
    found = scored(values)
    assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in expected.tensors().items())
    values[0, 0, 1, :40] = 1e4
    with pytest.warns(UserWarning, match=r"layer1 \(product\): more than 32 neurons had massive activations"):
        assert scored(values).parts["layer1"]["product"].massive_entries == 32


def test_a_loaded_result_gives_what_the_saved_one_gave(tmp_path, tiny_llama):
    scores = ActivationProbe(tiny_llama).run(make_batches())
    scores.save(tmp_path / "scores.safetensors")
    loaded = ActivationScores.load(tmp_path / "scores.safetensors")
    assert loaded.top(0.2) == scores.top(0.2)
    assert len(loaded.top(0.2)) == 6
    assert loaded.to_json() == scores.to_json()
    tensors = loaded.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in scores.tensors().items())


def test_a_file_of_something_else_is_refused(tmp_path):
    from sparse_cl import storage

    storage.write(tmp_path / "other", "masks", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no activation of sparse_cl.*ActivationScores.save"):
        ActivationScores.load(tmp_path / "other")
    facts = {"parts": [["mlp", ["product"]]], "where": {}, "top_share": 0.1}
    storage.write(tmp_path / "broken", "activation", {"x": torch.zeros(1)}, **facts)
    with pytest.raises(ValueError, match="not a readable activation file"):
        ActivationScores.load(tmp_path / "broken")


def test_intervals_hold_the_mean_of_the_population():
    """Sequences that differ: half of the neurons at work in some, all in others."""
    inside = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        values = torch.ones(48, 2, 1, 40)
        values[torch.rand(48, generator=generator) < 0.5, :, :, 20:] = 0
        interval = scored(values, 48).to_json()["mean"]["product"]["needed"]["0.9"]["interval"]
        inside += interval[0] <= (1.0 * 36 / 40 + 18 / 40) / 2 <= interval[1]
    assert inside >= 48


def test_the_record_is_plain_json_without_nan():
    import json

    values = torch.zeros(3, 2, 2, 6)
    record = scored(values, groups=1).to_json()
    json.dumps(record, allow_nan=False)
    assert record["mean"]["product"]["needed"]["0.99"] == {"mean": 0.0, "interval": None}
    assert record["layers"][1]["neurons"] == 6


def test_outputs_of_linear_layers_get_masks_and_others_say_why_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
    inputs = torch.randn(6, 5)
    masks = ActivationProbe(model, {"first": model[0]}).run([inputs]).top(0.25)
    top = model[0](inputs).abs().mean(0).topk(2).indices.sort().values.tolist()
    assert {name: mask.index.tolist() for name, mask in masks.items()} == {"0.weight": top, "0.bias": top}
    with pytest.raises(ValueError, match="relu is a ReLU, and which weights lead to its output is not known"):
        ActivationProbe(model, {"relu": model[1]}).run([inputs]).top(0.25)


def test_a_model_is_as_before_and_nan_names_layer_and_batch(tiny_llama):
    tiny_llama.train()
    before = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    probe = ActivationProbe(tiny_llama)
    first = probe.run(make_batches())
    assert all(torch.equal(first.mean()[k], probe.run(make_batches()).mean()[k]) for k in first.parts)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in model\.layers\.1\.mlp.*batch 1"):
        probe.run(make_batches())
    assert tiny_llama.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.modules())
    assert torch.equal(before["model.embed_tokens.weight"], tiny_llama.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": {}}, "modules: expected at least one"),
        ({"groups": 0}, "groups: expected at least 1, got 0"),
        ({"top_share": 0.0}, r"top_share: expected a share in \(0, 1\], got 0.0"),
        ({"top_share": 1.5}, "got 1.5"),
        ({"ranked_tokens": 0}, "ranked_tokens: expected at least 1"),
    ],
)
def test_arguments_out_of_range(tiny_llama, settings, message):
    with pytest.raises(ValueError, match=message):
        ActivationProbe(tiny_llama, **settings)


def test_what_cannot_be_answered_says_why():
    generator = torch.Generator().manual_seed(0)
    scores = scored(planted(generator, [1], 10))
    with pytest.raises(ValueError, match=r"part: expected one of product, got 'gate'"):
        scores.mean("gate")
    with pytest.raises(ValueError, match=r"level: expected one of 0.9, 0.99, got 0.5"):
        scores.needed(0.5)
    model = Given()
    with pytest.raises(ValueError, match="nothing was seen yet"):
        ActivationProbe(model, model.watched).result()
    with pytest.raises(ValueError, match="has no MLP that is known here"):
        ActivationProbe(nn.Linear(3, 3))
