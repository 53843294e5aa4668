"""`sparse-cl probe`: a model in, a report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.four_domains.domains import Domain, check_domains, load_domains
from sparse_cl.four_domains.embedded_model import embedded_model_folder
from sparse_cl.models.loading import load_model, load_tokenizer, quiet, versions

from .batches import domain_batches
from .html import write_folder
from .probe import probe_model, sections
from .settings import ProbeSettings, check_out


def probe_study(settings: ProbeSettings, out: Path, domains: Sequence[Domain] | None = None) -> list[str]:
    """Probes the model of `settings` and writes into `out`; the sentences of the report, and where it is.

    Args:
        domains: as `load_domains` reads them for `settings`; None: they are read here.

    Raises:
        ValueError, DataError: bad input; the message says what to do.
    """
    if len(settings.models) > 1:
        raise ValueError(
            f"--model: expected one, got {len(settings.models)}; several are compared by `python -m benchmarks.arena "
            "scale`, in a checkout of sparse_cl"
        )
    quiet()
    check_out(out)
    if domains is None:
        domains = load_domains(settings.domains, settings.data, settings.seed, settings.columns)
    source = settings.models[0] if settings.models else str(embedded_model_folder())
    name = Path(source).name if settings.models else "embedded"
    check_domains(domains, *load_tokenizer(source), settings.max_length)
    model, tokenizer = load_model(source, getattr(torch, settings.dtype))
    _, sentences = study_model(model, tokenizer, name, domains, settings, out)
    return [*sentences, f"Written to {out}: report.html, results.json, tensors and activations"]


def study_model(
    model: nn.Module, tokenizer: Any, name: str, domains: Sequence[Domain], settings: ProbeSettings, out: Path
) -> tuple[dict[str, Any], list[str]]:
    """Probes one model and writes into the new folder `out`; the record, and the report's sentences.

    The folder holds `results.json`, `activation-<domain>.safetensors` (for `ActivationScores.load`),
    `tensors.safetensors` and `report.html`.
    """
    sizes: dict[str, Any] = {key: getattr(settings, key) for key in ("records", "batch_size", "max_length")}
    probed = probe_model(model, domain_batches(domains, tokenizer, model, **sizes), settings)
    record = {"model": name, "settings": asdict(settings), "versions": versions(), **probed.record}
    parts = sections(record)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"model": f"{name}, {parameters / 1e6:,.1f} M parameters", **facts_of(settings, domains)}
    out.mkdir(parents=True, exist_ok=True)
    for domain, scores in probed.activations.items():
        scores.save(out / f"activation-{domain}.safetensors")
    write_folder(out, f"What domains use of {name}", facts, parts, record, probed.tensors, "probe")
    return record, [part.sentence for part in parts]


def facts_of(settings: ProbeSettings, domains: Sequence[Domain]) -> dict[str, str]:
    """What a report says at its top: data, tokens, dtype, versions."""
    records = ", ".join(f"{domain.name} {min(settings.records, len(domain.train))}" for domain in domains)
    return {
        "data": settings.data or "embedded",
        "training records": records,
        "tokens that count": f"those of the answers, of at most {settings.max_length} tokens a record",
        "dtype of the weights": settings.dtype,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
