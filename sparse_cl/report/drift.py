"""Two checkpoints in, one report out: how far hidden states, weights and losses moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sparse_cl import storage
from sparse_cl.four_domains.data import load_domains
from sparse_cl.four_domains.files import write_json
from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.models.loading import load_model, quiet
from sparse_cl.models.parts import find_blocks, spread
from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.connectivity import connectivity
from sparse_cl.probes.drift import drift
from sparse_cl.probes.neurons import hubs
from sparse_cl.probes.plasticity import plasticity as probe_plasticity
from sparse_cl.probes.rank import update_rank
from sparse_cl.probes.smearing import smearing

from .batches import Shown, domain_batches
from .checkpoints import load_checkpoint
from .html import write_report
from .section import Section
from .sections import connectivity as connectivity_section
from .sections import drift as drift_section
from .sections import plasticity as plasticity_section
from .sections import rank as rank_section
from .sections import smearing as smearing_section
from .settings import DriftSettings, check_out
from .text import reference_text, text_batches

BLOCKS = 16
"""Residual blocks whose hidden states are compared, evenly spread: 48 n² bytes each for a width of n."""

POINTS = 5
"""On the line between the checkpoints, both among them."""

TASKS = 3
"""Random tasks that are fitted for plasticity."""


def drift_study(settings: DriftSettings, out: Path) -> dict[str, Any]:
    """Compares two checkpoints, and writes `results.json`, `tensors.safetensors` and `report.html` into `out`.

    Args:
        out: a folder that is absent or empty.

    Returns:
        What results.json holds.

    Raises:
        ValueError: bad input; the message says what to do. Nothing is written then.
    """
    quiet()
    check_out(out)
    reference = reference_text(settings.text)
    loaded = load_domains(settings.domains, settings.data, settings.seed) if settings.domains else []
    wanted, length = getattr(torch, settings.dtype), settings.max_length
    model, tokenizer = load_model(settings.before, wanted)
    limit = getattr(model.config, "max_position_embeddings", length)
    if length > limit:
        raise ValueError(f"max_length: expected at most the model's context of {limit} tokens, got {length}")
    other = load_checkpoint(settings.after, load_model(settings.before, wanted)[0])
    sizes: dict[str, Any] = {"records": settings.records, "batch_size": settings.batch_size, "max_length": length}
    by_domain = domain_batches(loaded, tokenizer, model, **sizes, split="validation")
    windows = text_batches(tokenizer, reference, length, settings.batch_size)
    study = _Study(model, other, windows, by_domain, settings.seed)
    with tqdm(total=study.passes(settings.plasticity), mininterval=0.5) as bar:
        record, tensors = study.run(bar, settings.plasticity)
    facts = {
        "before": settings.before,
        "after": settings.after,
        "text": settings.text or "embedded",
        "tokens of text": sum(int(batch["attention_mask"].sum()) for batch in windows),
        "data": settings.data or ("embedded" if by_domain else None),
        "domains": list(by_domain),
        "records": settings.records if by_domain else None,
        "max_length": length,
        "dtype": settings.dtype,
        "seed": settings.seed,
    }
    record = {"settings": facts, **record}
    out.mkdir(parents=True, exist_ok=True)
    storage.write(out / "tensors.safetensors", "drift", tensors)
    write_report(
        out / "report.html",
        f"What changed from {Path(settings.before).name} to {Path(settings.after).name}",
        {name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in facts.items() if value},
        sections(record),
    )
    write_json(out / "results.json", record)
    return record


def sections(record: Mapping[str, Any]) -> list[Section]:
    """The report's sections, from what results.json holds."""
    found = [drift_section.section(record["drift"])]
    if "connectivity" in record:
        found.append(connectivity_section.section(record["connectivity"]))
    found.append(smearing_section.section(record["smearing"]))
    features = {when: record["drift"][when] for when in ("before", "after")}
    found.append(rank_section.section(features, record["update_rank"]))
    if "plasticity" in record:
        found.append(plasticity_section.section(record["plasticity"]))
    return found


class _Study:
    """The probes of two checkpoints, and a bar that counts their batches and steps."""

    def __init__(
        self,
        before: nn.Module,
        after: nn.Module,
        windows: Sequence[Any],
        by_domain: Mapping[str, DomainBatches],
        seed: int,
    ) -> None:
        self.before, self.after, self.windows, self.by_domain, self.seed = before, after, windows, by_domain, seed

    def passes(self, plasticity: bool) -> int:
        """Ticks of the bar; the steps of plasticity are not known beforehand."""
        records = sum(len(batches) for batches in self.by_domain.values())
        return len(self.windows) + records * (POINTS + (len(self.by_domain) > 1)) + 2 * TASKS * plasticity

    def run(self, bar: tqdm, plasticity: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        def passing(what: str, batches: Iterable[Any]) -> Shown:
            return Shown(batches, what, bar)

        blocks = [block.name for block in spread(find_blocks(self.before), BLOCKS)]
        moved = drift(self.before, self.after, passing("hidden states", self.windows), modules=blocks)
        bar.set_description("updates")
        ranks = update_rank(self.before, self.after)
        common = None
        if len(self.by_domain) > 1:
            probe = ActivationProbe(self.before)
            scores = {
                domain: probe.run(passing(f"hubs: {domain}", batches)) for domain, batches in self.by_domain.items()
            }
            common = hubs(scores, seed=self.seed).indices
        smeared = smearing(self.before, self.after, common)
        record = {"drift": moved.to_json(), "update_rank": ranks.to_json(), "smearing": smeared.to_json()}
        if self.by_domain:
            line = {domain: passing(f"losses: {domain}", batches) for domain, batches in self.by_domain.items()}
            record["connectivity"] = connectivity(self.before, self.after, line, POINTS).to_json()
        if plasticity:
            bar.set_description("plasticity")
            seeds = range(self.seed, self.seed + TASKS)
            record["plasticity"] = probe_plasticity(self.before, self.after, seeds, fitted=bar.update).to_json()
        return record, {**moved.tensors(), **ranks.tensors(), **smeared.tensors()}
