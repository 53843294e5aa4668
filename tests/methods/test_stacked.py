"""The folder of the last domain alone holds what was trained: PEFT loads it, and a run goes on from it."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from cases.methods import copy_of, domain, learn, logits, same, weights

from sparse_cl.methods import ElasticLoRA, OrthogonalLoRA, SparseMaskedLoRA
from sparse_cl.methods.lora import add_adapter, merged
from sparse_cl.methods.stacked import Adapter, stack, unstack

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
MERGING = (ElasticLoRA, OrthogonalLoRA, SparseMaskedLoRA)
DOMAINS = 3


def three_domains(method, base, tmp_path):
    """The model after them, and its folders; the base is saved first, as it was."""
    base.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=base.dtype)
    folders = [tmp_path / str(number) for number in range(DOMAINS)]
    for number, folder in enumerate(folders):
        model = learn(method, model, domain(number), lr=3e-2, steps=3, folder=folder)
    return model.eval(), folders


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=280, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "make, kind",
    [*((make, "float32") for make in MERGING), (ElasticLoRA, "bfloat16"), (OrthogonalLoRA, "gpt2")],
)
def test_peft_loads_the_last_folder_as_the_model_that_was_trained(tiny_llama, tmp_path, make, kind):
    base = gpt2() if kind == "gpt2" else tiny_llama.to(getattr(torch, kind))
    model, folders = three_domains(make(rank=4, alpha=8), base, tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folders[-1], dtype=base.dtype).eval()
    # Merging rounds weights of bfloat16 to 8 bits; the stacked adapter stays in float32.
    loose = 0.02 if kind == "bfloat16" else 1e-5
    for number in range(DOMAINS):
        expected, found = (logits(x, domain(number)).float() for x in (model, loaded))
        change = (expected - logits(base, domain(number)).float()).norm()
        assert (expected - found).norm() <= loose * expected.norm() and change > 10 * (expected - found).norm()
    assert loaded.peft_config["default"].r == 4 * DOMAINS


@pytest.mark.parametrize("make, alone", [(ElasticLoRA, True), (SparseMaskedLoRA, True), (OrthogonalLoRA, False)])
def test_the_last_folder_is_enough_to_go_on_with_the_same_bits(tiny_llama, tmp_path, make, alone):
    base, method = copy_of(tiny_llama), make(rank=4, alpha=8)
    model, folders = three_domains(method, tiny_llama, tmp_path)
    if alone:
        for folder in folders[:-1]:
            shutil.rmtree(folder)
    other = make(rank=4, alpha=8)
    resumed = other.restore(base, folders[-1:] if alone else folders)
    assert same(weights(resumed), weights(model))
    ends = [
        learn(m, x, domain(5), steps=2, folder=tmp_path / n)
        for m, x, n in ((method, model, "a"), (other, resumed, "b"))
    ]
    assert same(*(weights(merged(end)) for end in ends))
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saving_again_changes_nothing(tiny_llama, tmp_path):
    method = ElasticLoRA(rank=4)
    _, folders = three_domains(method, tiny_llama, tmp_path)
    before = (folders[-1] / "adapter_model.safetensors").read_bytes()
    method.save(folders[-1])
    assert (folders[-1] / "adapter_model.safetensors").read_bytes() == before


def test_folders_of_older_versions_are_read_one_by_one(tiny_llama, tmp_path):
    base, method, model, folders = copy_of(tiny_llama), ElasticLoRA(rank=4), tiny_llama, []
    for number in range(2):
        folders.append(tmp_path / str(number))
        model = learn(method, model, domain(number), steps=2)
        model.save_pretrained(folders[-1])
        method.memory.save(folders[-1] / "memory.safetensors")
    assert same(weights(ElasticLoRA(rank=4).restore(base, folders)), weights(model))


def test_adapters_of_other_ranks_and_scales(tiny_llama, tmp_path):
    add_adapter(tiny_llama, 2, 3).save_pretrained(tmp_path)
    (name, *_) = own = {n: torch.randn(t.shape) for n, t in unstack([tmp_path])[0].tensors.items()}
    earlier = [
        Adapter(
            rank,
            alpha,
            {n: torch.randn((rank, t.shape[1]) if "lora_A" in n else (t.shape[0], rank)) for n, t in own.items()},
        )
        for rank, alpha in ((4, 8), (1, 0.7))
    ]
    stack(tmp_path, earlier)
    found = unstack([tmp_path])
    assert [(each.rank, each.alpha) for each in found] == [(4, 8), (1, 0.7), (2, 3)]
    for each, given in zip(found, earlier, strict=False):
        torch.testing.assert_close(each.tensors, given.tensors)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 7 and config["lora_alpha"] / config["r"] == 1.5


def test_errors(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="expected an adapter, found no adapter_config.json; model.save_pretrained"):
        stack(tmp_path, [])
    with pytest.raises(ValueError, match="expected a plain model, or what before_domain returned, since elastic-lora"):
        ElasticLoRA().before_domain(add_adapter(tiny_llama, 4, 8), domain(0))
