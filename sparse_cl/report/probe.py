"""Probe a model on domains: what each of them uses, what they share, and what is free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.models.parts import find_blocks, linear_layers, spread
from sparse_cl.models.passes import stream
from sparse_cl.probes.activation import ActivationProbe
from sparse_cl.probes.capacity import capacity
from sparse_cl.probes.critical_sparsity import critical_sparsity
from sparse_cl.probes.curvature import CurvatureProbe, curvature_overlap
from sparse_cl.probes.features import FeatureProbe, Features
from sparse_cl.probes.gradient_cosines import compare_gradients
from sparse_cl.probes.gradients import GradientProbe, MeanGradient
from sparse_cl.probes.inputs import InputMoments, InputProbe
from sparse_cl.probes.interference import interference
from sparse_cl.probes.neurons import agreement, dormant, hubs, weight_hubs
from sparse_cl.probes.overlap import overlap
from sparse_cl.probes.scores import ActivationScores

from .batches import Shown
from .settings import ProbeSettings

_BISECTIONS = 8
"""About how many passes the search for a critical sparsity takes; only the bar depends on it."""


@dataclass(frozen=True)
class Probed:
    """What was found in one model: the record, and what is kept as tensors."""

    record: dict[str, Any]
    activations: Mapping[str, ActivationScores]
    tensors: Mapping[str, torch.Tensor]


def probe_model(model: nn.Module, batches: Mapping[str, DomainBatches], settings: ProbeSettings) -> Probed:
    """Every probe of `settings.probes` on every domain; progress is shown on stderr.

    Raises:
        ValueError: bad input of a probe, with the domain's name before the probe's message.
    """
    work = _Work(model, batches, settings)
    with tqdm(total=work.passes(), mininterval=0.5, unit="batch") as bar:
        work.bar = bar
        return work.run()


class _Work:
    """The probes of one model, in an order that shares passes."""

    def __init__(self, model: nn.Module, batches: Mapping[str, DomainBatches], settings: ProbeSettings) -> None:
        self.model, self.batches, self.settings = model, batches, settings
        self.blocks = spread(find_blocks(model), settings.blocks)
        self.layers = linear_layers(model, self.blocks)
        self.bar: tqdm | None = None
        self.seconds: dict[str, float] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def passes(self) -> int:
        """How many batches will pass."""
        chosen, count = self.settings.probes, len(self.batches)
        each = 1 if {"activation", "rank", "capacity"} & {*chosen} else 0
        each += 2 + count if "gradients" in chosen else "capacity" in chosen
        each += "curvature" in chosen
        each += _BISECTIONS if "activation" in chosen and self.settings.critical else 0
        return each * sum(len(batches) for batches in self.batches.values())

    def run(self) -> Probed:
        chosen = self.settings.probes
        record: dict[str, Any] = {}
        activations, inputs, features = self._forward()
        gradients = self._gradients() if {"gradients", "capacity"} & {*chosen} else {}
        if "activation" in chosen:
            with self._timed("overlap"):
                record |= self._of_neurons(activations)
        if "gradients" in chosen:
            record |= self._of_gradients(gradients)
        if "curvature" in chosen:
            record["curvature"] = self._curvature()
        if "rank" in chosen:
            record["rank"] = {domain: found.to_json() for domain, found in features.items()}
            for domain, found in features.items():
                self.tensors |= {f"rank|{domain}|{name}": tensor for name, tensor in found.tensors().items()}
        if "capacity" in chosen:
            with self._timed("capacity"):
                record["capacity"] = capacity(
                    inputs,
                    energy=self.settings.energy,
                    gradients={domain: found.layers for domain, found in gradients.items()},
                    activations={domain: found.mean() for domain, found in activations.items()} or None,
                    seed=self.settings.seed,
                ).to_json()
        record["seconds"] = self.seconds
        return Probed(record, activations, self.tensors)

    def _forward(
        self,
    ) -> tuple[dict[str, ActivationScores], dict[str, InputMoments], dict[str, Features]]:
        chosen = self.settings.probes
        makers: dict[str, Callable[[], Any]] = {
            "activation": lambda: ActivationProbe(self.model),
            "capacity": lambda: InputProbe(self.model, blocks=self.blocks),
            "rank": lambda: FeatureProbe(self.model, {block.name: block.module for block in self.blocks}),
        }
        results: dict[str, dict[str, Any]] = {name: {} for name in makers}
        if not any(name in chosen for name in makers):
            return {}, {}, {}
        for domain in self.batches:
            probes = {name: make() for name, make in makers.items() if name in chosen}
            with self._timed("forward passes"), _domain(domain):
                watches = [watch for probe in probes.values() for watch in probe.watches()]
                stream(self.model, watches, self._passing("activations", domain))
                for name, probe in probes.items():
                    results[name][domain] = probe.result()
        return results["activation"], results["capacity"], results["rank"]

    def _gradients(self) -> dict[str, MeanGradient]:
        probe = GradientProbe(self.model, self.layers, seed=self.settings.seed)
        found = {}
        for domain in self.batches:
            with self._timed("gradients"), _domain(domain):
                found[domain] = probe.run(self._passing("gradients", domain))
        return found

    def _of_neurons(self, activations: Mapping[str, ActivationScores]) -> dict[str, Any]:
        record: dict[str, Any] = {"activation": {domain: found.to_json() for domain, found in activations.items()}}
        if len(activations) > 1:
            record["overlap"] = overlap(activations, seed=self.settings.seed).to_json()
            by_usage, by_weight = hubs(activations, seed=self.settings.seed), weight_hubs(self.model)
            record["hubs"] = by_usage.to_json()
            record["hub_weights"] = agreement(by_usage, by_weight)
        record["dormant"] = dormant(activations, seed=self.settings.seed).to_json()
        if self.settings.critical:
            record["critical_sparsity"] = {
                domain: critical_sparsity(self.model, self._passing("critical sparsity", domain)).to_json()
                for domain in self.batches
            }
        return record

    def _of_gradients(self, gradients: Mapping[str, MeanGradient]) -> dict[str, Any]:
        record: dict[str, Any] = {"gradients": {domain: found.to_json() for domain, found in gradients.items()}}
        if len(gradients) > 1:
            with self._timed("comparing gradients"):
                record["cosines"] = compare_gradients(gradients, seed=self.settings.seed).to_json()
        with self._timed("interference"):
            passing = {domain: self._passing("interference", domain) for domain in self.batches}
            record["interference"] = interference(self.model, passing, gradients, modules=self.layers).to_json()
        return record

    def _curvature(self) -> dict[str, Any]:
        found = {}
        probe = CurvatureProbe(self.model, self.layers, seed=self.settings.seed)
        for domain in self.batches:
            with self._timed("curvature"), _domain(domain):
                found[domain] = probe.run(self._passing("curvature", domain))
        record: dict[str, Any] = {"domains": {domain: one.to_json() for domain, one in found.items()}}
        if len(found) > 1:
            record["overlap"] = curvature_overlap(found)
        return record

    def _passing(self, what: str, domain: str) -> Shown:
        return Shown(self.batches[domain], f"{what}: {domain}", self.bar)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


@contextmanager
def _domain(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"domain {name!r}: {error}") from error
