"""Adapters of PEFT that stay outside a memory's subspaces, from their first value to the merged weight."""

from __future__ import annotations

import math
import warnings

import peft
import pytest
import torch
from torch import nn

from sparse_cl import SubspaceMemory, SubspaceProjectedAdamW
from sparse_cl.lora import orthogonal_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokens(seed, batch=2, length=6):
    return torch.randint(0, 200, (batch, length), generator=torch.Generator().manual_seed(seed))


def remember(model, energy=0.8, seed=1):
    """A memory of one domain: the inputs of two sequences."""
    memory = SubspaceMemory(model, energy=energy, source="inputs")
    with torch.no_grad(), memory.watch():
        model(input_ids=tokens(seed))
    memory.observe()
    memory.consolidate()
    return memory


def adapt(model, **config):
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **config}))


def adapters(model, name="default"):
    """Base name -> LoRA layer."""
    return {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }


def share_inside(matrix, basis):
    """||M U||^2 / ||M||^2 in float64."""
    matrix, basis = matrix.detach().double(), basis.double()
    return float((matrix @ basis).square().sum() / matrix.square().sum())


def train(model, optimizer, steps=50):
    for step in range(steps):
        ids = tokens(100 + step % 5)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_starts_outside_the_basis_and_b_at_zero(tiny_llama):
    expected = tiny_llama(input_ids=tokens(3)).logits
    memory = remember(tiny_llama)
    model = adapt(tiny_llama)
    kept = orthogonal_lora(model, memory)
    layers = adapters(model)
    assert set(kept) == {layer.lora_A["default"].weight for layer in layers.values()}
    for name, layer in layers.items():
        basis = memory.basis(f"{name}.weight")
        assert 0 < basis.shape[1] < layer.in_features
        a = layer.lora_A["default"].weight
        assert share_inside(a, basis) < 1e-12
        assert torch.linalg.matrix_rank(a) == min(4, layer.in_features - basis.shape[1])
        assert kept[a].rank == basis.shape[1]
        assert not layer.lora_B["default"].weight.any()
    assert torch.equal(model(input_ids=tokens(3)).logits, expected)


@pytest.mark.parametrize("used", [0, 10, 60])
def test_a_keeps_the_scale_that_peft_gives_it(used):
    width, rank = 64, 4000
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 8, bias=False))
    memory = SubspaceMemory(model, energy=1.0)
    if used:
        model[0].weight.grad = torch.zeros(8, width)
        for step in range(used):
            model[0].weight.grad = torch.randn(8, 1) * torch.eye(width)[step]
            memory.observe()
        memory.consolidate()
        assert memory.rank("0.weight") == used
    adapted = adapt(model, r=rank, target_modules=["0"])
    orthogonal_lora(adapted, memory)
    a = adapters(adapted)["0"].lora_A["default"].weight
    # Row norms squared have mean 1/3; their mean over 4000 rows is within 1 % but once in 10^4 even at 4 dimensions.
    assert a.square().sum(1).mean().item() == pytest.approx(1 / 3, rel=0.04)
    assert not a[:, :used].any() or a[:, :used].abs().max() < 1e-6


def test_without_a_basis_a_is_drawn_as_peft_draws_it(tiny_llama):
    memory = SubspaceMemory(tiny_llama, source="inputs")
    model = adapt(tiny_llama)
    torch.manual_seed(5)
    assert orthogonal_lora(model, memory) == {}
    torch.manual_seed(5)
    for layer in adapters(model).values():
        expected = nn.init.kaiming_uniform_(torch.empty_like(layer.lora_A["default"].weight), a=math.sqrt(5))
        assert torch.equal(layer.lora_A["default"].weight, expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_product_and_merged_weight_do_not_leak(tiny_llama, use_rslora):
    memory = remember(tiny_llama)
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    model = adapt(tiny_llama, use_rslora=use_rslora)
    kept = orthogonal_lora(model, memory)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    train(model, SubspaceProjectedAdamW(trained, lr=1e-2, weight_decay=0.1, memory=kept, rest="train"))
    products = {
        f"{name}.weight": layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        for name, layer in adapters(model).items()
    }
    for name, product in products.items():
        assert product.norm() > 0.01
        assert share_inside(product, memory.basis(name)) <= 1e-6
    unmerged = model(input_ids=tokens(3)).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens(3)).logits, unmerged, rtol=1e-4, atol=1e-5)
    after = dict(merged.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(products)
    assert max(memory.leak(before, after).values()) <= 1e-6
    # What the layers compute for inputs inside the basis is what they computed before.
    for name in moved:
        basis = memory.basis(name)
        torch.testing.assert_close(after[name] @ basis, before[name] @ basis, rtol=1e-4, atol=1e-5)


def test_plain_adamw_on_the_same_start_leaks(tiny_llama):
    memory = remember(tiny_llama)
    model = adapt(tiny_llama)
    orthogonal_lora(model, memory)
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1))
    leaks = [
        share_inside(layer.lora_B["default"].weight @ layer.lora_A["default"].weight, memory.basis(f"{name}.weight"))
        for name, layer in adapters(model).items()
    ]
    assert min(leaks) > 1e-3


