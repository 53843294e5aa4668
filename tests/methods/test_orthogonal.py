"""The orthogonal methods: what they protect, what they report, and what they leave as it was."""

from __future__ import annotations

import cases.methods as method_cases
import peft
import pytest
import torch
import transformers
from cases.families import FAMILIES, make
from cases.methods import copy_of, domain, gradients_of, inputs_of, same, weights

from sparse_cl.methods import Orthogonal, OrthogonalLoRA
from sparse_cl.probes.capacity import scarcity

METHODS = (Orthogonal, OrthogonalLoRA)
HEAD = "model.embed_tokens.weight"  # tied: known to the memory, and frozen with the rest
LR = {Orthogonal: 1e-3, OrthogonalLoRA: 1e-2}


def learn(method, model, batches, steps=10, **own):
    return method_cases.learn(method, model, batches, LR[type(method)], steps, **own)


def merged(model):
    """A copy of the state of the base with its adapter merged."""
    if not isinstance(model, peft.PeftModel):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    layers = [module for module in model.modules() if hasattr(module, "merge")]
    for layer in layers:
        layer.merge()
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    for layer in layers:
        layer.unmerge()
    return state


def share_inside(matrix, basis):
    """||M U||^2 / ||M||^2 in float64; 0 of zeros."""
    matrix, basis = matrix.double(), basis.double()
    return float((matrix @ basis).square().sum() / matrix.square().sum().clamp(min=1e-300))


def leading_directions(rows, energy):
    """The right singular vectors of (m, n) rows that explain a share of their energy, by exact SVD."""
    _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    explained = s.square().cumsum(0) / s.square().sum()
    return vh[: int((explained < energy).sum()) + 1].T


def assert_same_span(found, expected):
    assert found.shape == expected.shape
    assert torch.linalg.svdvals(found.double().T @ expected).min() > 1 - 1e-5


@pytest.mark.parametrize("kind", METHODS)
def test_a_new_domain_moves_no_weight_inside_the_old_ones_basis(tiny_llama, kind):
    method = kind(energy=0.8)
    model = learn(method, tiny_llama, domain(0))
    bases = {name: method.memory.basis(name) for name in method.memory.names}
    before = merged(model)
    model = learn(method, model, domain(1))
    after = merged(model)
    assert bases.pop(HEAD).shape[1] > 0
    assert len(bases) == 14
    for name, basis in bases.items():
        change = after[name] - before[name]
        assert basis.shape[1] > 0
        assert change.norm() > 1e-3
        assert share_inside(change, basis) <= 1e-6
    rest = set(before) - set(bases)
    assert any("norm" in name for name in rest)
    assert any("embed" in name for name in rest)
    assert all(torch.equal(before[name], after[name]) for name in rest), "frozen after the first domain"


def test_the_first_domain_trains_everything(tiny_llama):
    before = merged(tiny_llama)
    after = merged(learn(Orthogonal(), tiny_llama, domain(0)))
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", METHODS)
def test_a_protected_text_s_directions_are_taken_before_the_first_domain(tiny_llama, kind):
    method, text = kind(energy=0.8), domain(2)
    method.protect(tiny_llama, text)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        rows = inputs_of(tiny_llama, name.removesuffix(".weight"), text)
        assert_same_span(method.memory.basis(name), leading_directions(rows, 0.8))
    bases, before = {name: method.memory.basis(name) for name in method.memory.names}, merged(tiny_llama)
    model = learn(method, tiny_llama, domain(0))
    after = merged(model)
    assert bases.keys() == method.record()["layers"].keys()
    for name, layer in method.record()["layers"].items():
        change = after[name] - before[name]
        assert (change.norm() > 1e-3) == (name != HEAD)
        assert share_inside(change, bases[name]) <= 1e-6
        assert layer["leak"] <= 1e-6
        assert layer["surviving"] < 1
        assert layer["used"] >= bases[name].shape[1]
    rest = set(before) - set(bases) | {HEAD}
    assert all(torch.equal(before[name], after[name]) for name in rest)


