"""Choose each method's default learning rate: the same values for every method, scored on validation, never on test.

    python benchmarks/tune_four_domains.py [--model M --data D] [--lr 1e-3,2e-3] [--method adamw,lora]

The choice is by learning accuracy, mean_j R[j][j] in bits per byte: what a user sees who tunes for the domain at hand
and does not know the next one. Of the values within 5 % of the best the smallest is taken. Forgetting is printed beside
it and takes no part in the choice.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.data import load_domains
from sparse_cl.four_domains.embedded_model import embedded_model_folder
from sparse_cl.four_domains.metrics import summarize
from sparse_cl.four_domains.sequence import Progress, matrix, run_sequence, score_all
from sparse_cl.four_domains.settings import Settings
from sparse_cl.methods import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default=",".join(METHODS))
    parser.add_argument("--lr", default="5e-4,1e-3,2e-3,4e-3,8e-3,16e-3")
    arguments = parser.parse_args()

    experiment.quiet()
    source = arguments.model or str(embedded_model_folder())
    for method in arguments.method.split(","):
        for lr in map(float, arguments.lr.split(",")):
            settings = Settings(
                model=arguments.model,
                data=arguments.data,
                steps=arguments.steps,
                seed=arguments.seed,
                methods=(method,),
                lr={method: lr},
            )
            domains = load_domains(settings.domains, settings.data, settings.seed)
            model, tokenizer = experiment.load_model(source)
            base = score_all(model, tokenizer, domains, None, settings, split="validation")
            progress = Progress([base])
            with tempfile.TemporaryDirectory() as folder:
                run_sequence(
                    METHODS[method](),
                    model,
                    tokenizer,
                    domains,
                    None,
                    settings,
                    Path(folder),
                    progress,
                    split="validation",
                )
            R = matrix(progress.stages, "bits_per_byte")
            summary = summarize(R, lower_is_better=True)
            print(
                f"{method:14} lr {lr:<8g} learning accuracy {summary['learning_accuracy']:.4f} "
                f"forgetting {summary['forgetting']:.4f} acc {summary['acc']:.4f} bits/byte",
                flush=True,
            )


if __name__ == "__main__":
    main()
