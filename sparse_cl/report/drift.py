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
from .settings import check_out
from .text import reference_text, text_batches

BLOCKS = 16
"""Residual blocks whose hidden states are compared, evenly spread: 48 n² bytes each for a width of n."""

POINTS = 5
"""On the line between the checkpoints, both among them."""

TASKS = 3
"""Random tasks that are fitted for plasticity."""


def drift_study(
    before: str,
    after: str,
    out: Path,
    *,
    text: str | None = None,
    data: str | None = None,
    domains: Sequence[str] = (),
    records: int = 128,
    batch_size: int = 16,
    max_length: int = 256,
    dtype: str = "float32",
    plasticity: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares two checkpoints, and writes `results.json`, `tensors.safetensors` and `report.html` into `out`.

    Args:
        before: folder or Hub name of a causal language model.
        after: the same model, trained on: what `load_checkpoint` takes.
        out: a folder that is absent or empty.
        text: file of reference text, of which the beginning is used; None: the embedded one.
        data, domains: see `load_domains`; with domains the losses on the line between are measured too, and how much
            of the update falls on hubs (with two domains at least).
        records: validation records of each domain, the first ones.
        batch_size: windows or records a pass.
        max_length: in tokens, of a window and of a record.
        dtype: of the weights, "float32" or "bfloat16".
        plasticity: whether to fit random tasks from both.
        seed: of the embedded domains, of the hubs' intervals, and of the first random task.

    Returns:
        What results.json holds.

    Raises:
        ValueError: bad input; the message says what to do. Nothing is written then.
    """
    quiet()
    check_out(out)
    _check_numbers(records=records, batch_size=batch_size, max_length=max_length)
    reference = reference_text(text)
    loaded = load_domains(domains, data, seed) if domains else []
    wanted = getattr(torch, dtype)
    model, tokenizer = load_model(before, wanted)
    limit = getattr(model.config, "max_position_embeddings", max_length)
    if max_length > limit:
        raise ValueError(f"max_length: expected at most the model's context of {limit} tokens, got {max_length}")
    other = load_checkpoint(after, load_model(before, wanted)[0])
    by_domain = domain_batches(
        loaded, tokenizer, model, records=records, batch_size=batch_size, max_length=max_length, split="validation"
    )
    windows = text_batches(tokenizer, reference, max_length, batch_size)
    study = _Study(model, other, windows, by_domain, seed)
    with tqdm(total=study.passes(plasticity), mininterval=0.5) as bar:
        record, tensors = study.run(bar, plasticity)
    facts = {
        "before": before,
        "after": after,
        "text": text or "embedded",
        "tokens of text": sum(int(batch["attention_mask"].sum()) for batch in windows),
        "data": data or ("embedded" if by_domain else None),
        "domains": list(by_domain),
        "records": records if by_domain else None,
        "max_length": max_length,
        "dtype": dtype,
        "seed": seed,
    }
    record = {"settings": facts, **record}
    out.mkdir(parents=True, exist_ok=True)
    storage.write(out / "tensors.safetensors", "drift", tensors)
    write_report(
        out / "report.html",
        f"What changed from {Path(before).name} to {Path(after).name}",
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


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


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
