"""The commands `sparse-cl probe` and `sparse-cl drift`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from sparse_cl.arguments import add_options, chosen
from sparse_cl.four_domains.domains import DEFAULT_DOMAINS

from .settings import DriftSettings, Out, ProbeSettings


def add_parsers(commands: Any) -> None:
    """Adds both to argparse's subparsers."""
    probe = commands.add_parser(
        "probe",
        help="measure what domains use of a model, what they share, and what is free",
        description="Measure what each domain uses of a model, what domains share, and what is free, with the null, "
        "the ceiling and an interval beside each number. Nothing is trained.",
    )
    drift = commands.add_parser(
        "drift",
        help="compare two checkpoints: hidden states, weights, losses between them",
        description="Compare two checkpoints of one model on a fixed reference text: how far hidden states and weights "
        "moved and, with --data, what the domains' losses are on the way. AFTER may be a model, an adapter of PEFT for "
        "BEFORE, or a method's folder of `sparse-cl run`.",
    )
    for parser, settings, command in ((probe, ProbeSettings, _probe), (drift, DriftSettings, _drift)):
        add_options(parser, settings)
        add_options(parser, Out)
        parser.set_defaults(command=command)


def _probe(arguments: argparse.Namespace) -> None:
    # transformers and its kin take seconds to import: not for --help or a mistyped option.
    from .probe_study import probe_study

    print(*probe_study(chosen(ProbeSettings, arguments, models=tuple(arguments.models)), arguments.out), sep="\n")


def _drift(arguments: argparse.Namespace) -> None:
    from .drift import drift_study, sections

    settings = chosen(DriftSettings, arguments)
    if settings.data is not None and not settings.domains:
        settings = replace(settings, domains=DEFAULT_DOMAINS)
    for section in sections(drift_study(settings, arguments.out)):
        print(section.sentence)
    print(f"Written to {arguments.out}: report.html, results.json, tensors.safetensors")
