"""The commands `sparse-cl probe` and `sparse-cl drift`."""

from __future__ import annotations

import argparse
from typing import Any

from sparse_cl.arguments import add_options, chosen
from sparse_cl.four_domains.domains import Domain, load_domains, show_domains

from .settings import DriftSettings, Out, ProbeSettings, check_out


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
    settings = chosen(ProbeSettings, arguments)
    if (domains := _domains(settings, arguments, settings.models[0] if settings.models else None)) is None:
        return
    # transformers and its kin take seconds to import: not for --help, a mistyped option, or data that cannot be used.
    from .probe_study import probe_study

    print(*probe_study(settings, arguments.out, domains), sep="\n")


def _drift(arguments: argparse.Namespace) -> None:
    settings = chosen(DriftSettings, arguments)
    if (domains := _domains(settings, arguments, settings.before)) is None:
        return
    from .drift import drift_study, sections

    for section in sections(drift_study(settings, arguments.out, domains)):
        print(section.sentence)
    print(f"Written to {arguments.out}: report.html, results.json, tensors.safetensors")


def _domains(
    settings: ProbeSettings | DriftSettings, arguments: argparse.Namespace, model: str | None
) -> list[Domain] | None:
    """The domains that are read; None where they were to be shown, and that is all."""
    check_out(arguments.out)
    domains = []
    if settings.domains:
        domains = load_domains(settings.domains, settings.data, settings.seed, settings.columns)
    if not arguments.show_data:
        return domains
    print(show_domains(domains, model, settings.max_length))
    return None