@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_run_that_protects_a_text_goes_on_with_the_same_bits(tiny_llama, tmp_path, kind):
    base, method, model = copy_of(tiny_llama), kind(energy=0.6), tiny_llama
    method.protect(model, domain(2))
    folders = [tmp_path / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        model = learn(method, model, domain(number), steps=4, folder=folder)
    model = learn(method, model, domain(3), steps=4)
    other = kind(energy=0.6)
    resumed = learn(other, other.restore(base, folders), domain(3), steps=4)
    assert same(weights(model), weights(resumed))
    assert method.record() == other.record()


@pytest.mark.parametrize("kind", METHODS)
def test_the_basis_is_that_of_the_inputs_of_all_tokens_that_are_not_padding(tiny_llama, kind):
    method, batches = kind(energy=0.8), domain(0)
    model = learn(method, tiny_llama, batches)
    name = "model.layers.1.mlp.down_proj.weight"
    rows = inputs_of(model, name.removesuffix(".weight"), batches)
    assert_same_span(method.memory.basis(name), leading_directions(rows, 0.8))


@pytest.mark.parametrize("kind", METHODS)
def test_the_basis_is_that_of_the_gradients_of_each_batch(tiny_llama, kind):
    method, batches = kind(energy=0.8, source="gradients"), domain(0)
    model = learn(method, tiny_llama, batches)
    name = "model.layers.1.mlp.down_proj.weight"
    # The gradient of the merged weight, which an adapter's base layer would have.
    plain = transformers.LlamaForCausalLM(tiny_llama.config).eval()
    plain.load_state_dict({**plain.state_dict(), **merged(model)})
    rows = []
    for batch in batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        rows.append(plain.get_parameter(name).grad)
    assert_same_span(method.memory.basis(name), leading_directions(torch.cat(rows), 0.8))


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_reported_is_what_happened(tiny_llama, kind):
    method = kind(energy=0.8)
    model = learn(method, tiny_llama, domain(0))
    first = method.record()["layers"]
    bases = {name: method.memory.basis(name) for name in method.memory.names}
    before = merged(model)

    plain = transformers.LlamaForCausalLM(tiny_llama.config).eval()
    plain.load_state_dict({**plain.state_dict(), **before})
    batches = domain(1, count=6)
    gradients = gradients_of(plain, batches[:4])

    model = learn(method, model, batches)
    after = merged(model)
    second = method.record()["layers"]
    assert set(first) == set(second) == set(bases)
    for name, basis in bases.items():
        width = before[name].shape[1]
        assert first[name] == {
            "surviving": 1.0,
            "leak": None,
            "width": width,
            "used": basis.shape[1],
            "free": width - basis.shape[1],
        }
        assert second[name]["surviving"] == pytest.approx(
            1 - share_inside(gradients[name].flatten(0, 1), basis), abs=1e-4
        )
        expected = share_inside(after[name].double() - before[name].double(), basis)
        assert second[name]["leak"] == pytest.approx(expected, rel=0.02, abs=1e-13)
        assert second[name]["used"] == method.memory.rank(name) >= basis.shape[1]
    assert not any(p.grad is not None for p in model.parameters()), "no gradient is left behind"


@pytest.mark.parametrize("source", ["inputs", "gradients"])
@pytest.mark.parametrize("kind", METHODS)
def test_measuring_changes_no_mode_and_no_flag(tiny_llama, kind, source):
    method = kind(energy=0.8, source=source)
    model = method.before_domain(learn(method, tiny_llama, domain(0), steps=2), domain(1))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    method.after_domain(model, domain(1))
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_a_fresh_adapter_changes_nothing_and_the_old_one_is_merged(tiny_llama):
    method, ids = OrthogonalLoRA(energy=0.8), domain(2)[0]["input_ids"]
    model = learn(method, tiny_llama, domain(0))
    expected = merged(model)
    logits = model.eval()(input_ids=ids).logits
    second = method.before_domain(model, domain(1))
    torch.testing.assert_close(second.eval()(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)
    state = merged(second)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert sum(name.endswith("lora_A.default.weight") for name, _ in second.named_parameters()) == 14


@pytest.mark.parametrize("kind", METHODS)
def test_a_layer_in_which_little_survives_is_named(tiny_llama, kind):
    method = kind(energy=1.0)
    model = learn(method, tiny_llama, domain(0))
    assert method.memory.capacity()["model.layers.0.self_attn.q_proj.weight"]["free"] == 0
    before = merged(model)
    with pytest.warns(UserWarning, match=r"less than 10% .* in \d+ of 15 layers; the least, 0.00%, in model\.") as told:
        model = learn(method, model, domain(1), steps=2)
    assert len([w for w in told if w.category is UserWarning]) == 1, "one warning a domain, not one a layer"
    after = merged(model)
    full = [name for name, layer in method.record()["layers"].items() if layer["surviving"] < 1e-6]
    assert full
    assert all(torch.equal(before[name], after[name]) for name in full)


def test_scarcity_counts_and_names_the_least():
    layers = {name: {"surviving": share} for name, share in (("a", 0.05), ("b", 0.5), ("c", 0.02), ("d", 0.1))}
    assert scarcity(layers) == (
        "less than 10% of the new domain's gradient survives in 2 of 4 layers; the least, 2.00%, in c"
    )
    assert scarcity({"b": layers["b"], "d": layers["d"]}) is None


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": 0.0}, r"energy: expected a share in \(0, 1\], got 0.0"),
        ({"energy": float("nan")}, "energy: expected a share"),
        ({"source": "weights"}, "source: expected 'inputs' or 'gradients', got 'weights'"),
        ({"max_rank": 0}, "max_rank: expected a number of at least 1, got 0"),
    ],
)
def test_settings_out_of_range(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("kind", METHODS)
def test_conv1d_is_protected_as_linear_layers_are(kind):
    model, method = make("GPT2", FAMILIES["GPT2"] | {"vocab_size": 300}), kind(energy=0.8)
    method.check(model)
    model = learn(method, model, domain(0))
    bases = {name: method.memory.basis(name) for name in method.memory.names}
    before = merged(model)
    after = merged(learn(method, model, domain(1)))
    blocks = [name for name in bases if ".h." in name]
    assert len(blocks) == 8
    for name in blocks:
        change = (after[name] - before[name]).mT
        assert change.norm() > 1e-3 and bases[name].shape[1] > 0
        assert share_inside(change, bases[name]) <= 1e-6
        assert method.record()["layers"][name]["leak"] == pytest.approx(share_inside(change, bases[name]), abs=1e-9)


@pytest.mark.parametrize("kind", METHODS)
def test_a_rank_that_no_layer_has_is_refused(tiny_llama, kind):
    kind().check(tiny_llama)
    with pytest.raises(ValueError, match="max_rank: expected at most the width of the widest layer, 24"):
        kind(max_rank=25).check(tiny_llama)


@pytest.mark.parametrize("method", [Orthogonal, OrthogonalLoRA])
def test_a_mixture_of_experts_is_refused(method):
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.raises(ValueError, match=r"is a mixture of experts .*, whose experts .* would train unprotected"):
        method().check(transformers.MixtralForCausalLM(config))
