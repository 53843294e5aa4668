"""Waking against its definition in float64: who is woken, what is drawn, by how much the function changes."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import copy_of, domain, inputs_of, learn, logits, same, weights

from sparse_cl.methods import SelectiveWrite
from sparse_cl.methods.waking import Waking
from sparse_cl.models.neuron_masks import places
from sparse_cl.models.parts import find_mlps
from sparse_cl.probes import ActivationProbe, dormant

pytestmark = pytest.mark.filterwarnings("ignore:.*use all but:UserWarning")


def gpt2(tokenizer):
    """Biases, transposed weights, and neurons whose mean is not zero."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def phi3(tokenizer):
    """Gate and up in one layer."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "gpt2", "phi3"])
def model(request, tiny_llama, tokenizer):
    return {"llama": lambda _: tiny_llama, "gpt2": gpt2, "phi3": phi3}[request.param](tokenizer).double()


def output(mlp, h):
    """The MLP's output of its neurons' activations (tokens, neurons)."""
    return mlp.out(h)


def test_least_used_of_all_texts_are_woken_and_nothing_else_changes_by_a_bit(model):
    texts = [domain(0), domain(3)]
    waking = Waking(0.25)
    for text in texts:
        waking.observe(model, text)
    scores = dormant({str(n): ActivationProbe(model, tokens="all").run(text) for n, text in enumerate(texts)}).scores
    before = weights(model)
    chosen = waking.choose(model)
    waking.renew(model, chosen)
    after, inside = weights(model), set()
    for mlp in find_mlps(model):
        peak = torch.stack([scores[n][mlp.name] for n in scores]).amax(0)
        torch.testing.assert_close(chosen[mlp.name], peak.topk(6, largest=False).indices.sort().values)
        assert bool((waking._known[f"{mlp.name}|peak"][chosen[mlp.name]] == 0).all()), "what was woken is new"
        *into, out = places(mlp)
        for place in (*into, out):
            inside.add(place.parameter)
            changed = place.energies(after[place.parameter] - before[place.parameter]) > 0
            kept = torch.ones(mlp.neurons, dtype=torch.bool).index_fill(0, chosen[mlp.name], False)
            assert not bool((changed & kept).any())
            drawn = place.energies(after[place.parameter])[chosen[mlp.name]]
            if place is out or len(place.shape) == 1:
                assert bool((drawn == 0).all())
            else:
                size = before[place.parameter].square().mean() * place.copies * place.shape[1 - place.dim]
                assert 0.5 * float(size) < float(drawn.mean()) < 2 * float(size)
        bias = {n for n in before if n == f"{mlp.out_name}.bias"}
        inside |= bias
        assert all(not torch.equal(after[n], before[n]) for n in bias), "a bias takes up the mean"
    assert same({n: p for n, p in after.items() if n not in inside}, {n: before[n] for n in before if n not in inside})


def test_change_of_the_function_is_what_is_said(model):
    """`at_most` bounds, and for one neuron is, the share of energy by which an MLP's output changes, in float64."""
    text = domain(0)
    for share in (1 / 24, 0.5):
        own = copy_of(model).double()
        waking = Waking(share)
        waking.observe(own, text)
        seen = {mlp.name: inputs_of(own, mlp.out_name, text) for mlp in find_mlps(own)}
        old = {mlp.name: output(mlp, seen[mlp.name]).detach() for mlp in find_mlps(own)}
        waking.renew(own, waking.choose(own))
        for mlp in find_mlps(own):
            change = float((output(mlp, seen[mlp.name]) - old[mlp.name]).detach().square().sum())
            change /= float(old[mlp.name].square().sum())
            said = waking.layers[mlp.name]
            assert change <= said["at_most"] * (1 + 1e-9)
            assert said["moved"] <= said["at_most"] * (1 + 1e-9)
            if said["woken"] == 1:
                assert change == pytest.approx(said["at_most"], rel=1e-6)
                assert change == pytest.approx(said["moved"], rel=1e-6)
            assert 0 < change < 1


def test_bound_is_over_all_texts_alike(model):
    texts = [domain(0), domain(1), domain(2)]
    waking = Waking(0.25)
    for text in texts:
        waking.observe(model, text)
    seen = [{mlp.name: inputs_of(model, mlp.out_name, text) for mlp in find_mlps(model)} for text in texts]
    old = [{mlp.name: output(mlp, h[mlp.name]).detach() for mlp in find_mlps(model)} for h in seen]
    waking.renew(model, waking.choose(model))
    for mlp in find_mlps(model):
        changes = [
            (output(mlp, h[mlp.name]) - y[mlp.name]).square().sum(1).mean() for h, y in zip(seen, old, strict=True)
        ]
        energies = [y[mlp.name].square().sum(1).mean() for y in old]
        assert float((sum(changes) / sum(energies)).detach()) <= waking.layers[mlp.name]["at_most"]


def test_a_silent_neuron_is_woken_and_the_function_stays_bit_identical(tiny_llama):
    with torch.no_grad():
        for layer in tiny_llama.model.layers:
            layer.mlp.gate_proj.weight[5] = 0
    before = logits(tiny_llama, domain(0))
    waking = Waking(0.5, tau=0.0)
    assert waking.choose(tiny_llama) == {}, "nothing was observed"
    waking.observe(tiny_llama, domain(3))
    chosen = waking.choose(tiny_llama)
    assert [x.tolist() for x in chosen.values()] == [[5], [5]], "only what is dormant by tau"
    waking.renew(tiny_llama, chosen)
    assert [said["at_most"] for said in waking.layers.values()] == [0.0, 0.0]
    assert torch.equal(logits(tiny_llama, domain(0)), before)
    assert bool(tiny_llama.model.layers[0].mlp.gate_proj.weight[5].any())


