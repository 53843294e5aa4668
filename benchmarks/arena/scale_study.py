"""Overlap, gradient cosine and sparsity against the width of a model, random-init and briefly pretrained.

    python -m benchmarks.arena.scale_study tune --tokenizer DIR --text FILE
    python -m benchmarks.arena.scale_study train --tokenizer DIR --text FILE --models DIR
    python -m benchmarks.arena.scale_study measure --models DIR --data DIR --extra MODEL ... --out benchmarks/results

The models are Llamas of two layers that differ in width alone, each width with three seeds. A random-init model is one
before training; the pretrained one of the same seed started from it and has read the same tokens at every width.
Weights start with a standard deviation of 0.32/√width, which is the usual 0.02 at width 256: so logits and residual
updates start equally large at every width. `train` skips models that exist, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from sparse_cl.four_domains.domains import load_domains
from sparse_cl.four_domains.training import train
from sparse_cl.models.loading import load_model, quiet
from sparse_cl.probes import ActivationProbe, GradientProbe, compare_gradients, overlap
from sparse_cl.report.batches import domain_batches

from .studies import scale_section
from .studies.summary import summary

WIDTHS = (32, 64, 128, 256, 512)
SEEDS = (0, 1, 2)
FAMILIES = ("random", "pretrained")
STEPS, BATCH, BLOCK = 1000, 4, 128
HELD_OUT_BLOCKS = 64
DOMAINS, RECORDS, LENGTH = ("code", "math", "medical", "general"), 64, 192
# What `tune` tries at width 64: losses of 5.221, 5.071, 5.003 and 5.019 nats a token on held-out text. The parabola
# through the best three (in the logarithm of the rate) has its minimum at 9.9e-3.
TUNED, RATE = (2e-3, 4e-3, 8e-3, 16e-3), 1e-2


def make_model(width: int, seed: int, tokenizer) -> transformers.LlamaForCausalLM:
    """A Llama of two layers with random weights, the same for the same seed."""
    heads = {32: 2, 64: 2, 128: 4, 256: 4, 512: 8}[width]
    transformers.set_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=round(width * 8 / 3 / 16) * 16,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
            initializer_range=0.32 / math.sqrt(width),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def blocks_of_text(path: Path, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (count, BLOCK) of the beginning of a text, each read once in training, and HELD_OUT_BLOCKS of its end."""
    text = path.read_text(encoding="utf-8")
    # Eight characters a token are more than any tokenizer of use here takes.
    parts = {STEPS * BATCH: text[: STEPS * BATCH * BLOCK * 8], HELD_OUT_BLOCKS: text[-HELD_OUT_BLOCKS * BLOCK * 8 :]}
    blocks = []
    for count, part in parts.items():
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < count * BLOCK or sum(map(len, parts.values())) > len(text):
            raise SystemExit(
                f"{path}: too short; {STEPS * BATCH + HELD_OUT_BLOCKS} blocks of {BLOCK} tokens are needed"
            )
        kept = ids[: count * BLOCK] if not blocks else ids[-count * BLOCK :]
        blocks.append(torch.tensor(kept).view(count, BLOCK))
    return blocks[0], blocks[1]


