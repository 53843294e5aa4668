"""Choose each method's default settings on validation, never on test, with the same number of settings for each.

    python -m benchmarks.arena.tune_four_domains [--model M --data D] [--lr 1e-3,2e-3] [--method adamw,lora]
    python -m benchmarks.arena.tune_four_domains --method orthogonal --lr 2e-3,4e-3 --energy 0.9,0.95 --source inputs

A method that takes --energy and --source runs every combination of them with the learning rates; the other methods run
the learning rates alone. Learning rates are chosen by learning accuracy, mean_j R[j][j] in bits per byte: what a user
sees who tunes for the domain at hand and does not know the next one. Of the values within 5 % of the best the smallest
is taken. Forgetting is printed beside it and takes no part in that choice. Energy and source exist for the sake of the
earlier domains, so they are chosen by acc, the mean of the last row.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from pathlib import Path

from sparse_cl.methods import METHODS

from .compare_methods import attempt


def _grid(method: str, energies: list[float], sources: list[str]) -> list[dict]:
    """The combinations of options to run a method with; one, empty, where it takes none or none is given."""
    values = {name: given for name, given in (("energy", energies), ("source", sources)) if given}
    values = {name: given for name, given in values.items() if name in METHODS[method].options}
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--eval-records", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default=",".join(METHODS))
    parser.add_argument("--lr", default="5e-4,1e-3,2e-3,4e-3,8e-3,16e-3")
    parser.add_argument("--energy", default="")
    parser.add_argument("--source", default="")
    arguments = parser.parse_args()
    energies = [float(value) for value in arguments.energy.split(",") if value]
    sources = [value for value in arguments.source.split(",") if value]

    # Which layers have little room left is in the records of a run, not of interest here.
    warnings.filterwarnings("ignore", message=".*gradient survives")
    common = {name: getattr(arguments, name) for name in ("model", "data", "steps", "eval_records", "seed")}
    common["protect"] = None
    for method in arguments.method.split(","):
        for lr, options in itertools.product(map(float, arguments.lr.split(",")), _grid(method, energies, sources)):
            with tempfile.TemporaryDirectory() as folder:
                summary = attempt(common, method, {"lr": lr, "options": options}, Path(folder))
            chosen = "".join(f" {name} {value}" for name, value in options.items())
            scores = ("learning_accuracy", "forgetting", "acc")
            words = [f"{score.replace('_', ' ')} {summary[score]:.4f}" for score in scores] if summary else ["failed"]
            print(f"{method:15} lr {lr:<8g}{chosen} {' '.join(words)} bits/byte", flush=True)


if __name__ == "__main__":
    main()
