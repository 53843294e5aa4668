"""Does energy outside a memory's directions find boundaries that the tokens alone do not, or sooner?

    python -m benchmarks.arena.stream_energy --model MODEL --data DIR [--json FILE]

A memory is made of the base text, as `elastic` protects it. The score is the share of the energy of a layer's inputs
that lies outside the kept directions, the mean of all linear layers, of the model as it is: no training moves it, which
favours the score. Batches are four records of a pool of 160 a domain; 40 trials of the domains in random orders, 60
batches of each, and 3,000 batches of each alone. Where there are several scores they share the false alarms.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sparse_cl.four_domains.domains import DEFAULT_DOMAINS, load_domains
from sparse_cl.four_domains.protection import in_windows
from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.methods import Elastic
from sparse_cl.models.loading import load_model
from sparse_cl.probes.boundaries import BoundaryDetector, Cusum

from .streams import LENGTH, encode

POOL, SIZE, BATCHES, WINDOWS = 160, 4, 60, 64
Pool = Mapping[str, Sequence[tuple[list[int], torch.Tensor]]]


class EnergyAlone(BoundaryDetector):
    """Has no chart of the tokens."""

    def _new_charts(self, names: Collection[str]) -> dict[str, Cusum]:
        return super()._new_charts([name for name in names if name not in ("cost", "excess")])


def energies_of(model: nn.Module, bases: Mapping[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """(layers, 2): the energy of each layer's inputs, and how much of it is along the kept directions."""
    found, handles = [], []

    def note(module: nn.Module, args: Any, basis: torch.Tensor) -> None:
        x = args[0].flatten(0, -2)
        found.append([float(x.square().sum()), float((x @ basis).square().sum())])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (basis := bases.get(f"{name}.weight")) is not None:
            handles.append(module.register_forward_pre_hook(lambda m, a, basis=basis: note(m, a, basis)))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.tensor(found, dtype=torch.float64)


def study(pool: Pool, scores: str, trials: int, alone: int) -> dict[str, Any]:
    def found_by(detector: BoundaryDetector, name: str, draw: random.Random) -> bool:
        rows = [pool[name][draw.randrange(len(pool[name]))] for _ in range(SIZE)]
        tokens = torch.tensor([[token for ids, _ in rows for token in ids]])
        energy = torch.stack([own for _, own in rows]).sum(0)
        outside = float((1 - energy[:, 1] / energy[:, 0]).mean())
        return detector.update(tokens, **({} if scores == "tokens" else {"outside": outside}))

    kind = EnergyAlone if scores == "energy" else BoundaryDetector
    delays, missed, false, quiet = [], 0, 0, 0
    for trial in range(trials):
        draw, detector = random.Random(trial), kind()
        for number, name in enumerate(draw.sample(list(pool), len(pool))):
            found = [i for i in range(BATCHES) if found_by(detector, name, draw)]
            false, quiet = false + len(found) - bool(number and found), quiet + BATCHES
            if number:
                missed, delays = missed + (not found), delays + found[:1]
    for name in pool:
        draw, detector = random.Random(99), kind()
        false, quiet = false + sum(found_by(detector, name, draw) for _ in range(alone)), quiet + alone
    counted = {"boundaries": len(delays) + missed, "missed": missed, "delays": sorted(delays)}
    return {"scores": scores, **counted, "false alarms": false, "batches": quiet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder of base.txt and NAME.train.jsonl of the four domains")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--alone", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="results of `streams`, to which these are added")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_model(given.model)
    method = Elastic()
    text = in_windows(tokenizer, (Path(given.data) / "base.txt").read_text()[:400_000], LENGTH)
    method.protect(model, DomainBatches(text, 8, torch.device("cpu"), WINDOWS))
    memory = method.memory
    assert memory is not None
    subspaces = {name: memory.subspace(name) for name in memory.names}
    bases = {name: found.basis.float() for name, found in subspaces.items() if found is not None}
    pool = {}
    for name, records in encode(load_domains(DEFAULT_DOMAINS, given.data, 0), tokenizer).items():
        items = [records[i]["input_ids"] for i in random.Random(1).sample(range(len(records)), POOL)]
        pool[name] = [(ids, energies_of(model, bases, ids)) for ids in items]
    done = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    done["energy"] = [study(pool, scores, given.trials, given.alone) for scores in ("tokens", "energy", "both")]
    print(json.dumps(done["energy"]))
    if given.json:
        given.json.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
