"""Two checkpoints in, one report out: how far hidden states, weights and losses moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparse_cl import probes
from sparse_cl.data.checks import check_text
from sparse_cl.four_domains.domains import Domain, check_domains, load_domains
from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.models.loading import load_model, load_tokenizer, quiet
from sparse_cl.models.parts import find_blocks, spread

from .batches import Shown, domain_batches, reference_text, text_batches
from .checkpoints import load_checkpoint
from .html import write_folder
from .section import Section
from .sections import connectivity, drift, plasticity, rank, smearing
from .settings import DriftSettings, check_out

BLOCKS = 16
"""Residual blocks whose hidden states are compared, evenly spread: 48 n² bytes each for a width of n."""

POINTS = 5
"""On the line between the checkpoints, both among them."""

TASKS = 3
"""Random tasks that are fitted for plasticity."""


def drift_study(settings: DriftSettings, out: Path, domains: Sequence[Domain] | None = None) -> dict[str, Any]:
    """Compares two checkpoints, and writes `results.json`, `tensors.safetensors` and `report.html` into `out`.

    Args:
        out: a folder that is absent or empty.
        domains: as `load_domains` reads them for `settings`; None: they are read here.

    Returns:
        What results.json holds.

    Raises:
        ValueError: bad input; the message says what to do. Nothing is written then.
    """
    quiet()
    check_out(out)
    text = reference_text(settings.text)
    if domains is None and settings.domains:
        domains = load_domains(settings.domains, settings.data, settings.seed, settings.columns)
    domains = domains or []
    tokenizer, rows = load_tokenizer(settings.before)
    check_domains(domains, tokenizer, rows, settings.max_length)
    check_text(text, "--text", tokenizer, rows)
    dtype = getattr(torch, settings.dtype)
    before, tokenizer = load_model(settings.before, dtype)
    sizes: dict[str, Any] = {key: getattr(settings, key) for key in ("records", "batch_size", "max_length")}
    by_domain = domain_batches(domains, tokenizer, before, **sizes, split="validation")
    after = load_checkpoint(settings.after, load_model(settings.before, dtype)[0])
    windows = text_batches(tokenizer, text, settings.max_length, settings.batch_size)
    record, tensors = _compare(before, after, windows, by_domain, settings)
    facts = {
        "before": settings.before,
        "after": settings.after,
        "text": settings.text or "embedded",
        "tokens of text": sum(int(batch["attention_mask"].sum()) for batch in windows),
        "data": settings.data or ("embedded" if by_domain else None),
        "domains": list(by_domain),
        "records": settings.records if by_domain else None,
        "max_length": settings.max_length,
        "dtype": settings.dtype,
        "seed": settings.seed,
    }
    record = {"settings": facts, **record}
    told = {name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in facts.items() if value}
    title = f"What changed from {Path(settings.before).name} to {Path(settings.after).name}"
    write_folder(out, title, told, sections(record), record, tensors, "drift")
    return record


def sections(record: Mapping[str, Any]) -> list[Section]:
    """The report's sections, from what results.json holds."""
    found = [drift.section(record["drift"])]
    if "connectivity" in record:
        found.append(connectivity.section(record["connectivity"]))
    found.append(smearing.section(record["smearing"]))
    found.append(rank.section({when: record["drift"][when] for when in ("before", "after")}, record["update_rank"]))
    if "plasticity" in record:
        found.append(plasticity.section(record["plasticity"]))
    return found


def _compare(
    before: nn.Module,
    after: nn.Module,
    windows: Sequence[Any],
    by_domain: Mapping[str, DomainBatches],
    settings: DriftSettings,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The probes' records by name, and all of their tensors."""
    records = sum(len(batches) for batches in by_domain.values())
    # A task is one tick of the bar, as nobody knows how many steps it will take.
    ticks = len(windows) + records * (POINTS + (len(by_domain) > 1)) + 2 * TASKS * settings.plasticity
    with tqdm(total=ticks, mininterval=0.5) as bar:
        blocks = [block.name for block in spread(find_blocks(before), BLOCKS)]
        moved = probes.drift(before, after, Shown(windows, "hidden states", bar), modules=blocks)
        bar.set_description("updates")
        ranks = probes.update_rank(before, after)
        common = None
        if len(by_domain) > 1:
            probe = probes.ActivationProbe(before)
            scores = {domain: probe.run(Shown(own, f"hubs: {domain}", bar)) for domain, own in by_domain.items()}
            common = probes.hubs(scores, seed=settings.seed).indices
        smeared = probes.smearing(before, after, common)
        record = {"drift": moved.to_json(), "update_rank": ranks.to_json(), "smearing": smeared.to_json()}
        if by_domain:
            line = {domain: Shown(own, f"losses: {domain}", bar) for domain, own in by_domain.items()}
            record["connectivity"] = probes.connectivity(before, after, line, POINTS).to_json()
        if settings.plasticity:
            bar.set_description("plasticity")
            seeds = range(settings.seed, settings.seed + TASKS)
            record["plasticity"] = probes.plasticity(before, after, seeds, fitted=bar.update).to_json()
    return record, {**moved.tensors(), **ranks.tensors(), **smeared.tensors()}
