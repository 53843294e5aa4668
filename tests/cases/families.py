"""A tiny model of each family that is known."""

import torch
import transformers
from torch import nn

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}


FAMILIES = {
    "Llama": GROUPED,
    "Qwen2": {key: value for key, value in GROUPED.items() if key != "head_dim"},
    "Qwen3": GROUPED,
    "Mistral": GROUPED,
    "Gemma": GROUPED,
    "Gemma2": GROUPED,
    "Gemma3Text": GROUPED,
    "Phi": SIZES,
    "Phi3": {key: value for key, value in GROUPED.items() if key != "head_dim"},
    "GPT2": {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "vocab_size": 64},
    "GPTNeoX": SIZES,
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
}


MIXTURES = {
    "Mixtral": {**GROUPED, "num_local_experts": 2},
    "Qwen2Moe": {
        **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        "num_experts": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
}


def make(family: str, sizes: dict) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