def test_saved_adapters_load_as_they_were(tiny_llama, tmp_path):
    memory = remember(tiny_llama)
    base = snapshot(tiny_llama)
    model = adapt(tiny_llama)
    kept = orthogonal_lora(model, memory)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    train(model, SubspaceProjectedAdamW(trained, lr=1e-2, memory=kept, rest="train"), steps=3)
    expected = model(input_ids=tokens(3)).logits
    model.save_pretrained(tmp_path)

    clean = type(tiny_llama)(tiny_llama.config).eval()
    clean.load_state_dict(base)
    loaded = peft.PeftModel.from_pretrained(clean, tmp_path)
    assert torch.equal(loaded.eval()(input_ids=tokens(3)).logits, expected)


def test_a_second_domain_is_kept_out_of_as_well(tiny_llama):
    memory = remember(tiny_llama)
    model = adapt(tiny_llama)
    kept = orthogonal_lora(model, memory)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    train(model, SubspaceProjectedAdamW(trained, lr=1e-2, memory=kept, rest="train"), steps=3)
    first = {name: memory.basis(name) for name in memory.names}
    base = model.merge_and_unload()
    with torch.no_grad(), memory.watch():
        base(input_ids=tokens(2))
    memory.observe()
    memory.consolidate()
    again = adapt(base)
    orthogonal_lora(again, memory)
    for name, layer in adapters(again).items():
        a = layer.lora_A["default"].weight
        for basis in (first[f"{name}.weight"], memory.basis(f"{name}.weight")):
            assert a.any()
            assert share_inside(a, basis) < 1e-12
        assert memory.rank(f"{name}.weight") > first[f"{name}.weight"].shape[1]


def test_another_adapter_stays_as_it_is(tiny_llama):
    memory = remember(tiny_llama)
    model = adapt(tiny_llama)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: layer.lora_A["default"].weight.clone() for name, layer in adapters(model).items()}
    kept = orthogonal_lora(model, memory, adapter_name="second")
    assert len(kept) == 2
    assert all(torch.equal(layer.lora_A["default"].weight, before[name]) for name, layer in adapters(model).items())
    for name, layer in adapters(model, "second").items():
        assert share_inside(layer.lora_A["second"].weight, memory.basis(f"{name}.weight")) < 1e-12


def test_a_saturated_layer_is_named_and_stays_zero(tiny_llama):
    full = "model.layers.1.self_attn.v_proj"
    memory = SubspaceMemory(tiny_llama, energy=1.0)
    for name in memory.names:
        weight = tiny_llama.get_parameter(name)
        weight.grad = torch.zeros_like(weight)
        weight.grad[:, 0] = 1.0
    memory.observe()
    weight = tiny_llama.get_parameter(f"{full}.weight")
    for row in torch.eye(16):
        weight.grad[0] = row
        memory.observe()
    memory.consolidate()
    tiny_llama.zero_grad()
    model = adapt(tiny_llama)
    with pytest.warns(UserWarning, match=rf"1 of 14 LoRA layers have no free direction.*base_model.model.{full}\."):
        kept = orthogonal_lora(model, memory)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match=f"{full}.lora_A.*not updated any more"):
        optimizer = SubspaceProjectedAdamW(trained, lr=1e-2, weight_decay=0.1, memory=kept, rest="train")
    train(model, optimizer, steps=5)
    for name, layer in adapters(model).items():
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert bool(product.any()) == (name != full)


