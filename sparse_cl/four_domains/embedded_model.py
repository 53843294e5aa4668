"""The embedded base model: a small Llama with a byte-level tokenizer, pretrained here and cached.

Nothing is downloaded. Pretraining takes about half a minute on two cores; a second run finds the model in
`$SPARSE_CL_CACHE`, else `$XDG_CACHE_HOME/sparse_cl`, else `~/.cache/sparse_cl`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tqdm.auto import tqdm

from . import embedded
from .training import train

RECIPE = {
    # Raise it with any change to the text, the tokenizer or the training: the cache is keyed by this table.
    "version": 1,
    "seed": 0,
    "vocabulary": 1024,
    "lines": 30_000,
    "block": 64,
    "steps": 550,
    "batch_size": 32,
    "lr": 4e-3,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def cache_folder() -> Path:
    """Where the model is cached; see the module."""
    if own := os.environ.get("SPARSE_CL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_cl"


def build_tokenizer(lines: list[str], vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE (every byte is in it, so any text can be written) with single digits."""
    end = "<|endoftext|>"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits, byte_level = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )


def _pretrain(folder: Path, recipe: dict) -> None:
    lines = embedded.text_for_pretraining(recipe["seed"], recipe["lines"])
    # The tokenizer also sees the domains' training text (the model does not), or their prompts would be long.
    in_domain = [
        record["prompt"] + "\n" + record["response"]
        for splits in embedded.generate(recipe["seed"]).values()
        for record in splits["train"]
    ]
    tokenizer = build_tokenizer([*lines[: len(in_domain)], *in_domain], recipe["vocabulary"])
    transformers.set_seed(recipe["seed"])
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{name: recipe[name] for name in (*sizes, "num_key_value_heads", "max_position_embeddings")},
    )
    model = transformers.LlamaForCausalLM(config)
    # Whole paragraphs of lines, so that the model knows both the line break and the end of a text.
    paragraphs = ["\n".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    ids = [i for text in paragraphs for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    block = recipe["block"]
    blocks = torch.tensor(ids[: len(ids) // block * block]).view(-1, block)
    with tqdm(total=recipe["steps"], mininterval=1, desc="pretraining the embedded model (once)") as bar:
        train(
            model,
            [{"input_ids": block, "labels": block} for block in blocks],
            transformers.default_data_collator,
            lambda m: torch.optim.AdamW(m.parameters(), lr=recipe["lr"]),
            folder=folder / "trainer",
            steps=recipe["steps"],
            batch_size=recipe["batch_size"],
            lr=recipe["lr"],
            seed=recipe["seed"],
            bar=bar,
        )
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def embedded_model_folder(recipe: dict | None = None) -> Path:
    """Folder of the pretrained embedded model (for `from_pretrained`); pretrains it if the cache has none.

    Args:
        recipe: other entries than `RECIPE`'s; each recipe has a place of its own in the cache.
    """
    recipe = {**RECIPE, **(recipe or {})}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"embedded-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and moved whole: an interrupted run leaves no half model, and two runs at once cannot mix.
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _pretrain(building, recipe)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder
