"""What each method's last checkpoint did to the base model: drift, spread, rank, dormant neurons, plasticity.

    python -m benchmarks.arena.drift_of_methods --model BASE --data DIR --text FILE RUN [RUN …] [--out FILE.json]

RUN: folders of `sparse-cl run` on that model, in each of which every method's checkpoint is compared with the base. The
reference text is the beginning of FILE and the domains' validation records; hubs are neurons that are in the top fifth
of every domain on the base model. Learning accuracy and forgetting are those of the runs' results.json, in bits per
byte of the answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sparse_cl.four_domains.domains import load_domains
from sparse_cl.four_domains.files import write_json
from sparse_cl.four_domains.report import text_table
from sparse_cl.models.loading import load_model, quiet
from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.drift import drift
from sparse_cl.probes.neurons import dormant, hubs
from sparse_cl.probes.plasticity import Plasticity, steps_to_fit
from sparse_cl.probes.rank import update_rank
from sparse_cl.probes.smearing import smearing
from sparse_cl.report.batches import domain_batches, reference_text, text_batches
from sparse_cl.report.checkpoints import load_checkpoint

RECORDS, BATCH, LENGTH = 64, 16, 256
TAU = 0.1
"""Of Sokar's score, the largest of the three that are usual."""

HUBS = 0.2
"""Share of a layer's neurons that a domain uses most. With a twentieth, base-5m has 6 hubs, too few to say much."""


