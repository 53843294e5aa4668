"""`sparse-cl probe`: models in, a report out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl import storage
from sparse_cl.four_domains.data import Domain, load_domains
from sparse_cl.four_domains.embedded_model import embedded_model_folder
from sparse_cl.four_domains.files import write_json
from sparse_cl.models.loading import load_model, quiet, versions

from .batches import domain_batches
from .html import write_report
from .probe import probe_model
from .section import Section
from .sections import activation, capacity, curvature, gradients, neurons, overlap, rank, scale
from .settings import ProbeSettings, check_out
from .summary import summary


def probe_study(settings: ProbeSettings, out: Path) -> list[str]:
    """Probes every model of `settings` and writes into `out`; the sentences of the report, and where it is.

    One model: `results.json`, `activation-<domain>.safetensors` (for `ActivationScores.load`), `tensors.safetensors`
    and `report.html`. Several: a folder of these for each, and a `results.json` and a `report.html` that compare them.

    Raises:
        ValueError, DataError: bad input; the message says what to do.
    """
    quiet()
    check_out(out)
    domains = load_domains(settings.domains, settings.data, settings.seed)
    sources = settings.models or (str(embedded_model_folder()),)
    names = _names(sources if settings.models else ("embedded",))
    if len(sources) == 1:
        record, lines = study_model(*_load(sources[0], settings), names[0], domains, settings, out)
        return [*lines, f"Written to {out}: report.html, results.json, tensors and activations"]
    summaries = []
    for name, source in zip(names, sources, strict=True):
        model, tokenizer = _load(source, settings)
        record, _ = study_model(model, tokenizer, name, domains, settings, out / name)
        summaries.append(summary(name, model, record))
    write_json(out / "results.json", {"settings": settings.to_json(), "models": summaries})
    compared = scale.section(summaries)
    facts = {**_facts(settings, domains), "reports of the models": ", ".join(f"{name}/report.html" for name in names)}
    write_report(out / "report.html", "Models by width", facts, [compared])
    return [compared.sentence, f"Written to {out}: report.html, results.json, and a folder for each model"]


def study_model(
    model: nn.Module, tokenizer: Any, name: str, domains: Sequence[Domain], settings: ProbeSettings, out: Path
) -> tuple[dict[str, Any], list[str]]:
    """Probes one model and writes into the new folder `out`; the record, and the report's sentences."""
    limit = getattr(model.config, "max_position_embeddings", settings.max_length)
    if settings.max_length > limit:
        raise ValueError(f"max_length {settings.max_length} exceeds the context of {name}, {limit} tokens")
    sizes: dict[str, Any] = {
        "records": settings.records,
        "batch_size": settings.batch_size,
        "max_length": settings.max_length,
    }
    batches = domain_batches(domains, tokenizer, model, **sizes)
    probed = probe_model(model, batches, settings)
    record = {"model": name, "settings": settings.to_json(), "versions": versions(), **probed.record}
    parts = sections(record)
    out.mkdir(parents=True, exist_ok=True)
    for domain, scores in probed.activations.items():
        scores.save(out / f"activation-{domain}.safetensors")
    if probed.tensors:
        storage.write(out / "tensors.safetensors", "probe", probed.tensors)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"model": f"{name}, {parameters / 1e6:,.1f} M parameters", **_facts(settings, domains)}
    write_report(out / "report.html", f"What domains use of {name}", facts, parts)
    write_json(out / "results.json", record)
    return record, [part.sentence for part in parts]


def sections(record: Mapping[str, Any]) -> list[Section]:
    """The report's sections, from what a model's results.json holds."""
    found = []
    if "overlap" in record:
        found.append(overlap.section(record["overlap"]))
    if "activation" in record:
        found.append(activation.section(record["activation"], record.get("critical_sparsity")))
        found.append(neurons.section(record["dormant"], record.get("hubs"), record.get("hub_weights")))
    if "cosines" in record:
        found.append(gradients.section(record["cosines"], record["interference"]))
    if "capacity" in record:
        found.append(capacity.section(record["capacity"]))
    if "rank" in record:
        found.append(rank.section(record["rank"]))
    if "curvature" in record:
        found.append(curvature.section(record["curvature"]))
    return found


def _load(source: str, settings: ProbeSettings) -> tuple[nn.Module, Any]:
    return load_model(source, getattr(torch, settings.dtype))


def _names(sources: Sequence[str]) -> list[str]:
    """A short name for each model: the end of its path, with a number where two have the same."""
    ends = [Path(source).name for source in sources]
    return [end if ends.count(end) == 1 else f"{end}-{number}" for number, end in enumerate(ends, 1)]


def _facts(settings: ProbeSettings, domains: Sequence[Domain]) -> dict[str, str]:
    records = ", ".join(f"{domain.name} {min(settings.records, len(domain.train))}" for domain in domains)
    return {
        "data": settings.data or "embedded",
        "training records": records,
        "tokens that count": f"those of the answers, of at most {settings.max_length} tokens a record",
        "dtype of the weights": settings.dtype,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
