"""Models that are built from configurations, whole and with fewer blocks."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from sparse_cl.models.parts import find_blocks
from sparse_cl.planner.model import build, read_config

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GLU = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GLU, num_key_value_heads=2),
    "llama-tied": lambda: transformers.LlamaConfig(**GLU, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**GLU, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**GLU, num_key_value_heads=2, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**GLU, num_key_value_heads=1),
    "gemma": lambda: transformers.GemmaConfig(**GLU, num_key_value_heads=1, head_dim=16),
    "phi": lambda: transformers.PhiConfig(**GLU),
    "phi3": lambda: transformers.Phi3Config(**GLU, num_key_value_heads=2, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**GLU),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_is_that_of_its_configuration(family):
    model = build(CONFIGS[family](), family, "fp32")
    real = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float32)}
    short = build(CONFIGS[family](), family, blocks=1)
    assert len(find_blocks(short)) == 1 and next(short.parameters()).dtype == torch.bfloat16
    assert len(find_blocks(model)) == 2, "the configuration stays as it was"


def test_the_kind_of_each_layer_goes_with_it():
    config = transformers.Qwen2Config(**GLU, num_key_value_heads=2, layer_types=["full_attention", "sliding_attention"])
    assert build(config, "qwen2", blocks=1).config.layer_types == ["full_attention"]
    assert config.num_hidden_layers == 2


def test_llama_3_8b_has_as_many_parameters_as_its_card_says():
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    assert sum(p.numel() for p in build(config, "Llama-3-8B").parameters()) == 8_030_261_248


def test_a_configuration_is_read_from_a_folder_and_from_its_file(tmp_path):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        assert read_config(str(source)).hidden_size == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.T5Config(), "a T5Config is of no causal language model"),
        (lambda: transformers.ViTConfig(), "a ViTConfig is of no causal language model"),
        (
            lambda: transformers.MixtralConfig(**GLU, num_local_experts=2, num_key_value_heads=2),
            "MixtralForCausalLM is a mixture of experts.* The planner takes dense models",
        ),
        (lambda: transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1), "MambaForCausalLM has"),
    ],
)
def test_models_that_are_not_planned_for(config, message):
    with pytest.raises(ValueError, match=f"--model given: .*{message}"):
        build(config(), "given")


def test_no_configuration_is_said_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"--model {source}: no configuration") as raised:
            read_config(str(source))
        assert "\n" not in str(raised.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ValueError, match="no configuration"):
        read_config(str(tmp_path))