def runs_in(folders: list[Path]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Method → its folder, and its entry of results.json."""
    found = {}
    for folder in folders:
        for run in json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]:
            found[run["method"]] = (folder / run["method"], run)
    return found


class Bench:
    """The base model, what is compared on it, and what it gives itself."""

    def __init__(self, source: str, data: str, text: str, domains: list[str], seeds: int) -> None:
        self.source, self.seeds = source, range(seeds)
        self.base, tokenizer = load_model(source)
        self.records = domain_batches(
            load_domains(domains, data, 0),
            tokenizer,
            self.base,
            records=RECORDS,
            batch_size=BATCH,
            max_length=LENGTH,
            split="validation",
        )
        self.text = text_batches(tokenizer, reference_text(text), LENGTH, BATCH)
        scores = self.activations(self.base)
        self.hubs = hubs(scores, HUBS)
        self.plasticity = steps_to_fit(self.base, self.seeds)
        self.row = {
            "dormant": self.dormant(scores),
            "hubs": sum(len(index) for index in self.hubs.indices.values()),
            "plasticity": self.plasticity.to_json(),
        }

    def activations(self, model: nn.Module) -> Mapping[str, Any]:
        probe = ActivationProbe(model)
        return {domain: probe.run(batches) for domain, batches in self.records.items()}

    def dormant(self, scores: Mapping[str, Any]) -> Any:
        (found,) = (entry for entry in dormant(scores, (TAU,)).to_json()["dormant"] if entry["tau"] == TAU)
        return found["all domains"]

    def compare(self, folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
        """A method's row, with the records of its probes."""
        model = load_checkpoint(str(folder), load_model(self.source)[0])
        on_text = drift(self.base, model, self.text)
        on_records = {domain: drift(self.base, model, batches) for domain, batches in self.records.items()}
        plasticity: Plasticity = steps_to_fit(model, self.seeds)
        return {
            "learning_accuracy": run["summary"]["learning_accuracy"],
            "forgetting": run["summary"]["forgetting"],
            "reference_before_after": [run["R_reference"][0], run["R_reference"][-1]],
            "drift": on_text.to_json(),
            "drift_on_domains": {
                domain: {name: layer.to_json() for name, layer in found.layers.items()}
                for domain, found in on_records.items()
            },
            "smearing": smearing(self.base, model, self.hubs.indices).to_json(),
            "update_rank": update_rank(self.base, model).to_json(),
            "dormant": self.dormant(self.activations(model)),
            "plasticity": plasticity.to_json(),
        }


def without_lists(record: Any) -> Any:
    """A record without a number for each direction, which would be most of the file."""
    if isinstance(record, dict):
        lists = ("spectrum", "cosines", "displacements")
        return {key: without_lists(value) for key, value in record.items() if key not in lists}
    return record


def over_layers(row: Mapping[str, Any], key: str) -> tuple[float, list[float]]:
    """Mean over layers on the reference text, and the same of each half of it."""
    layers = list(row["drift"]["layers"].values())
    return mean(layer[key] for layer in layers), [mean(layer["halves"][i][key] for layer in layers) for i in (0, 1)]


def summary(method: str, row: Mapping[str, Any]) -> list[str]:
    """A line of the table."""
    cka, halves = over_layers(row, "cka")
    low, high = sorted(1 - half for half in halves)
    spread = [mlp["share90"] for mlp in row["smearing"]["mlps"].values() if mlp["share90"] is not None]
    shares = [hub for hub in row["smearing"]["hubs"].values() if hub["hubs"] and hub["share_of_energy"] is not None]
    ranks = [mean(x["effective_rank"] for x in row["drift"][w]["layers"].values()) for w in ("before", "after")]
    updates = [x for x in row["update_rank"]["weights"].values() if x["effective_rank"] > 0]
    domains = [mean(1 - x["cka"] for x in found.values()) for found in row["drift_on_domains"].values()]
    return [
        method,
        f"{row['learning_accuracy']:.2f}",
        f"{row['forgetting']:.2f}",
        f"{1 - cka:.3f} ({low:.3f}–{high:.3f})",
        f"{mean(domains):.3f}",
        f"{over_layers(row, 'overlap')[0]:.2f}",
        f"{over_layers(row, 'displacement')[0]:.2f}",
        f"{mean(spread):.3f}",
        f"{mean(x['share_of_energy'] / x['share_of_neurons'] for x in shares):.2f}",
        f"{mean(x['effective_rank'] / x['gaussian_effective_rank'] for x in updates):.2f}",
        f"{ranks[1] - ranks[0]:+.1f}",
        f"{row['dormant']['share']:.2%}",
        steps(row["plasticity"]),
    ]


def steps(plasticity: Mapping[str, Any]) -> str:
    """Median and range of the steps to fit."""
    low, high = (x if x is not None else f">{plasticity['max_steps']}" for x in plasticity["range_steps"])
    middle = plasticity["median_steps"]
    return f"{f'{middle:g}' if middle is not None else 'never'} ({low}–{high})"


HEADER = (
    "method",
    "learning acc.",
    "forgetting",
    "1 − CKA, text (halves)",
    "records",
    "span kept",
    "displaced",
    "90 % in",
    "hubs ×",
    "update rank",
    "feature rank",
    "dormant",
    "steps to fit",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seeds", type=int, default=5, help="random tasks for plasticity (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    quiet()
    found = runs_in(arguments.runs)
    domains = next(iter(found.values()))[1]["domains"]
    bench = Bench(arguments.model, arguments.data, arguments.text, domains, arguments.seeds)
    rows = {method: bench.compare(*one) for method, one in tqdm(found.items(), desc="methods")}
    first = next(iter(rows.values()))["drift"]["layers"].values()
    base = bench.row
    print(text_table(HEADER, [summary(method, row) for method, row in rows.items()]))
    print(
        f"\nBase: dormant {base['dormant']['share']:.2%}, steps to fit {steps(base['plasticity'])}, {base['hubs']} hubs"
        f". Span kept: chance {mean(x['null_overlap'] for x in first):.3f}, two halves of the text "
        f"{mean(x['ceiling_overlap'] for x in first):.2f}. 90 % in: .9 if even. Hubs ×: energy over their share of the "
        "neurons, 1 if not preferred. Update rank: effective rank over that of random updates. Feature rank: change of "
        "the effective rank of the hidden states. Dormant: τ = 0.1, on all domains."
    )
    if arguments.out:
        facts = {
            "model": Path(arguments.model).name,
            "text": Path(arguments.text).name,
            "domains": domains,
            "records": RECORDS,
            "max_length": LENGTH,
            "torch": torch.__version__,
        }
        write_json(arguments.out, without_lists({"settings": facts, "base": base, "methods": rows}))


if __name__ == "__main__":
    main()
