"""Whether what is forgotten lies on features that domains share, and how far features share dimensions.

    python -m benchmarks.arena.shared_features --model BASE --data DIR RUN [--out FILE.json]

RUN: the output of `sparse-cl run` on that model. For each method and each two domains that follow one another: of what
the outputs of every layer moved on the first domain's records while the second was learned, the share that came through
directions that the second uses, beside the share of the inputs' energy there (what a change in random directions would
have). And the feature dimensionality of neurons and of the domains' mean inputs, before all and after all. Records are
those of validation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.four_domains.domains import load_domains
from sparse_cl.four_domains.files import write_json
from sparse_cl.models.loading import load_model, quiet
from sparse_cl.models.passes import Watch, stream
from sparse_cl.probes.inputs import InputProbe
from sparse_cl.probes.result import plain
from sparse_cl.probes.shared_forgetting import shared_forgetting
from sparse_cl.probes.superposition import feature_dimensionality, random_dimensionality, superposition
from sparse_cl.report.batches import domain_batches
from sparse_cl.report.checkpoints import load_checkpoint

RECORDS, BATCH, LENGTH = 64, 16, 256


def mean_inputs(model: nn.Module, batches: Iterable[Any], names: Iterable[str]) -> dict[str, Tensor]:
    """The mean of what enters each layer: (n,) float64, by name."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Watch:
        def see(rows: Tensor, sequences: Tensor) -> None:
            sums[name] = sums.get(name, 0.0) + rows.double().sum(0)

        return Watch(name, model.get_submodule(name), "input", see)

    tokens = stream(model, [watch(name) for name in names], batches, tokens="answers")
    return {name: total / tokens for name, total in sums.items()}


def features(model: nn.Module, records: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Means over MLPs of their neurons' dimensionality, and over inputs of that of the domains' means; with nulls."""
    mlps = superposition(model).values()
    means = [mean_inputs(model, batches, names) for batches in records.values()]
    stacks = [torch.stack([of[name] for of in means]) for name in names]
    return {
        "neurons": fmean(one.mean for one in mlps),
        "neurons_null": fmean(one.null for one in mlps),
        "domains": fmean(float(feature_dimensionality(x).mean()) for x in stacks),
        "domains_null": fmean(float(random_dimensionality(x).mean()) for x in stacks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    quiet()
    runs = json.loads((arguments.run / "results.json").read_text(encoding="utf-8"))["runs"]
    base, tokenizer = load_model(arguments.model)
    names: list[str] = runs[0]["domains"]
    records = domain_batches(
        load_domains(names, arguments.data, 0),
        tokenizer,
        base,
        records=RECORDS,
        batch_size=BATCH,
        max_length=LENGTH,
        split="validation",
    )
    inputs = list(InputProbe(base).result().layers)
    result: dict[str, Any] = {"model": Path(arguments.model).name, "base": features(base, records, inputs), "runs": []}
    for run in runs:
        stages = [*sorted((arguments.run / run["method"]).glob("[0-9]*-*"))]
        models = [load_checkpoint(str(stage), load_model(arguments.model)[0]) for stage in stages]
        pairs = []
        for (first, second), before, after in zip(
            zip(names, names[1:], strict=False), models, models[1:], strict=False
        ):
            old, new = (InputProbe(before).run(records[name]) for name in (first, second))
            weights = {layer: before.get_submodule(layer).weight for layers in old.layers.values() for layer in layers}
            changes = {layer: after.get_submodule(layer).weight - weight for layer, weight in weights.items()}
            found = shared_forgetting(old, new, changes, weights)
            row = {key: fmean(getattr(one, key) for one in found.values()) for key in ("moved", "shared", "null")}
            pairs.append({"first": first, "second": second, **row, "layers": plain(found)})
            print(f"{run['method']:12} {first} → {second}: " + ", ".join(f"{key} {row[key]:.3f}" for key in row))
        after_all = features(models[-1], records, inputs)
        print(f"{run['method']:12} before", result["base"], "after", after_all)
        result["runs"].append({"method": run["method"], "pairs": pairs, "after": after_all})
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
