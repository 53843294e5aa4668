"""A tiny model of every class of causal language models that transformers has."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 64

#: What a number of a configuration becomes, by the first pattern that its name matches.
SIZES = [
    ("vocab", VOCABULARY),
    ("token_id$|token_index$", 1),
    (r"(hidden|conv).*layers$|^(n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_blocks)$", 2),
    ("^first_k_dense|^num_kv_shared|^num_nextn|mtp", 0),
    ("^n_group$|^topk_group$", 1),
    ("experts_per|top_?k$|^topk|moe_k$", 1),
    ("experts", 2),
    ("mamba_(d_head|headdim|head_dim)", 16),
    ("head_dim|head_size|_kv_head|qk_nope|v_head|d_kv$|kv_channels|rope_head|rotary_dim|d_head", 8),
    ("heads?$|heads_kv|n_groups?$|num_groups", 4),
    ("max_position|n_positions|n_ctx|seq_len|context_len", 64),
    ("_rank$", 8),
    ("state_size|d_state|ssm_state|conv_kernel|d_conv", 4),
    ("intermediate|ffn|inner|d_ff|dim_ff|mlp_dim|feed_forward|moe_.*size|expert.*size|d_ssm", 64),
    ("hidden_size|d_model|n_embd|emb_dim|embed_dim|^dim$|proj_dim|width|attention_hidden|embedding_size|channels", 32),
    ("window|chunk|block_size|local", 8),
]

#: What these need besides.
ALSO = {
    "mamba2": {"num_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "xmod": {"default_language": "en_XX"},
}


def shrunk(config):
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            shrunk(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((size for pattern, size in SIZES if re.search(pattern, name)), value)
            setattr(config, name, min(small, value))
    for name, value in ALSO.get(config.model_type, {}).items():
        setattr(config, name, value)
    config.use_cache = False
    return config


def tiny(kind: type, config_class: type) -> nn.Module:
    """A model of at most 20 million parameters; whatever error keeps it from being built comes through."""
    config = config_class()
    if kind.config_class not in (None, config_class):
        config = config.get_text_config()
    shrunk(config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    assert count < 2e7, f"{count} parameters"
    torch.manual_seed(0)
    return kind(config).eval()


def classes() -> Iterator[tuple[type, type]]:
    """Each class of models, and its first configuration."""
    seen = set()
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        kind = found[0] if isinstance(found, tuple) else found
        if kind not in seen:
            seen.add(kind)
            yield kind, config_class


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises a TimeoutError in what takes longer."""

    def late(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
