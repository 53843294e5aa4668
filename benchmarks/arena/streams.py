"""Domains in a stream: how soon and how surely a boundary is noticed, and what elastic loses where nobody announces it.

    python -m benchmarks.arena.streams detect --model MODEL --data DIR [--json FILE]
    python -m benchmarks.arena.streams gradual --model MODEL --data DIR [--json FILE]
    python -m benchmarks.arena.streams train --model MODEL --data DIR [--lr 1e-3] [--seeds 3] [--json FILE]

`detect` reads no model but its tokenizer. Each trial is the domains in a random order, 60 batches of each, drawn with
replacement; delays are in batches after the first one of a domain, and so is where a rewind goes back to (0: to just
before that one). False alarms are counted on one domain alone and in the trials, with exact 95 % intervals (Clopper &
Pearson 1934). A false alarm in the last batches of a domain has the detector learn from two domains; it is one of the
two that count, and the boundary counts as missed.

`gradual`: 40 batches of a domain, then a ramp in which a record is of another one with a chance that rises from 0 to 1,
then 20 batches of that; each pair of domains in both orders, five times. Found: an alarm in the ramp or after it.

`train`: all domains in one run of HF's Trainer behind torch's AdamW, a constant rate after warm-up. "announced" has a
detector that is told; "auto" the detector; "late" the detector without going back to before the boundary; "none" has no
boundary, so nothing is protected. Validation records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from scipy.stats import beta

from sparse_cl.data import EncodedRecords
from sparse_cl.four_domains.domains import DEFAULT_DOMAINS, Domain, load_domains
from sparse_cl.four_domains.evaluate import evaluate_domain
from sparse_cl.integrations import ContinualCallback
from sparse_cl.methods import Elastic
from sparse_cl.models.loading import load_model, load_tokenizer
from sparse_cl.probes.boundaries import BoundaryDetector

LENGTH, SCORED = 256, 32


class Announced(BoundaryDetector):
    """Is told at which batches a domain begins."""

    def __init__(self, beginnings: Sequence[int]) -> None:
        super().__init__()
        self.beginnings, self.seen = set(beginnings), 0

    def update(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, **scores: float) -> bool:
        self.seen += 1
        return self.seen - 1 in self.beginnings


def interval(count: int, total: int) -> list[float]:
    low = beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return [round(1000 * float(x), 2) for x in (low, high)]


def encode(domains: Sequence[Domain], tokenizer: Any) -> dict[str, EncodedRecords]:
    return {domain.name: EncodedRecords(domain.train, tokenizer, max_length=LENGTH) for domain in domains}


def together(records: Sequence[EncodedRecords], draw: random.Random) -> torch.Tensor:
    """A batch of one record of each."""
    items = [own[draw.randrange(len(own))] for own in records]
    return torch.tensor([[token for item in items for token in item["input_ids"]]])


def detect(domains: Sequence[Domain], tokenizer: Any, size: int, trials: int, alone: int) -> dict[str, Any]:
    encoded = encode(domains, tokenizer)

    def batch(name: str, draw: random.Random) -> torch.Tensor:
        return together([encoded[name]] * size, draw)

    delays, missed, false, quiet = [], 0, 0, 0
    back, copies = [], 0
    for trial in range(trials):
        draw, detector = random.Random(trial), BoundaryDetector()
        order = draw.sample(list(encoded), len(encoded))
        copy: int | None = None
        for number, name in enumerate(order):
            found = []
            for i in range(60):
                alarm = detector.update(batch(name, draw))
                if copy is None and (alarm or detector.warns):
                    copy, copies = 60 * number + i, copies + 1
                if alarm and number and not found:
                    assert copy is not None
                    back.append(copy - 60 * number)
                if alarm:
                    found.append(i)
                if alarm or not detector.warns:
                    copy = None
            quiet += 60
            false += len(found) - bool(number and found)
            if number:
                missed += not found
                delays += found[:1]
    by_domain = {}
    for name in encoded:
        draw, detector = random.Random(99), BoundaryDetector()
        alarms = sum(detector.update(batch(name, draw)) for _ in range(alone))
        by_domain[name] = alarms
        false, quiet = false + alarms, quiet + alone
    return {
        "batch": size,
        "boundaries": len(delays) + missed,
        "missed": missed,
        "delays": sorted(delays),
        "rewound to": sorted(back),
        "copies per 1,000": round(1000 * copies / (trials * len(encoded) * 60), 1),
        "false alarms": false,
        "batches": quiet,
        "per 1,000": round(1000 * false / quiet, 2),
        "interval": interval(false, quiet),
        "alone": by_domain,
    }


def gradual(domains: Sequence[Domain], tokenizer: Any, size: int, ramp: int, repeats: int) -> dict[str, Any]:
    encoded, shares, early, further, count = encode(domains, tokenizer), [], 0, 0, 0
    for number, (old, new) in enumerate(itertools.permutations(encoded, 2)):
        for repeat in range(repeats):
            draw, detector, alarms = random.Random(100 * number + repeat), BoundaryDetector(), []
            for place in range(-40, ramp + 20):
                share = min(max(place / ramp, 0), 1)
                records = [encoded[new if draw.random() < share else old] for _ in range(size)]
                if detector.update(together(records, draw)):
                    alarms.append(share)
            late = [share for share in alarms if share > 0]
            count, early, further = count + 1, early + len(alarms) - len(late), further + max(0, len(late) - 1)
            shares += late[:1]
    return {
        "batch": size,
        "ramp": ramp,
        "streams": count,
        "found": len(shares),
        "interval": [round(x / 10, 1) for x in interval(len(shares), count)],
        "share of the new domain": [round(share, 2) for share in sorted(shares)],
        "false alarms before": early,
        "further alarms": further,
    }


class _Scores(transformers.TrainerCallback):
    """Scores all domains where one ends."""

    def __init__(self, tokenizer: Any, domains: Sequence[Domain], steps: int) -> None:
        self.tokenizer, self.domains, self.steps = tokenizer, domains, steps
        self.stages: list[list[float]] = []

    def score(self, model: Any) -> None:
        options = {"max_length": LENGTH, "max_records": SCORED, "split": "validation", "metrics": ("bits_per_byte",)}
        found = [evaluate_domain(model, self.tokenizer, domain, **options) for domain in self.domains]
        self.stages.append([float(scores["bits_per_byte"] or 0) for scores in found])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self.score(model)


def train(source: str, domains: Sequence[Domain], how: str, lr: float, steps: int, seed: int) -> dict[str, Any]:
    model, tokenizer = load_model(source)
    size, rows = 4, []
    for domain in domains:
        rows += random.Random(seed).sample(domain.train, size * steps)
    begins = [steps * number for number in range(1, len(domains))]
    boundaries = None if how == "none" else Announced(begins) if how == "announced" else BoundaryDetector()
    scores = _Scores(tokenizer, domains, steps)
    scores.score(model)
    callback = ContinualCallback(Elastic(), boundaries=boundaries, rewind=how != "late", name="d")
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            max_steps=steps * len(domains),
            per_device_train_batch_size=size,
            learning_rate=lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        )
        data = EncodedRecords(rows, tokenizer, max_length=LENGTH)
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=data, data_collator=collator, callbacks=[scores, callback]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        found = json.loads((Path(folder) / "sparse_cl" / "history.json").read_text())["domains"]
    table = scores.stages
    last = len(domains) - 1
    learned = [table[0][j] - table[j + 1][j] for j in range(last + 1)]
    lost = [table[-1][j] - table[j + 1][j] for j in range(last)]
    return {
        "how": how,
        "seed": seed,
        "learned": round(sum(learned) / len(learned), 4),
        "lost": round(sum(lost) / sum(learned[:-1]), 4),
        "acc": round(sum(table[-1]) / len(domains), 4),
        "steps": [entry["steps"] for entry in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("detect", "gradual", "train"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder of NAME.train.jsonl of the four domains")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=30, help="of a domain (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--alone", type=int, default=6000, help="batches of each domain alone (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="results; `train` goes on with those that are there")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    domains = load_domains(DEFAULT_DOMAINS, given.data, 0)
    done = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    if given.what == "detect":
        tokenizer, _ = load_tokenizer(given.model)
        done["detect"] = [detect(domains, tokenizer, size, given.trials, given.alone) for size in (4, 8)]
    elif given.what == "gradual":
        tokenizer, _ = load_tokenizer(given.model)
        done["gradual"] = [gradual(domains, tokenizer, 4, ramp, 5) for ramp in (25, 100)]
    else:
        runs = done.setdefault("train", [])
        for seed in range(given.seeds):
            for how in ("announced", "auto", "late", "none"):
                if any(run["how"] == how and run["seed"] == seed for run in runs):
                    continue
                runs.append(train(given.model, domains, how, given.lr, given.steps, seed))
                print(json.dumps(runs[-1]), flush=True)
                if given.json:
                    given.json.write_text(json.dumps(done, indent=1) + "\n")
    if given.json:
        given.json.write_text(json.dumps(done, indent=1) + "\n")
    if given.what != "train":
        print(json.dumps(done[given.what], indent=1))


if __name__ == "__main__":
    main()
