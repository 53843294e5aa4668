"""A model that the user wrapped by PEFT: A and B are held as layers are, and nothing of it trains unprotected."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import transformers
from cases.methods import copy_of, domain, learn, logits, same, weights

from sparse_cl import ElasticAdamW, SubspaceMemory
from sparse_cl.methods import METHODS, AdamW, Carried, Elastic, ElasticLoRA, Orthogonal, load_carried, save_carried
from sparse_cl.methods.memory_method import trained_by_name


def wrapped(base, **options):
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    return peft.get_peft_model(copy_of(base), peft.LoraConfig(task_type="CAUSAL_LM", **config))


def adapters(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}


@pytest.mark.parametrize("make", [Elastic, Orthogonal])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True, "lora_dropout": 0.1}])
def test_every_a_and_b_is_held_in_the_second_domain(tiny_llama, make, options):
    method = make()
    model = learn(method, wrapped(tiny_llama, **options), domain(0))
    method.before_domain(model, domain(1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(method.memory.names) == trained, "the frozen base is not tracked"
    assert adapters(model) <= trained and len(adapters(model)) == 12
    assert set(method.make_optimizer(model, 1e-3).projections) == trained


@pytest.mark.parametrize("make", [Elastic, Orthogonal])
def test_dora_whose_change_is_more_than_b_a_is_refused(tiny_llama, make):
    with pytest.raises(ValueError, match="model: adapter 'default' of .*q_proj is a variant of LoRA .*use_dora=True"):
        make().before_domain(wrapped(tiny_llama, use_dora=True), domain(0))


def test_a_trained_head_is_held_by_what_all_tokens_put_into_it(tiny_llama):
    method = Elastic()
    model = learn(method, wrapped(tiny_llama, modules_to_save=["lm_head"]), domain(0)).eval()
    rows = []
    inner = model.base_model.model.lm_head.modules_to_save["default"]
    hook = inner.register_forward_pre_hook(
        lambda _, args: rows.append(args[0][batch["attention_mask"].bool()].double())
    )
    for batch in domain(0):
        model(**batch)
    hook.remove()
    x = torch.cat(rows)
    (head,) = (name for name in method.memory.names if "lm_head" in name)
    found = method.memory.subspace(head)
    expected = torch.linalg.eigvalsh(x.mT @ x / len(x)).flip(0)[: len(found.values)]
    torch.testing.assert_close(found.values.double(), expected, rtol=0.02, atol=0)


def moved(method, base):
    """How far outputs on the first domain move while the second is learned, and how much that lowers its loss."""
    model = learn(method, wrapped(base), domain(0), lr=1e-2, steps=20)
    with torch.no_grad():
        before = logits(model, domain(0)), sum(float(model.eval()(**b).loss) for b in domain(1))
    learn(method, model, domain(1), lr=1e-2, steps=20)
    with torch.no_grad():
        gain = before[1] - sum(float(model.eval()(**b).loss) for b in domain(1))
    return float((logits(model, domain(0)) - before[0]).norm() / before[0].norm()), gain


def test_old_outputs_move_less_than_by_adamw(tiny_llama):
    free, gain = moved(AdamW(), tiny_llama)
    held, kept = moved(Elastic(strength=1), tiny_llama)
    out, _ = moved(Orthogonal(energy=0.999), tiny_llama)
    assert held < 0.7 * free and kept > 0.4 * gain
    assert out < 0.3 * free


@pytest.mark.parametrize("budget", [0.1, 0.001])
def test_what_a_and_b_compute_for_old_inputs_stays_within_a_budget(tiny_llama, budget):
    method = Elastic()
    model = learn(method, wrapped(tiny_llama), domain(0), lr=1e-2, steps=20)
    method.make_optimizer = lambda model, lr: (
        made.append(ElasticAdamW(trained_by_name(model), lr=lr, memory=method.memory, budget=budget)) or made[0]
    )
    made: list[ElasticAdamW] = []
    learn(method, model, domain(1), lr=1e-2, steps=20)
    drift = made[0].old_output_drift()
    assert drift.keys() == adapters(model)
    assert 0.1 * budget < max(drift.values()) <= budget * (1 + 1e-4)


def test_a_later_process_goes_on_with_the_adapter_and_its_memory(tiny_llama, tmp_path):
    method = Elastic()
    model = learn(method, wrapped(tiny_llama), domain(0), folder=tmp_path)
    save_carried(tmp_path, Carried(method.memory, [{"name": "first"}]))
    other, again = Elastic(), peft.PeftModel.from_pretrained(copy_of(tiny_llama), tmp_path, is_trainable=True)
    other.remember(again, load_carried(tmp_path, again).memory)
    ends = [learn(m, x, domain(1)) for m, x in ((method, model), (other, again))]
    assert same(*map(weights, ends))


def test_a_fresh_adapter_is_not_taken_for_the_one_that_was_trained(tiny_llama):
    method = Elastic()
    learn(method, wrapped(tiny_llama), domain(0))
    other, fresh = Elastic(), wrapped(tiny_llama)
    other.remember(fresh, method.memory)
    with pytest.raises(ValueError, match=r"model: .*lora_B.default.weight is zero, so this is a fresh adapter"):
        other.before_domain(fresh, domain(1))
    with pytest.raises(ValueError, match="elastic: an adapter that is to be trained cannot keep what the base knows"):
        Elastic().protect(fresh, domain(0))


def test_what_a_memory_never_saw_is_named(tiny_llama):
    method = Elastic()
    model = learn(method, wrapped(tiny_llama, trainable_token_indices={"embed_tokens": [1, 2]}), domain(0))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "trainable_tokens" in name)
    model.base_model.set_adapter(["default", "second"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        learn(method, model, domain(1), steps=1)
    said = " ".join(str(warning.message) for warning in told)
    assert "trained unprotected" in said and ("second" in said or "trainable_tokens" in said)


def test_a_base_in_few_bits_may_lie_under_adapters_that_are_trained(tiny_llama):
    model = wrapped(tiny_llama)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    for name in ("elastic", "orthogonal", "lora"):
        METHODS[name]().check(model)
    with pytest.raises(ValueError, match="gate_proj is a Linear, .* elastic-lora needs float weights"):
        ElasticLoRA().check(model)


def in_few_bits(kind):
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(**{kind: True})


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit", "torchao"])
def test_adapters_on_a_base_in_few_bits(tiny_llama, tmp_path, kind):
    # bitsandbytes takes inputs and outputs in blocks of 64 and 32 on a CPU, in evaluation.
    widths = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    wide = transformers.LlamaConfig(**{**tiny_llama.config.to_dict(), **widths})
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=in_few_bits(kind), device_map="cpu"
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    method = Elastic()
    model = learn(method, model, domain(0), steps=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    method.before_domain(model, domain(1))
    assert set(method.make_optimizer(model, 1e-3).projections) == adapters(model) == set(method.memory.names)
    learn(method, model, domain(1), steps=2)
    assert before.keys() == adapters(model)
    assert not any(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_the_memory_of_a_wrapped_model_is_of_what_is_trained(tiny_llama):
    model = wrapped(tiny_llama)
    assert set(SubspaceMemory(model, source="inputs").names) == adapters(model)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    memory = SubspaceMemory(model, source="inputs")
    assert set(memory.names) == adapters(model) | {"base_model.model.model.embed_tokens.weight"}, "head and embedding"
    model.requires_grad_(False)
    memory.bind(model)  # to look at it
