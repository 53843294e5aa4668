"""What all methods that choose neurons promise: an account equal to a recount, and the same bits after a restart."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, gradients_of, inputs_of, learn, same, weights
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.methods import METHODS
from sparse_cl.methods.neuron_account import NeuronAccount
from sparse_cl.models.neuron_masks import Place
from sparse_cl.models.parts import find_mlps

NAMES = ("sparse-masked", "sparse-masked-lora", "selective-write", "orthogonal-masked")
DOMAINS = [domain(seed) for seed in range(3)]
MLPS = [f"model.layers.{number}.mlp" for number in range(2)]
MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def by_neuron(tensors, mlp):
    """(neurons,) float64: energy of what belongs to each neuron of an MLP without biases."""
    gate, up, down = (tensors[f"{mlp}.{name}"].detach().double().square() for name in MATRICES)
    return gate.sum(1) + up.sum(1) + down.sum(0)


def base_weights(model):
    """Of the base under an adapter, what is merged; by plain names."""
    if not hasattr(model, "merge_adapter"):
        return weights(model)
    model.merge_adapter()
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    model.unmerge_adapter()
    return found


def gains_in_force(method, mlp):
    """(neurons,): what the masks of a method say, read from the mask of one matrix."""
    if not method.masks:
        return torch.ones(24)
    names = [name for name in method.masks if f"{mlp}.down_proj" in name]
    (mask,) = (method.masks[name] for name in names)
    return torch.zeros(24).index_put((mask.index.long(),), torch.ones(()) if mask.gain is None else mask.gain)


@pytest.mark.parametrize("name", NAMES)
def test_the_account_equals_a_recount_from_scratch(tiny_llama, name):
    method, model, taken = METHODS[name](), tiny_llama, {mlp: torch.zeros(24, dtype=torch.bool) for mlp in MLPS}
    for batches in DOMAINS[:2]:
        before = base_weights(model)
        other = copy_of(tiny_llama) if not hasattr(model, "peft_config") else None
        if other is None:
            other = type(tiny_llama)(tiny_llama.config).eval()
            other.load_state_dict({**other.state_dict(), **before})
        gradients = gradients_of(other, batches[:4])
        each = [{name: g[number] for name, g in gradients.items()} for number in range(8)]
        energies = {mlp: sum(by_neuron(one, mlp) for one in each) for mlp in MLPS}
        model = learn(method, model, batches)
        after = base_weights(model)
        record = method.record()["layers"]
        for mlp in MLPS:
            gain = gains_in_force(method, mlp).double()
            change = by_neuron({n: after[n].double() - before[n].double() for n in after}, mlp)
            if name == "selective-write":
                taken[mlp] |= holding(method, model, mlp, batches)
            else:
                taken[mlp] |= gain > 0
            entry = record[mlp]
            assert entry["width"] == 24
            expected = float(gain.square() @ energies[mlp] / energies[mlp].sum())
            assert entry["surviving"] == pytest.approx(expected, rel=1e-4)
            assert entry["used"] == int(taken[mlp].sum())
            assert entry["free"] == 24 - entry["used"]
            if bool((gain == 0).any()):
                assert entry["leak"] == 0.0 == float(change[gain == 0].sum())
                assert float(change.sum()) > 0
            else:
                assert entry["leak"] is None


def holding(method, model, mlp, batches):
    """The fewest neurons with 90 % of the mean |activation| of all tokens, from the inputs of down_proj."""
    mean = inputs_of(model, f"{mlp}.down_proj", batches).double().abs().mean(0)
    found, total = torch.zeros(24, dtype=torch.bool), 0.0
    for neuron in mean.argsort(descending=True).tolist():
        if total >= 0.9 * float(mean.sum()):
            break
        found[neuron], total = True, total + float(mean[neuron])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_was_interrupted_goes_on_to_the_same_bits(tiny_llama, tmp_path, name):
    base, method, model = copy_of(tiny_llama), METHODS[name](), tiny_llama
    folders, records = [], []
    for number, batches in enumerate(DOMAINS):
        folders.append(tmp_path / str(number))
        model = learn(method, model, batches, steps=3, folder=folders[-1])
        records.append(method.record())
    for finished in (1, 2):
        resumed = METHODS[name]()
        other = resumed.restore(copy_of(base), folders[:finished])
        for number in range(finished, 3):
            other = learn(resumed, other, DOMAINS[number], steps=3)
            assert resumed.record() == records[number]
        assert same(base_weights(other), base_weights(model))


@pytest.mark.parametrize("name", NAMES[1:3])
def test_before_and_after_a_domain_modes_and_gradients_are_as_before(tiny_llama, name):
    method, model = METHODS[name](), tiny_llama
    model = learn(method, model, DOMAINS[0], steps=2)
    model.train()
    for p in model.parameters():
        p.grad = None
    kept = torch.ones_like(tiny_llama.model.embed_tokens.weight)
    tiny_llama.model.embed_tokens.weight.grad = kept
    model = method.before_domain(model, DOMAINS[1])
    assert tiny_llama.model.embed_tokens.weight.grad is kept
    method.after_domain(model, DOMAINS[1])
    assert tiny_llama.model.embed_tokens.weight.grad is kept
    assert tiny_llama.model.layers[0].mlp.training
    assert all(p.grad is None for p in model.parameters() if p is not tiny_llama.model.embed_tokens.weight)
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


def test_a_failing_batch_leaves_flags_and_hooks_as_before(tiny_llama):
    flags = [p.requires_grad for p in tiny_llama.parameters()]
    gains = {mlp.name: torch.ones(24) for mlp in find_mlps(tiny_llama)}
    with pytest.raises(IndexError):
        NeuronAccount().begin(
            "x", tiny_llama, [{"input_ids": torch.tensor([[10**6]]), "labels": torch.tensor([[0]])}], gains
        )
    assert [p.requires_grad for p in tiny_llama.parameters()] == flags
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in tiny_llama.parameters())


def test_when_few_neurons_are_left_a_warning_names_the_mlp(tiny_llama):
    method, model = METHODS["sparse-masked"](fraction=0.95), tiny_llama
    model = learn(method, model, DOMAINS[0], steps=1)
    with pytest.warns(UserWarning, match=r"sparse-masked: earlier domains use all but 10% .* of 2 of 2 MLPs; .* 4.17%"):
        learn(method, model, DOMAINS[1], steps=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_known_mlps_is_refused(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Sequential has no MLP that is known here"):
        METHODS[name]().check(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_options_are_the_constructor_s_and_are_recorded(name):
    method = METHODS[name]
    made = method()
    assert set(made.settings()) == set(method.options)
    assert method(**made.settings()).settings() == made.settings()


@pytest.mark.parametrize("name", ["sparse-masked", "sparse-masked-lora", "orthogonal-masked"])
@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range(name, fraction):
    with pytest.raises(ValueError, match=rf"fraction: .*\(0, 1\], got {fraction}"):
        METHODS[name](fraction=fraction)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 5),
    copies=st.integers(1, 2),
    dim=st.integers(0, 1),
    seed=st.integers(0),
)
def test_energies_of_neurons_are_those_of_what_their_masks_free(rows, columns, copies, dim, seed):
    shape = (rows * copies, columns) if dim == 0 else (rows, columns * copies)
    place = Place("w", shape, dim, copies)
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = place.energies(tensor)
    for neuron in range(len(found)):
        inside = tensor[place.mask(torch.tensor([neuron])).to_dense()]
        torch.testing.assert_close(found[neuron], inside.square().sum())
    gain = torch.arange(1.0, len(found) + 1)
    mask = place.mask(torch.arange(len(found)), gain)
    assert torch.equal(mask.gain, gain.repeat(copies))
