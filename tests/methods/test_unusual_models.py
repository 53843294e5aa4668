"""Models that share weights, grow between domains, are quantized, or have parts that no memory sees."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from benchmarks.arena.ewc import EWC
from sparse_cl import SubspaceMemory
from sparse_cl.methods import (
    METHODS,
    Curvature,
    Elastic,
    ElasticLoRA,
    LoRA,
    Orthogonal,
    OrthogonalLoRA,
    SelectiveWrite,
    SparseMasked,
    TwoFour,
)
from tests.cases.methods import domain, learn

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
WITH_MEMORY = (Elastic, Orthogonal, ElasticLoRA, OrthogonalLoRA)


def llama(**more):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=200, **SIZES, **more)).eval()


def two_domains(method, model, between=lambda model: None):
    model = learn(method, model, domain(1), steps=2)
    between(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = learn(method, model, domain(2), steps=2)
    return model, [str(warning.message) for warning in told]


@pytest.mark.parametrize("make", [Elastic, Orthogonal])
def test_a_weight_of_two_layers_is_protected_for_both(make):
    model, method = llama(), make()
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    method.check(model)
    two_domains(method, model)
    assert all(method.memory.has_seen(p) for n, p in model.named_parameters() if "proj" in n)


@pytest.mark.parametrize("make", [ElasticLoRA, OrthogonalLoRA, Curvature, TwoFour, SparseMasked, SelectiveWrite])
def test_methods_that_need_a_weight_for_each_layer_refuse_a_shared_one(make):
    model = llama()
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj and model.layers.0.mlp.gate_proj share one weight"):
        make().check(model)
    make().check(llama(tie_word_embeddings=True))


def test_a_block_in_two_places_is_protected():
    model, method = llama(), Elastic()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    method.check(model)
    _, told = two_domains(method, model)
    assert all(method.memory.has_seen(p) for n, p in model.named_parameters() if "proj" in n)
    assert not any(message.startswith("memory:") for message in told)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", WITH_MEMORY)
def test_tokens_may_come_between_domains(make, tied, tmp_path):
    model, method = llama(tie_word_embeddings=tied), make()
    model, _ = two_domains(method, model, lambda model: model.resize_token_embeddings(210))
    head = model.get_output_embeddings().weight
    name = next(name for name in method.memory.names if method.memory.shape(name)[0] == 210)
    assert len(head) == 210 and method.memory.subspace(name).mean > 0
    method.memory.save(tmp_path / "memory.safetensors")
    small = llama(tie_word_embeddings=tied)
    with pytest.raises(ValueError, match="of shape"):
        SubspaceMemory.load(tmp_path / "memory.safetensors", small)


def test_another_model_is_no_grown_one():
    memory = SubspaceMemory(llama(), source="inputs")
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=200, **{**SIZES, "intermediate_size": 32})
    )
    with pytest.raises(ValueError, match="gate_proj.weight' of shape"):
        memory.bind(other)


@pytest.mark.parametrize("make", [EWC, Curvature])
def test_methods_that_know_each_row_refuse_new_tokens_before_the_domain(make):
    model, method = llama(), make()
    learn(method, model, domain(1), steps=1)
    model.resize_token_embeddings(210)
    with pytest.raises(ValueError, match=r"has shape \(210, 16\), and had \(200, 16\) .* vocabulary that grew"):
        method.before_domain(model, domain(2))


class Packed(nn.Linear):
    """As bitsandbytes keeps a 4-bit layer: two weights in a byte."""

    def __init__(self, rows, columns):
        super().__init__(rows, columns, bias=False)
        self.weight = nn.Parameter(torch.zeros(rows * columns // 2, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("make", [*WITH_MEMORY, EWC, Curvature, TwoFour])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_by_name(make, dtype):
    model = llama()
    mlp = model.model.layers[1].mlp
    if dtype == torch.uint8:
        mlp.up_proj = Packed(24, 16)
    else:
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj is a \w+, .*needs float weights; load it without"):
        make().check(model)
    LoRA().check(model)


def encoders():
    bert = transformers.BertConfig(vocab_size=200, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    t5 = transformers.T5Config(vocab_size=200, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2)
    config = transformers.LlamaConfig(vocab_size=200, **SIZES)
    return {
        "BertForMaskedLM does not predict the next token": transformers.BertForMaskedLM(bert),
        "T5ForConditionalGeneration has an encoder and a decoder": transformers.T5ForConditionalGeneration(t5),
        "LlamaForSequenceClassification does not predict": transformers.LlamaForSequenceClassification(config),
    }


OURS = [method for method in METHODS.values() if method.__module__.startswith("sparse_cl.") and method is not LoRA]


@pytest.mark.parametrize("make", OURS)
def test_a_domain_is_not_begun_on_a_model_that_check_refuses(make):
    for why, model in encoders().items():
        with pytest.raises(ValueError, match=f"{why}.*, and {make.name} trains decoders only; load a model with"):
            make().before_domain(model, domain(1))
    model = llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=rf"layers.1.mlp.up_proj is a Linear, .* and {make.name} needs float weights"):
        make().before_domain(model, domain(1))


@pytest.mark.parametrize("make", [ElasticLoRA, OrthogonalLoRA, Elastic, EWC, Orthogonal])
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes_weights_are_refused_by_name(make, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(**{bits: True}), device_map="cpu"
    )
    with pytest.raises(ValueError, match="is quantized"):
        make().check(model)


HYBRIDS = {
    "qwen3_5": (
        transformers.Qwen3_5TextConfig(
            vocab_size=200,
            **SIZES,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        {"model.layers.0.linear_attn.conv1d.weight"},
    ),
    "jamba": (
        transformers.JambaConfig(
            vocab_size=200,
            **SIZES,
            num_experts=1,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=100,
            expert_layer_offset=99,
            mamba_d_state=8,
            use_mamba_kernels=False,
        ),
        {f"model.layers.0.mamba.{name}" for name in ("A_log", "conv1d.weight", "dt_proj.weight")},
    ),
    "opt_350m": (
        transformers.OPTConfig(
            vocab_size=200,
            hidden_size=16,
            word_embed_proj_dim=8,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
        set(),
    ),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_elastic_protects_every_linear_layer_and_names_the_others(family):
    config, free = HYBRIDS[family]
    torch.manual_seed(0)
    model, method = transformers.AutoModelForCausalLM.from_config(config), Elastic()
    method.check(model)
    learn(method, model, domain(1), steps=1)
    method.before_domain(model, domain(2))
    optimizer = method.make_optimizer(model, 1e-3)
    model(**domain(2)[0]).loss.backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1 and n not in method.memory.embeddings}
    assert matrices - set(optimizer.projections) == free
    assert free <= set(optimizer.rest)
    named = [str(warning.message) for warning in told if str(warning.message).startswith("memory:")]
    # OPT computes its positions, so that nobody knows which rows a batch looks up.
    free = free | {name for name in method.memory.embeddings if not method.memory.is_embedding(name, counted=True)}
    assert all(any(repr(name) in message for message in named) for name in free) and bool(named) == bool(free)
