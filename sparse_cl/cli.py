"""The command line: `sparse-cl <command>`, also `python -m sparse_cl <command>`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .arguments import names, positive
from .planner import command as planner
from .studies import command as studies

OPTIONS = ("energy", "source", "max_rank")
"""Arguments that set what is a method's own, `Method.options`."""


def _parse_lr(text: str | None, methods: Sequence[str]) -> dict[str, float]:
    """`X` for every method, or `METHOD=X,METHOD=X`."""
    if text is None:
        return {}
    try:
        if "=" not in text:
            return dict.fromkeys(methods, float(text))
        return {name: float(value) for name, value in (part.split("=") for part in names(text))}
    except ValueError as error:
        raise ValueError(f"--lr {text}: expected a number, or METHOD=NUMBER[,METHOD=NUMBER…]") from error


def _add_run(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        help="learn domains one after another and measure forgetting",
        description="Learn domains one after another by each method, score every domain after each, and compare. "
        "Without --model and --data everything is generated and pretrained here; nothing is downloaded.",
    )
    parser.add_argument("--model", metavar="PATH_OR_HUB_NAME", help="causal language model (default: embedded)")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of <domain>.{train,test,eval}.jsonl, or a data set of the Hub with a configuration a domain "
        "(default: embedded)",
    )
    parser.add_argument(
        "--domains",
        type=names,
        metavar="NAME[,NAME…]",
        default=("code", "math", "medical", "general"),
        help="in training order; NAME=DATASET[:CONFIG] takes one from the Hub (default: code,math,medical,general)",
    )
    parser.add_argument("--method", default="all", metavar="NAME[,NAME…]|all", help="(default: %(default)s)")
    parser.add_argument("--reference", metavar="FILE.txt", help="plain text the base model knows, scored as well")
    parser.add_argument("--steps", type=positive, default=150, help="a domain (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help="a device (default: %(default)s)")
    parser.add_argument("--max-length", type=positive, default=256, help="in tokens (default: %(default)s)")
    parser.add_argument(
        "--lr",
        metavar="X|METHOD=X,…",
        help="peak learning rate (default: each method's own, chosen on the embedded model; large models want smaller)",
    )
    orthogonal = parser.add_argument_group("settings of the orthogonal methods")
    orthogonal.add_argument(
        "--energy",
        type=float,
        metavar="X",
        help="share of a domain's energy that each layer's protected directions explain, in (0, 1]; more protects more "
        "and leaves less to learn with (default: each method's own, 0.95 and 0.99)",
    )
    orthogonal.add_argument(
        "--source",
        choices=("inputs", "gradients"),
        help="whose energy: the layers' inputs' or their gradients' (default: inputs)",
    )
    orthogonal.add_argument(
        "--max-rank",
        type=positive,
        metavar="N",
        help="most directions that a domain adds to a layer; wide models need it: without a limit "
        "observing takes 4 n² bytes for a layer of n inputs",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--eval-records",
        type=positive,
        default=64,
        help="scored of each kind and domain: test, choices, answers (default: %(default)s)",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="also probe the model before and after each method's domains, and how far it drifted: OUT/probes",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the results")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    # transformers and its kin take seconds to import: not for --help or a mistyped option.
    from .four_domains import experiment
    from .four_domains.report import comparison
    from .four_domains.settings import Settings
    from .methods import METHODS

    methods = tuple(METHODS) if arguments.method == "all" else names(arguments.method)
    settings = Settings(
        model=arguments.model,
        data=arguments.data,
        domains=arguments.domains,
        methods=methods,
        reference=arguments.reference,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        lr=_parse_lr(arguments.lr, methods),
        seed=arguments.seed,
        eval_records=arguments.eval_records,
        options={name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None},
    )
    runs = experiment.run(settings, arguments.out, finished=arguments.probe)
    if not experiment.is_main_process():
        return
    print(comparison(runs))
    pictures = sorted(path.name for path in arguments.out.glob("*.png"))
    print(f"\nWritten to {arguments.out}: results.json, comparison.txt, {', '.join(pictures)}", flush=True)
    if arguments.probe:
        from .studies.around import probe_run

        for line in probe_run(settings, arguments.out):
            print(line)


def _tell(message: Warning | str, *_: object) -> None:
    """Beside progress bars, and without the line of code that a reader of warnings does not know."""
    from tqdm.auto import tqdm

    tqdm.write(f"Warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, or 2 for input that cannot be used (the reason goes to stderr)."""
    parser = argparse.ArgumentParser(prog="sparse-cl", description="Continual learning in the room that is free.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    studies.add_parsers(commands)
    planner.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell
            arguments.command(arguments)
    except (ValueError, OSError) as error:
        print(f"sparse-cl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparse-cl: interrupted; the same command goes on after the last finished domain", file=sys.stderr)
        return 130
    return 0
