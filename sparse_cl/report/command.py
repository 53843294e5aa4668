"""The commands `sparse-cl probe` and `sparse-cl drift`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparse_cl.arguments import names, positive

from .settings import PROBES, ProbeSettings

DOMAINS = ("code", "math", "medical", "general")


def add_parsers(commands: Any) -> None:
    """Adds both to argparse's subparsers."""
    _add_probe(commands)
    _add_drift(commands)


def _add_common(parser: argparse.ArgumentParser, default: tuple[str, ...], told: str) -> None:
    parser.add_argument(
        "--domains",
        type=names,
        default=default,
        metavar="NAME[,NAME…]",
        help=f"NAME=DATASET[:CONFIG] takes one from the Hub (default: {told})",
    )
    parser.add_argument("--records", type=positive, default=128, help="of each domain (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help="records a pass (default: %(default)s)")
    parser.add_argument("--max-length", type=positive, default=256, help="in tokens (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the report")


def _add_probe(commands: Any) -> None:
    parser = commands.add_parser(
        "probe",
        help="measure what domains use of a model, what they share, and what is free",
        description="Measure what each domain uses of a model, what domains share, and what is free, with the null, "
        "the ceiling and an interval beside each number. Several models are compared by width. Nothing is trained.",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=(),
        metavar="PATH_OR_HUB_NAME",
        help="causal language models; several make a scale study (default: embedded)",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="as for `sparse-cl run`; training records are used (default: embedded)"
    )
    parser.add_argument(
        "--probes", type=names, default=PROBES, metavar="NAME[,NAME…]", help=f"some of {', '.join(PROBES)}"
    )
    parser.add_argument(
        "--blocks",
        type=positive,
        default=8,
        help="residual blocks, evenly spread, of which gradients, curvature, rank and capacity keep matrices "
        "(default: %(default)s; activations are seen in all)",
    )
    parser.add_argument(
        "--energy", type=float, default=0.95, help="of the inputs, that the directions in use explain (default: 0.95)"
    )
    parser.add_argument(
        "--critical", action="store_true", help="also search the sparsity that raises the loss by 1 %% (slow)"
    )
    _add_common(parser, DOMAINS, ",".join(DOMAINS))
    parser.set_defaults(command=_probe)


def _probe(arguments: argparse.Namespace) -> None:
    # transformers and its kin take seconds to import: not for --help or a mistyped option.
    from .probe_study import probe_study

    settings = ProbeSettings(
        models=tuple(arguments.model),
        data=arguments.data,
        domains=arguments.domains,
        probes=arguments.probes,
        records=arguments.records,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        blocks=arguments.blocks,
        energy=arguments.energy,
        critical=arguments.critical,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    for line in probe_study(settings, arguments.out):
        print(line)


def _add_drift(commands: Any) -> None:
    parser = commands.add_parser(
        "drift",
        help="compare two checkpoints: hidden states, weights, losses between them",
        description="Compare two checkpoints of one model on a fixed reference text: how far hidden states and weights "
        "moved and, with --data, what the domains' losses are on the way. AFTER may be a model, an adapter of PEFT for "
        "BEFORE, or a method's folder of `sparse-cl run`.",
    )
    parser.add_argument("before", metavar="BEFORE", help="folder or Hub name of a causal language model")
    parser.add_argument("after", metavar="AFTER", help="folder of the same model, trained on")
    parser.add_argument("--text", metavar="FILE.txt", help="plain reference text (default: embedded)")
    parser.add_argument("--data", metavar="DIR", help="as for `sparse-cl run`; validation records are used")
    parser.add_argument("--plasticity", action="store_true", help="also fit new random tasks from both (slow)")
    _add_common(parser, (), "with --data code,math,medical,general, else none; embedded ones can be named")
    parser.set_defaults(command=_drift)


def _drift(arguments: argparse.Namespace) -> None:
    from .drift import drift_study, sections

    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    if arguments.data is not None and not arguments.domains:
        given["domains"] = DOMAINS
    for section in sections(drift_study(**given)):
        print(section.sentence)
    print(f"Written to {arguments.out}: report.html, results.json, tensors.safetensors")
