"""A tiny model and the embedded domains on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from sparse_cl.four_domains.embedded import generate


def write_world(folder: Path, tokenizer: Any) -> Path:
    """Writes `model`, a random Llama with its tokenizer, and `data`, JSONL files; returns the folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for domain, splits in generate(0).items():
        for split in ("train", "test", "eval"):
            lines = (json.dumps(record) + "\n" for record in splits[split])
            (folder / "data" / f"{domain}.{split}.jsonl").write_text("".join(lines))
    return folder
