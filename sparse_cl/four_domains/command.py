"""The commands `sparse-cl run` and `sparse-cl compare`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_cl.arguments import names, positive

OPTIONS = ("energy", "source", "max_rank")
"""Arguments that set what is a method's own, `Method.options`."""


def add_parsers(commands: Any, probe: Callable[[Any, Path], Sequence[str]]) -> None:
    """Adds both to argparse's subparsers.

    Args:
        probe: what `run --probe` calls with the settings and the folder of each finished run; lines to print.
    """
    _add_run(commands, probe)
    _add_compare(commands)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers, N[,N…], got {text!r}") from error


def _parse_lr(text: str | None, methods: Sequence[str]) -> dict[str, float]:
    """`X` for every method, or `METHOD=X,METHOD=X`."""
    if text is None:
        return {}
    try:
        if "=" not in text:
            return dict.fromkeys(methods, float(text))
        rates = {name: float(value) for name, value in (part.split("=") for part in names(text))}
    except ValueError as error:
        raise ValueError(f"--lr {text}: expected a number, or METHOD=NUMBER[,METHOD=NUMBER…]") from error
    if absent := [name for name in rates if name not in methods]:
        raise ValueError(f"--lr {text}: this run has no {', '.join(absent)}; its methods are {', '.join(methods)}")
    return rates


def _add_run(commands: Any, probe: Callable[[Any, Path], Sequence[str]]) -> None:
    parser = commands.add_parser(
        "run",
        help="learn domains one after another and measure forgetting",
        description="Learn domains one after another by each method, score every domain after each, and compare. "
        "Without --model and --data everything is generated and pretrained here; nothing is downloaded. A run that was "
        "stopped goes on with the same command.",
    )
    _add_what_is_learned(parser)
    _add_training(parser)
    _add_scoring(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the results")
    parser.set_defaults(command=functools.partial(_run, probe=probe))


def _add_what_is_learned(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--order",
        type=names,
        metavar="ORDER[,ORDER…]",
        default=("given",),
        help="given, reverse, or domains with + between them, as medical+code; several make a run each and compare "
        "them (default: given)",
    )
    parser.add_argument(
        "--seed",
        type=_whole_numbers,
        metavar="N[,N…]",
        default=(0,),
        help="several make a run each, OUT/<order>-seed<N>, and compare them (default: 0)",
    )
    parser.add_argument(
        "--method",
        type=names,
        default=("all",),
        metavar="NAME[,NAME…]|all|ours|baselines|bounds",
        help="(default: all)",
    )
    parser.add_argument(
        "--protect",
        metavar="FILE.txt|embedded",
        help="plain text whose knowledge the methods that protect are to keep; not the text that is scored. The others "
        "run without it, and the report says so",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive, default=150, help="a domain (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help="a device (default: %(default)s)")
    parser.add_argument("--max-length", type=positive, default=256, help="in tokens (default: %(default)s)")
    parser.add_argument(
        "--lr",
        metavar="X|METHOD=X,…",
        help="peak learning rate (default: each method's own, chosen on the embedded model; large models want smaller)",
    )
    parser.add_argument(
        "--autocast", choices=("bf16",), help="train under autocast; scoring stays in float32 (default: off)"
    )
    own = parser.add_argument_group("settings of the methods")
    own.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="METHOD.OPTION=VALUE",
        help="an option of one method, as orthogonal.energy=0.9; may be repeated, and goes before those below",
    )
    own.add_argument(
        "--energy",
        type=float,
        metavar="X",
        help="share of a domain's energy that each layer's protected directions explain, in (0, 1]; more protects more "
        "and leaves less to learn with (default: each method's own, 0.95 and 0.99)",
    )
    own.add_argument(
        "--source",
        choices=("inputs", "gradients"),
        help="whose energy: the layers' inputs' or their gradients' (default: inputs)",
    )
    own.add_argument(
        "--max-rank",
        type=positive,
        metavar="N",
        help="most directions that a domain adds to a layer; wide models need it: without a limit "
        "observing takes 4 n² bytes for a layer of n inputs",
    )


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", metavar="FILE.txt", help="plain text the base model knows, scored as well")
    parser.add_argument(
        "--eval-records",
        type=positive,
        default=64,
        help="scored of each kind and domain: test, choices, answers (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="records that are scored; validation (bits per byte alone) to choose settings by (default: %(default)s)",
    )
    parser.add_argument(
        "--metrics",
        type=names,
        metavar="NAME[,NAME…]",
        default=("bits_per_byte", "accuracy", "exact_match"),
        help="to leave out slow ones; bits_per_byte always (default: bits_per_byte,accuracy,exact_match)",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="also probe the model before and after each method's domains, and how far it drifted: OUT/probes",
    )


def _run(arguments: argparse.Namespace, probe: Callable[[Any, Path], Sequence[str]]) -> int:
    # transformers and its kin take seconds to import: not for --help or a mistyped option.
    from benchmarks.arena.sweep import run_all, runs_of

    from .experiment import is_main_process
    from .method_options import parse_set
    from .report import comparison
    from .results import completed
    from .settings import Settings, methods_named

    methods = methods_named(arguments.method)
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
        eval_records=arguments.eval_records,
        options={name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None},
        method_options=parse_set(arguments.set),
        autocast=arguments.autocast,
        split=arguments.split,
        protect=arguments.protect,
        metrics=arguments.metrics,
    )
    runs = runs_of(settings, arguments.order, arguments.seed, arguments.out)
    records, compared = run_all(runs, arguments.out)
    failed = len(records) > len(completed(records))
    if not is_main_process():
        return int(failed)
    several = len(runs) > 1
    print(compared if several and compared else comparison(records))
    pictures = sorted(path.name for path in arguments.out.glob("*.png"))
    files = ["compare.txt", "compare.json"] if several else ["results.json", "costs.json", "comparison.txt"]
    folders = f"; and a folder for each of {len(runs)} runs" if several else ""
    print(f"\nWritten to {arguments.out}: {', '.join([*files, *pictures])}{folders}", flush=True)
    if arguments.probe and failed:
        print("Nothing was probed, since a method failed.")
    elif arguments.probe:
        for folder, chosen in runs.items():
            for line in probe(chosen, folder):
                print(line)
    return int(failed)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="many runs in one table, with means and intervals over seeds",
        description="Read the results of sparse-cl run in and under the folders, and make one table and one picture: "
        "means and 95 % intervals over seeds, a row for each method and its settings, orders apart and together.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="outputs of sparse-cl run, or above them")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for compare.txt, compare.json and pareto.png (default: the first DIR)"
    )
    parser.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from benchmarks.arena.compare_report import compare

    out = arguments.out or arguments.folders[0]
    print(compare(arguments.folders, out))
    print(f"\nWritten to {out}: compare.txt, compare.json, pareto.png", flush=True)