def test_what_is_frozen_is_not_woken(tokenizer):
    model = gpt2(tokenizer)
    model.transformer.h[0].mlp.c_fc.bias.requires_grad_(False)
    model.transformer.h[1].mlp.c_proj.bias.requires_grad_(False)
    waking, before = Waking(0.25), weights(model)
    waking.observe(model, domain(0))
    waking.renew(model, waking.choose(model))
    changed = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert changed == {f"transformer.h.1.mlp.{n}" for n in ("c_fc.weight", "c_fc.bias", "c_proj.weight")}
    assert [said["woken"] for said in waking.layers.values()] == [0, 6]


@pytest.mark.parametrize("rest", [0.0, 0.1])
def test_selective_write_wakes_open_neurons_and_hubs_stay_bit_for_bit(tokenizer, rest):
    model = gpt2(tokenizer)
    method = SelectiveWrite(closed=0.25, rest=rest, wake=0.25, boost=2.0)
    model = learn(method, model, domain(0))
    assert method.record()["layers"]["transformer.h.0.mlp"].get("woken") is None, "nothing is known before"
    hubs = {mlp.name: method.usage[mlp.name].topk(6).indices for mlp in find_mlps(model)}
    chosen = method._waking.choose(model)
    before = weights(model)
    learn(method, model, domain(1))
    after, inside = weights(model), set()
    for mlp in find_mlps(model):
        assert not set(hubs[mlp.name].tolist()) & set(chosen[mlp.name].tolist())
        said = method.record()["layers"][mlp.name]
        assert said["woken"] == 6 and 0 < said["moved"] <= said["at_most"]
        assert said["leak"] == 0.0 and 0 < said["surviving"] <= 1
        for place in places(mlp):
            inside.add(place.parameter)
            assert bool((place.energies(after[place.parameter] - before[place.parameter])[hubs[mlp.name]] == 0).all())
        gain = method.masks[f"{mlp.out_name}.weight"].gain
        assert sorted(gain.tolist())[-6:] == [2.0] * 6
        assert float(gain.sort().values[:-6].max()) < 1
    if not rest:
        assert same(
            {n: p for n, p in after.items() if n not in inside}, {n: p for n, p in before.items() if n not in inside}
        )


def test_boost_alone_leaves_the_weights_and_scales_the_gains(tiny_llama):
    gains = {}
    for boost in (1.0, 3.0):
        method = SelectiveWrite(closed=0.25, wake=0.25, boost=boost, renew=False)
        model = learn(method, copy_of(tiny_llama), domain(0))
        before = weights(model)
        chosen = method._waking.choose(model)
        method.before_domain(model, domain(1))
        assert same(before, weights(model))
        gains[boost] = method.masks["model.layers.0.mlp.up_proj.weight"].to_dense
        dense = torch.zeros(24)
        mask = method.masks["model.layers.0.mlp.up_proj.weight"]
        dense[mask.index.long()] = mask.gain
        gains[boost] = dense
    ratio = torch.ones(24).index_fill(0, chosen["model.layers.0.mlp"], 3.0)
    torch.testing.assert_close(gains[3.0], gains[1.0] * ratio)


def test_a_woken_neuron_learns_and_is_not_woken_again_once_it_is_used(tiny_llama):
    method = SelectiveWrite(closed=0.0, wake=0.25)
    model = learn(method, tiny_llama, domain(0))
    first = method._waking.choose(model)
    model = learn(method, model, domain(1))
    for layer, chosen in first.items():
        mlp = next(mlp for mlp in find_mlps(model) if mlp.name == layer)
        assert bool((mlp.out.weight[:, chosen].norm(dim=0) > 0).all())
        usage = ActivationProbe(model, tokens="all").run(domain(1)).mean()[layer]
        torch.testing.assert_close(method._waking._known[f"{layer}|peak"][chosen], (usage / usage.mean())[chosen])
        torch.testing.assert_close(method.usage[layer][chosen], (usage / usage.mean())[chosen] / 2)


def test_a_run_that_goes_on_wakes_the_same(tiny_llama, tmp_path):
    method = SelectiveWrite(wake=0.25)
    model = learn(method, tiny_llama, domain(0), folder=tmp_path)
    resumed = SelectiveWrite(wake=0.25)
    other = resumed.restore(copy_of(tiny_llama), [tmp_path])
    learn(method, model, domain(1), steps=2)
    learn(resumed, other, domain(1), steps=2)
    assert same(weights(model), weights(other))
    assert method.record() == resumed.record()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wake": -0.1}, r"wake: expected a share of the neurons in \[0, 1\), got -0.1"),
        ({"wake": 0.8}, "wake: 0.8 of the neurons and closed 0.3 are more than all; give smaller shares"),
        ({"tau": -1.0}, "tau: expected a score of at least 0, or None, got -1.0"),
        ({"boost": 0.0}, "boost: expected a number above 0, got 0.0"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectiveWrite(**arguments)