@pytest.mark.parametrize(
    ("config", "adapter", "message"),
    [
        ({}, "other", "adapter_name: the model has no adapter 'other'; it has default"),
        ({"use_dora": True}, "default", r"is a variant of LoRA \(Dora.*use_rslora=True is fine"),
        ({"init_lora_weights": "olora"}, "default", "was made with init_lora_weights='olora'"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "default",
            r"embed_tokens adapts a Embedding; expected torch\.nn\.Linear",
        ),
    ],
)
def test_adapters_that_cannot_be_kept_out(tiny_llama, config, adapter, message):
    memory = remember(tiny_llama)
    model = adapt(tiny_llama, **config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        orthogonal_lora(model, memory, adapter)
    assert_unchanged(model, before)


def test_a_merged_adapter_is_to_be_unmerged_first(tiny_llama):
    memory = remember(tiny_llama)
    model = adapt(tiny_llama)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.fill_(0.1)
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'default' is merged into .*call peft_model\.unmerge_adapter\(\) first"):
        orthogonal_lora(model, memory)
    assert_unchanged(model, before)
    model.unmerge_adapter()
    orthogonal_lora(model, memory)


def test_a_layer_that_the_memory_does_not_know_is_named(tiny_llama):
    layer = tiny_llama.model.layers[1].mlp.up_proj
    memory = SubspaceMemory([(n, p) for n, p in tiny_llama.named_parameters() if p is not layer.weight and p.ndim == 2])
    model = adapt(tiny_llama)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"memory: it does not track the base layer of .*layers\.1\.mlp\.up_proj"):
        orthogonal_lora(model, memory)
    assert_unchanged(model, before)


def test_a_model_without_adapters(tiny_llama):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA layer; wrap it"):
        orthogonal_lora(tiny_llama, remember(tiny_llama))


def beside(memory_of_head=True, late=False, **config):
    """The head's change when it is trained beside an adapter, the memory's basis of it, and what was said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False))
    memory = SubspaceMemory(model if memory_of_head else model[0], energy=0.9, source="inputs")
    with torch.no_grad(), memory.watch():
        model(torch.randn(64, 6) @ torch.randn(6, 32))
    memory.observe()
    memory.consolidate()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], **config))
    head = adapted.base_model.model[2]
    head = head.modules_to_save["default"].weight if config else head.weight
    head.requires_grad_(not late)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bases = orthogonal_lora(adapted, memory)
        head.requires_grad_(True)
        trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
        optimizer = SubspaceProjectedAdamW(trained, lr=1e-2, memory=bases, rest="train")
        before = head.detach().clone()
        for _ in range(5):
            optimizer.zero_grad()
            adapted(torch.randn(16, 32)).square().mean().backward()
            optimizer.step()
    return head - before, memory.basis("2.weight") if memory_of_head else None, [str(w.message) for w in told]


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["2"]}])
def test_what_is_trained_beside_an_adapter_is_protected_too(config):
    change, basis, told = beside(**config)
    assert change.any() and share_inside(change, basis) < 1e-6
    assert not told


def test_what_is_trained_beside_an_adapter_unknown_to_the_memory_is_named():
    _, _, told = beside(memory_of_head=False, modules_to_save=["2"])
    assert any("1 parameters beside adapter 'default' would be trained unprotected: base_model" in m for m in told)


def test_what_is_unfrozen_later_is_named_by_the_optimizer():
    _, _, told = beside(late=True)
    assert len(told) == 1 and "1 parameters of two or more dimensions are trained unprotected" in told[0]
    assert "base_model.model.2.weight" in told[0]


@pytest.mark.parametrize("config", [{"trainable_token_indices": [1, 2]}, {"modules_to_save": ["embed_tokens"]}])
def test_tokens_that_are_trained_beside_an_adapter_are_named(tiny_llama, config):
    memory = remember(tiny_llama)
    with pytest.warns(UserWarning, match=r"beside adapter 'default' would be trained unprotected: .*embed_tokens"):
        orthogonal_lora(adapt(tiny_llama, **config), memory)
