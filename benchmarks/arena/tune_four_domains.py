"""Choose each method's default settings on validation, never on test, with the same number of settings for each.

    python benchmarks/tune_four_domains.py [--model M --data D] [--lr 1e-3,2e-3] [--method adamw,lora]
    python benchmarks/tune_four_domains.py --method orthogonal --lr 2e-3,4e-3 --energy 0.8,0.9,0.95 --source inputs

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

from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.data import load_domains
from sparse_cl.four_domains.embedded_model import embedded_model_folder
from sparse_cl.four_domains.metrics import summarize
from sparse_cl.four_domains.sequence import Progress, matrix, run_sequence, score_all
from sparse_cl.four_domains.settings import Settings
from sparse_cl.methods import METHODS


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

    experiment.quiet()
    # The bars go on; which layers have little room left is in the records of a run, not of interest here.
    warnings.filterwarnings("ignore", message=".*gradient survives")
    source = arguments.model or str(embedded_model_folder())
    base = None
    for method in arguments.method.split(","):
        for lr, options in itertools.product(map(float, arguments.lr.split(",")), _grid(method, energies, sources)):
            settings = Settings(
                model=arguments.model,
                data=arguments.data,
                steps=arguments.steps,
                eval_records=arguments.eval_records,
                seed=arguments.seed,
                methods=(method,),
                lr={method: lr},
                options=options,
                split="validation",
            )
            domains = load_domains(settings.domains, settings.data, settings.seed)
            model, tokenizer = experiment.load_model(source)
            base = base or score_all(model, tokenizer, domains, None, settings)
            progress = Progress([base])
            with tempfile.TemporaryDirectory() as folder:
                run_sequence(
                    settings.make_method(method),
                    model,
                    tokenizer,
                    domains,
                    None,
                    settings,
                    Path(folder),
                    progress,
                )
            R = matrix(progress.stages, "bits_per_byte")
            summary = summarize(R, lower_is_better=True)
            chosen = "".join(f" {name} {value}" for name, value in options.items())
            print(
                f"{method:15} lr {lr:<8g}{chosen} learning accuracy {summary['learning_accuracy']:.4f} "
                f"forgetting {summary['forgetting']:.4f} acc {summary['acc']:.4f} bits/byte",
                flush=True,
            )


if __name__ == "__main__":
    main()
