"""Probe a model on domains: what each of them uses, what they share, and what is free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from sparse_cl import probes
from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.models.parts import find_blocks, linear_layers, spread
from sparse_cl.models.passes import stream

from .batches import Shown
from .section import Section
from .sections import activation, capacity, curvature, gradients, neurons, overlap, rank
from .settings import ProbeSettings

_BISECTIONS = 8
"""About how many passes the search for a critical sparsity takes; only the bar depends on it."""


@dataclass(frozen=True)
class Probed:
    """What was found in one model: the record, and what is kept as tensors."""

    record: dict[str, Any]
    activations: Mapping[str, probes.ActivationScores]
    tensors: Mapping[str, Tensor]


def probe_model(model: nn.Module, batches: Mapping[str, DomainBatches], settings: ProbeSettings) -> Probed:
    """Every probe of `settings.probes` on every domain; progress is shown on stderr.

    Raises:
        ValueError: bad input of a probe, with the domain's name before the probe's message.
    """
    work = _Work(model, batches, settings)
    with tqdm(total=work.passes(), mininterval=0.5, unit="batch") as bar:
        work.bar = bar
        return work.run()


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
    for name, section in (("capacity", capacity.section), ("rank", rank.section), ("curvature", curvature.section)):
        if name in record:
            found.append(section(record[name]))
    return found


class _Work:
    """The probes of one model, in an order that shares passes."""

    def __init__(self, model: nn.Module, batches: Mapping[str, DomainBatches], settings: ProbeSettings) -> None:
        self.model, self.batches, self.settings = model, batches, settings
        self.blocks = spread(find_blocks(model), settings.blocks)
        self.layers = linear_layers(model, self.blocks)
        self.bar: tqdm | None = None
        self.seconds: dict[str, float] = {}

    def passes(self) -> int:
        """How many batches will pass."""
        chosen, count = self.settings.probes, len(self.batches)
        each = 1 if {"activation", "rank", "capacity"} & {*chosen} else 0
        each += 2 + count if "gradients" in chosen else "capacity" in chosen
        each += "curvature" in chosen
        each += _BISECTIONS if "activation" in chosen and self.settings.critical else 0
        return each * sum(len(batches) for batches in self.batches.values())

    def run(self) -> Probed:
        chosen, seed = self.settings.probes, self.settings.seed
        record: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        activations, inputs, features = self._forward()
        gradients = {}
        if {"gradients", "capacity"} & {*chosen}:
            probe = probes.GradientProbe(self.model, self.layers, seed=seed)
            gradients = self._of_each("gradients", "gradients", probe.run)
        if "activation" in chosen:
            with self._timed("overlap"):
                record |= self._of_neurons(activations)
        if "gradients" in chosen:
            record |= self._of_gradients(gradients)
        if "curvature" in chosen:
            curvature = probes.CurvatureProbe(self.model, self.layers, seed=seed)
            curved = self._of_each("curvature", "curvature", curvature.run)
            record["curvature"] = {"domains": _plain(curved)}
            if len(curved) > 1:
                record["curvature"]["overlap"] = probes.curvature_overlap(curved)
        if "rank" in chosen:
            record["rank"] = _plain(features)
            for domain, found in features.items():
                tensors |= {f"rank|{domain}|{name}": tensor for name, tensor in found.tensors().items()}
        if "capacity" in chosen:
            with self._timed("capacity"):
                record["capacity"] = probes.capacity(
                    inputs,
                    energy=self.settings.energy,
                    gradients={domain: found.layers for domain, found in gradients.items()},
                    activations={domain: found.mean() for domain, found in activations.items()} or None,
                    seed=seed,
                ).to_json()
        record["seconds"] = self.seconds
        return Probed(record, activations, tensors)

    def _forward(self) -> list[dict[str, Any]]:
        """What the probes that share a pass forward found, by domain: of activations, of inputs, of features."""
        makers: dict[str, Callable[[], Any]] = {
            "activation": lambda: probes.ActivationProbe(self.model),
            "capacity": lambda: probes.InputProbe(self.model, blocks=self.blocks),
            "rank": lambda: probes.FeatureProbe(self.model, {block.name: block.module for block in self.blocks}),
        }
        chosen = [name for name in makers if name in self.settings.probes]
        results: dict[str, dict[str, Any]] = {name: {} for name in makers}

        def run(batches: Shown) -> dict[str, Any]:
            running = {name: makers[name]() for name in chosen}
            stream(self.model, [watch for probe in running.values() for watch in probe.watches()], batches)
            return {name: probe.result() for name, probe in running.items()}

        if chosen:
            for domain, found in self._of_each("forward passes", "activations", run).items():
                for name, result in found.items():
                    results[name][domain] = result
        return list(results.values())

    def _of_neurons(self, activations: Mapping[str, probes.ActivationScores]) -> dict[str, Any]:
        seed = self.settings.seed
        record: dict[str, Any] = {"activation": _plain(activations)}
        if len(activations) > 1:
            record["overlap"] = probes.overlap(activations, seed=seed).to_json()
            by_usage, by_weight = probes.hubs(activations, seed=seed), probes.weight_hubs(self.model)
            record["hubs"] = by_usage.to_json()
            record["hub_weights"] = probes.agreement(by_usage, by_weight)
        record["dormant"] = probes.dormant(activations, seed=seed).to_json()
        if self.settings.critical:
            passing = self._passing("critical sparsity").items()
            record["critical_sparsity"] = {
                domain: probes.critical_sparsity(self.model, batches).to_json() for domain, batches in passing
            }
        return record

    def _of_gradients(self, gradients: Mapping[str, probes.MeanGradient]) -> dict[str, Any]:
        record: dict[str, Any] = {"gradients": _plain(gradients)}
        if len(gradients) > 1:
            with self._timed("comparing gradients"):
                record["cosines"] = probes.compare_gradients(gradients, seed=self.settings.seed).to_json()
        with self._timed("interference"):
            passing = self._passing("interference")
            record["interference"] = probes.interference(self.model, passing, gradients, modules=self.layers).to_json()
        return record

    def _of_each(self, stage: str, what: str, run: Callable[[Shown], Any]) -> dict[str, Any]:
        """What `run` finds in the batches of each domain, which its errors name."""
        found = {}
        for domain, batches in self._passing(what).items():
            with self._timed(stage):
                try:
                    found[domain] = run(batches)
                except ValueError as error:
                    raise ValueError(f"domain {domain!r}: {error}") from error
        return found

    def _passing(self, what: str) -> dict[str, Shown]:
        return {domain: Shown(batches, f"{what}: {domain}", self.bar) for domain, batches in self.batches.items()}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


def _plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """Each domain's result as JSON."""
    return {domain: found.to_json() for domain, found in results.items()}
