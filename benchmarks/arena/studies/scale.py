"""Several models probed, and compared by width."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from sparse_cl.arguments import chosen
from sparse_cl.four_domains.domains import load_domains
from sparse_cl.four_domains.files import write_json
from sparse_cl.models.loading import load_model, quiet
from sparse_cl.report.html import write_report
from sparse_cl.report.probe_study import facts_of, study_model
from sparse_cl.report.settings import ProbeSettings, check_out

from . import scale_section
from .summary import summary


def scale(arguments: argparse.Namespace) -> None:
    """The command."""
    print(*scale_study(chosen(ProbeSettings, arguments), arguments.out), sep="\n")


def scale_study(settings: ProbeSettings, out: Path) -> list[str]:
    """Probes every model of `settings`, and compares them; what was found, and where it is.

    Into `out` go a folder for each model, as `sparse-cl probe` writes it, and a `results.json` and a `report.html` that
    compare them.

    Raises:
        ValueError, DataError: bad input; the message says what to do.
    """
    if not settings.models:
        raise ValueError("--model: expected at least one, got none")
    quiet()
    check_out(out)
    domains = load_domains(settings.domains, settings.data, settings.seed, settings.columns)
    names, summaries = names_of(settings.models), []
    for name, source in zip(names, settings.models, strict=True):
        model, tokenizer = load_model(source, getattr(torch, settings.dtype))
        record, _ = study_model(model, tokenizer, name, domains, settings, out / name)
        summaries.append(summary(name, model, record))
    write_json(out / "results.json", {"settings": asdict(settings), "models": summaries})
    compared = scale_section.section(summaries)
    reports = ", ".join(f"{name}/report.html" for name in names)
    facts = {**facts_of(settings, domains), "reports of the models": reports}
    write_report(out / "report.html", "Models by width", facts, [compared])
    return [compared.sentence, f"Written to {out}: report.html, results.json, and a folder for each model"]


def names_of(sources: Sequence[str]) -> list[str]:
    """A short name for each model: the end of its path, with a number where two have the same."""
    ends = [Path(source).name for source in sources]
    return [end if ends.count(end) == 1 else f"{end}-{number}" for number, end in enumerate(ends, 1)]
