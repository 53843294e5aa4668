"""Routing by token: what is trained, what stays, what is reported, and how a run goes on."""

from __future__ import annotations

import math

import pytest
import torch
from cases.methods import copy_of, domain, learn, logits, same, weights
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from sparse_cl.methods import Routed
from sparse_cl.nn import load_routed, routed_layers, unroute
from sparse_cl.probes.routing import Choices, choices, overlaps

DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
LR = 1e-2
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 4}, {"open": 0.5}, {"routing": "none", "open": 0.25}, {"routing": "random"}]
    + [{"layers": "all"}, {"layers": "all", "rank": 4}],
)
def test_only_columns_that_a_domain_s_tokens_choose_are_trained(tiny_llama, options):
    before, base = weights(tiny_llama), copy_of(tiny_llama)
    method, model = Routed(share=0.125, **options), tiny_llama
    for number in range(2):
        earlier = {name: layer.columns.detach().clone() for name, layer in routed_layers(model).items()}
        model = learn(method, model, domain(number), lr=LR)
        layers = routed_layers(model)
        assert [name for name in layers if name.endswith("down_proj")] == DOWN
        assert len(layers) == (6 if options.get("layers") else 2)
        assert all(torch.equal(value, weights(model)[name]) for name, value in before.items())
        assert all(p.requires_grad for p in model.parameters())
        for name, layer in layers.items():
            moved = (layer.columns != earlier.get(name, torch.zeros_like(layer.columns))).any(1)
            if options.get("rank"):
                moved = layer.mix.any()  # A's first values are drawn
            assert moved.any()
            if options.get("open") and not options.get("rank"):
                assert moved.sum() <= options["open"] * 24
            if layer.side == "outputs" and name.endswith("up_proj"):
                assert layer.leader is model.get_submodule(name.replace("up_proj", "gate_proj"))
    assert not torch.equal(logits(model, domain(0)), logits(base, domain(0)))
    unroute(model)
    assert torch.equal(logits(model, domain(0)), logits(base, domain(0)))
    assert same(weights(model), before)


def test_tokens_that_choose_other_neurons_are_not_touched(tiny_llama):
    method = Routed(share=0.05)  # one of 24
    model = learn(method, tiny_llama, domain(0), lr=LR)
    layer = model.get_submodule(DOWN[0])
    learned = layer.columns.any(1)
    assert 0 < learned.sum() < 24, "or the test shows nothing"
    h = torch.randn(64, 24)
    untouched = ~learned[layer.chosen(h)].any(1)
    assert untouched.any() and not untouched.all()
    moved = (layer(h) - torch.nn.functional.linear(h, layer.weight)).abs().amax(1) > 0
    assert torch.equal(moved, ~untouched)


def test_a_resumed_run_goes_on_with_the_same_bits_and_the_branch_is_a_file(tiny_llama, tmp_path):
    base, plain = copy_of(tiny_llama), copy_of(tiny_llama)
    method, model = Routed(open=0.5), tiny_llama
    folders = [tmp_path / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        model = learn(method, model, domain(number), lr=LR, folder=folder)
    load_routed(plain, folders[-1] / "routed.safetensors")
    assert torch.equal(logits(plain, domain(0)), logits(model, domain(0)))
    other = Routed(open=0.5)
    resumed = other.restore(base, folders)
    model, resumed = learn(method, model, domain(2), lr=LR), learn(other, resumed, domain(2), lr=LR)
    assert same(weights(model), weights(resumed))
    assert method.record() == other.record()


def test_overlap_is_that_of_a_count_over_all_pairs_of_tokens(tiny_llama):
    method = Routed(share=0.25)
    model = learn(method, tiny_llama, domain(0), lr=LR)
    learn(method, model, domain(1), lr=LR)
    layer, seen = model.get_submodule(DOWN[1]), {}
    for number in range(2):
        rows = []
        handle = layer.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0]))
        logits(model, domain(number))
        handle.remove()
        kept = [x[batch["attention_mask"].bool()] for x, batch in zip(rows, domain(number), strict=True)]
        seen[number] = [set(row) for row in layer.chosen(torch.cat(kept)).tolist()]
    k = 6
    between = [len(a & b) / k for a in seen[0] for b in seen[1]]
    within = [len(a & b) / k for i, a in enumerate(seen[1]) for j, b in enumerate(seen[1]) if i != j]
    found = method.record()["routing"][DOWN[1]]
    assert (found["k"], found["open"], found["chance"]) == (k, 24, 0.25)
    assert found["itself"] == pytest.approx(sum(within) / len(within))
    texts = {str(number): choices(model, domain(number))[DOWN[1]] for number in range(2)}
    table = overlaps(texts)
    assert table["0"]["1"] == table["1"]["0"] == pytest.approx(sum(between) / len(between))
    assert table["1"]["1"] == found["itself"]


def test_random_choices_overlap_as_chance_says():
    generator = torch.Generator().manual_seed(0)
    picks = torch.rand(2, 4000, 50, generator=generator).topk(5).indices
    texts = [Choices(pick.flatten().bincount(minlength=50).double(), 4000, 5, 50) for pick in picks]
    assert texts[0].overlap(texts[1]) == pytest.approx(texts[0].chance, rel=1e-2)
    assert texts[0].overlap() == pytest.approx(texts[0].chance, rel=1e-2)


def test_one_token_has_no_other_to_share_with():
    assert math.isnan(Choices(torch.tensor([1.0, 0.0]), 1, 1, 2).overlap())


def test_layers_that_cannot_be_routed_are_refused_before_anything_is(tiny_llama):
    stacked = Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0))
    with pytest.raises(ValueError, match="gate and up of model.layers.0.mlp are one layer; take 'out'"):
        Routed(layers="all").check(stacked)
    Routed().check(stacked)
    with pytest.raises(ValueError, match="routed: the model has an adapter of PEFT, beside which nothing is routed"):
        Routed().check(get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))


def test_bad_options(tiny_llama):
    for options, message in (
        ({"share": 0.0}, "share: expected"),
        ({"open": 2.0}, "open: expected"),
        ({"rank": -1}, "rank: expected"),
        ({"layers": "in"}, "layers: expected 'out' or 'all', got 'in'"),
        ({"routing": "best"}, "routing: expected 'top', 'random', 'none', got 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            Routed(**options)
    with pytest.raises(ValueError, match="no layer is routed"):
        choices(tiny_llama, domain(0))
