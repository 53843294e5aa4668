"""`sparse-cl learn` twice: by what the base model is protected, and what the second domain leaves of the first.

    python -m benchmarks.arena.learn_protection --model MODEL --data DIR --first math --second medical --out DIR

The first domain is learned with the base model protected by texts that it wrote itself, by a file (DIR/base.txt) and by
nothing, which is AdamW; the second on top of the one that was protected by itself, by elastic and by AdamW. Scores: the
change of the bits per byte of DIR/base.test.txt, and of the loss on each domain's held-out records. A call that was
stopped goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sparse_cl.data import EncodedRecords, hold_out, read_records
from sparse_cl.four_domains.evaluate import text_bits_per_byte
from sparse_cl.four_domains.files import write_json
from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.learn.domain import learn
from sparse_cl.learn.settings import LearnSettings
from sparse_cl.models.loading import load_model
from sparse_cl.models.losses import mean_loss
from sparse_cl.models.passes import evaluation

SETTINGS: dict[str, Any] = {"lr": 1e-3, "steps": 60, "batch_size": 4, "max_length": 256, "texts": 256}
TEXT = 16384
"""Characters of base.test.txt that are scored."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "first", "second", "out"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    data, out = Path(arguments.data), Path(arguments.out)
    text = (data / "base.test.txt").read_text(encoding="utf-8")[:TEXT]

    def learned(name: str, model: str | Path, domain: str, **others: Any) -> Path:
        records = (str(data / f"{domain}.train.jsonl"),)
        learn(LearnSettings(model=str(model), data=records, out=out / name, **SETTINGS, **others))
        return out / name

    def scored(folder: str | Path) -> dict[str, float]:
        model, tokenizer = load_model(str(folder))
        found = {}
        with evaluation(model):
            found["base text"] = text_bits_per_byte(model, tokenizer, text, SETTINGS["max_length"])
        for domain in (arguments.first, arguments.second):
            held = hold_out(read_records([str(data / f"{domain}.train.jsonl")]), 0)[1]
            encoded = EncodedRecords(held.records, tokenizer, SETTINGS["max_length"])
            batches = DomainBatches(encoded, 8, next(model.parameters()).device, 64)
            found[domain] = mean_loss(model, batches)
        return found

    base = scored(arguments.model)
    results: dict[str, Any] = {
        "base": base,
        "settings": vars(arguments) | SETTINGS | {"text": TEXT},
        "torch": torch.__version__,
    }
    firsts = {"self": {}, "file": {"protect": str(data / "base.txt")}, "nothing": {"protect": "none"}}
    for name, others in firsts.items():
        folder = learned(f"1-{name}", arguments.model, arguments.first, **others)
        results[f"1-{name}"] = scored(folder)
        write_json(out / "results.json", results)
    for method in ("elastic", "adamw"):
        results[f"2-{method}"] = scored(learned(f"2-{method}", out / "1-self", arguments.second, method=method))
        write_json(out / "results.json", results)


if __name__ == "__main__":
    main()
