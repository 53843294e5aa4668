"""The command `sparse-cl run`, and its options for those that make several runs."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_cl.arguments import add_options, chosen, names, option

from .domains import load_domains, show_domains
from .files import RESULTS
from .folder import check_folder
from .method_options import parse_set
from .settings import Settings, methods_named

OWN = "settings of the methods"
SEVERAL = "several runs, and means over them: `python -m benchmarks.arena sweep`, in a checkout of sparse_cl"


@dataclass(frozen=True)
class Common:
    """Options that several methods take, `Settings.options`."""

    energy: float | None = option(
        None,
        "share of a domain's energy that each layer's protected directions explain, in (0, 1]; more protects more and "
        "leaves less to learn with (default: each method's own, 0.95 and 0.99)",
        group=OWN,
        metavar="X",
    )
    source: Literal["inputs", "gradients"] | None = option(
        None, "whose energy: the layers' inputs' or their gradients' (default: inputs)", group=OWN
    )
    max_rank: int | None = option(
        None,
        "most directions that are kept of a layer (default: each method's own); wide models need it: without a limit "
        "observing takes 4 n² bytes for a layer of n inputs",
        least=1,
        group=OWN,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class Run(Common):
    """Options of the command that are not fields of `Settings` as they stand."""

    out: Path = option(MISSING, "new folder for the results", metavar="DIR")
    method: tuple[str, ...] = option(("all",), "methods to run", metavar="NAME[,NAME…]|all|ours|baselines|bounds")
    order: tuple[str, ...] = option(
        ("given",), "given, reverse, or domains with + between them, as medical+code", metavar="ORDER"
    )
    seed: tuple[int, ...] = option((0,), "of everything random", metavar="N")
    lr: str | None = option(
        None,
        "peak learning rate (default: each method's own, chosen on the embedded model; large models want smaller)",
        metavar="X|METHOD=X,…",
    )
    set: Sequence[str] | None = option(
        None,
        "an option of one method, as orthogonal.energy=0.9; may be repeated, and goes before the others",
        group=OWN,
        action="append",
        metavar="METHOD.OPTION=VALUE",
    )
    probe: bool = option(
        False, "also probe the model before and after each method's domains, and how far it drifted: OUT/probes"
    )


def add_parser(commands: Any, probe: Callable[[Settings, Path], Sequence[str]]) -> None:
    """Adds `run` to argparse's subparsers.

    Args:
        probe: what `--probe` calls with the settings and the folder of the finished run; lines to print.
    """
    parser = commands.add_parser(
        "run",
        help="learn domains one after another and measure forgetting",
        description="Learn domains one after another by each method, score every domain after each, and compare. "
        "Without --model and --data everything is generated and pretrained here; nothing is downloaded. A run that was "
        f"stopped goes on with the same command. For {SEVERAL}.",
    )
    add_run_options(parser)
    parser.add_argument(
        "--show-data",
        action="store_true",
        help="show what was read, and examples token by token as they are learned; then stop",
    )
    parser.set_defaults(command=functools.partial(_run, probe=probe), resumes=True)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `settings_of` reads."""
    add_options(parser, Run)
    add_options(parser, Settings)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that were given; the order of the domains and the seed are not among them.

    Raises:
        ValueError: they cannot be used; the message says what to do.
    """
    methods = methods_named(arguments.method)
    common = {name: value for name, value in vars(chosen(Common, arguments)).items() if value is not None}
    own = {"methods": methods, "lr": _parse_lr(arguments.lr, methods), "seed": 0}
    return chosen(Settings, arguments, **own, options=common, method_options=parse_set(arguments.set or ()))


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


def _run(arguments: argparse.Namespace, probe: Callable[[Settings, Path], Sequence[str]]) -> int:
    for name in ("order", "seed"):
        if len(given := getattr(arguments, name)) != 1:
            raise ValueError(f"--{name} {','.join(map(str, given))}: a run has one {name}. For {SEVERAL}")
    settings = settings_of(arguments).arranged(arguments.order[0], arguments.seed[0])
    check_folder(arguments.out, settings)
    domains = None
    if arguments.show_data or not (arguments.out / RESULTS).is_file():
        domains = load_domains(settings.domains, settings.data, settings.seed, settings.columns)
    if arguments.show_data:
        print(show_domains(domains or (), settings.model, settings.max_length))
        return 0
    # transformers and its kin take seconds to import: not for --help, a mistyped option, or data that cannot be used.
    from . import experiment
    from .report import comparison
    from .results import completed

    records = experiment.run(settings, arguments.out, domains)
    failed = len(records) > len(completed(records))
    if not experiment.is_main_process():
        return int(failed)
    print(comparison(records))
    files = ["results.json", "costs.json", "comparison.txt"]
    pictures = sorted(path.name for path in arguments.out.glob("*.png"))
    print(f"\nWritten to {arguments.out}: {', '.join([*files, *pictures])}", flush=True)
    if arguments.probe and failed:
        print("Nothing was probed, since a method failed.")
    elif arguments.probe:
        print(*probe(settings, arguments.out), sep="\n")
    return int(failed)