def optimizer(model, lr: float) -> torch.optim.Optimizer:
    """AdamW with the rates of muP (Yang et al. 2022), which carry from one width to another: `lr` for embeddings and
    norms, and for matrices `lr` at width 64, else 64/width of it."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    groups = [{"params": rest, "lr": lr}, {"params": matrices, "lr": lr * 64 / model.config.hidden_size}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def pretrain(model, blocks: torch.Tensor, lr: float, seed: int) -> None:
    """Next-token prediction on every block once, in an order that the seed gives."""
    data = [{"input_ids": block, "labels": block} for block in blocks]
    with tempfile.TemporaryDirectory() as folder, tqdm(total=STEPS, mininterval=10) as bar:
        train(
            model,
            data,
            transformers.default_data_collator,
            lambda m: optimizer(m, lr),
            folder=Path(folder),
            steps=STEPS,
            batch_size=BATCH,
            lr=lr,
            seed=seed,
            bar=bar,
            lr_scheduler_type="cosine",
        )


@torch.no_grad()
def loss_on(model, blocks: torch.Tensor) -> float:
    model.eval()
    return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in blocks.split(16)) / len(blocks)


def tune(arguments: argparse.Namespace) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    blocks, held_out = blocks_of_text(arguments.text, tokenizer)
    for lr in TUNED:
        model = make_model(64, 100, tokenizer)
        pretrain(model, blocks, lr, 100)
        print(f"lr {lr:g}  held-out loss {loss_on(model, held_out):.4f} nats a token", flush=True)


def train_all(arguments: argparse.Namespace) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    blocks, held_out = blocks_of_text(arguments.text, tokenizer)
    for width in WIDTHS:
        for seed in SEEDS:
            for family in FAMILIES:
                folder = arguments.models / f"{family}-{width}-{seed}"
                if folder.is_dir():
                    continue
                model, start = make_model(width, seed, tokenizer), time.perf_counter()
                if family == "pretrained":
                    pretrain(model, blocks, RATE, seed)
                seconds = time.perf_counter() - start
                building = folder.with_suffix(".part")
                model.save_pretrained(building)
                tokenizer.save_pretrained(building)
                building.rename(folder)
                loss = loss_on(model, held_out)
                print(f"{folder.name}: held-out loss {loss:.4f} nats a token, {seconds:.0f} s", flush=True)


def measure_model(source: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The summary of one model on the first training records of each domain, with its cosines in full."""
    model, tokenizer = load_model(str(source))
    domains = load_domains(DOMAINS, str(arguments.data), 0)
    batches = domain_batches(domains, tokenizer, model, records=RECORDS, batch_size=4, max_length=LENGTH)
    activations = {domain: ActivationProbe(model).run(own) for domain, own in batches.items()}
    gradients = {domain: GradientProbe(model).run(own) for domain, own in batches.items()}
    record = {
        "activation": {domain: found.to_json() for domain, found in activations.items()},
        "overlap": overlap(activations).to_json(),
        "cosines": compare_gradients(gradients).to_json(),
    }
    whole = record["cosines"]["model"]
    return {
        **summary(source.name, model, record),
        "family": source.name.partition("-")[0] if source.parent == arguments.models else source.name,
        "loss": {domain: found.loss for domain, found in gradients.items()},
        "tokens": record["cosines"]["tokens"],
        "pairs": record["cosines"]["pairs"],
        "whole_model": {key: whole[key] for key in ("cosine", "low", "high", "ceiling", "corrected")},
    }


def measure(arguments: argparse.Namespace) -> None:
    quiet()
    arguments.out.mkdir(parents=True, exist_ok=True)
    trained = [arguments.models / f"{f}-{width}-{seed}" for width in WIDTHS for seed in SEEDS for f in FAMILIES]
    sources = [*(folder for folder in trained if folder.is_dir()), *arguments.extra]
    records = []
    for source in tqdm(sources, mininterval=5):
        kept = arguments.models / f"{source.name}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(measure_model(source, arguments)))
        records.append(json.loads(kept.read_text()))
    short = json.loads(json.dumps(records), parse_float=lambda number: float(f"{float(number):.4g}"))
    lines = ",\n".join(json.dumps(record) for record in short)
    (arguments.out / "scale-study.json").write_text(f"[\n{lines}\n]\n")
    shown = scale_section.section(records)
    print(shown.sentence)
    shown.figures[0].savefig(arguments.out / "scale-study.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, command in (("tune", tune), ("train", train_all)):
        sub = commands.add_parser(name)
        sub.set_defaults(command=command)
        sub.add_argument("--tokenizer", required=True, help="folder of a tokenizer, such as base-5m")
        sub.add_argument("--text", type=Path, required=True, help="plain text to read")
        if name == "train":
            sub.add_argument("--models", type=Path, required=True, help="folder to save the models under")
    sub = commands.add_parser("measure")
    sub.set_defaults(command=measure)
    sub.add_argument("--models", type=Path, required=True, help="folder of `train`; what was measured is kept there")
    sub.add_argument("--data", type=Path, required=True, help="folder of the domains' JSONL files")
    sub.add_argument("--extra", type=Path, nargs="*", default=[], help="folders of further models")
    sub.add_argument("--out", type=Path, required=True, help="folder for scale-study.json and .png")
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
