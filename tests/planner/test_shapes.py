"""Shapes read from configurations, against models that are really made."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from sparse_cl.planner.shapes import read_config, shape_of_config

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
def test_counts_are_those_of_a_real_model(family):
    config = CONFIGS[family]()
    config._attn_implementation = "eager"
    shape = shape_of_config(config, family, torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    length = 6
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    attention = sum(4 * length * block.queries for block in shape.blocks)
    # The counter adds the products of rotary frequencies, a few of a token.
    assert length * (2 * shape.multiplied + attention) == pytest.approx(counted.get_total_flops(), rel=0.01)
    assert {parameter.device.type for parameter in shape.model.parameters()} == {"meta"}


def test_parts_of_a_block_with_grouped_queries():
    (block, _) = shape_of_config(CONFIGS["qwen3"](), "qwen3").blocks
    assert (block.width, block.queries, block.keys, block.neurons, block.heads) == (32, 64, 32, 48, 4)
    assert block.gated
    stacked = shape_of_config(CONFIGS["phi3"](), "phi3").blocks[0]
    assert (stacked.queries, stacked.keys, stacked.neurons, stacked.gated) == (32, 16, 48, True)
    assert not shape_of_config(CONFIGS["opt"](), "opt").blocks[0].gated


def test_llama_3_8b_has_as_many_parameters_as_its_card_says():
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    shape = shape_of_config(config, "Llama-3-8B")
    assert shape.parameters == 8_030_261_248
    assert shape.multiplied == shape.parameters - 128256 * 4096 - 65 * 4096, "no embedding, no norm"


def test_a_configuration_is_read_from_a_folder_and_from_its_file(tmp_path):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        assert read_config(str(source)).hidden_size == 32


def test_real_models_have_as_many_parameters(shared_folder):
    for name in ("base-5m", "stories260k"):
        folder = str(shared_folder / "models" / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert shape_of_config(read_config(folder), name).parameters == sum(p.numel() for p in model.parameters())


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
        shape_of_config(config(), "given")


def test_no_configuration_is_said_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"--model {source}: no configuration") as raised:
            read_config(str(source))
        assert "\n" not in str(raised.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ValueError, match="no configuration"):
        read_config(str(tmp_path))
