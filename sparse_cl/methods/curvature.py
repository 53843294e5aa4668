"""Curvature null space: updates keep to the directions in which the loss of earlier domains is flat."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl import storage
from sparse_cl.models.parts import is_transposed, refuse_shared
from sparse_cl.optim.curvature_projection import MODES, CurvatureProjection
from sparse_cl.optim.projected_adamw import ProjectedAdamW
from sparse_cl.probes.capacity import scarcity
from sparse_cl.probes.curvature import CurvatureProbe
from sparse_cl.probes.gradients import watched_layers
from sparse_cl.probes.sampled_gradients import sampled_gradients
from sparse_cl.subspace.kronecker import Kronecker, threshold_of

from .base import Batch, Method, check_first, refuse_resized
from .options import check_at_least, check_share
from .surviving import surviving_shares

_FILE = "curvature.safetensors"

Factors = tuple[Tensor, Tensor]
"""S and A of a parameter (rows first), each a matrix or a diagonal, summed over domains; float32, on the CPU."""


class Curvature(Method):
    """Full fine-tuning that removes or damps each update in the curved directions of earlier domains (CDCL).

    For each linear layer of the residual blocks, the Kronecker factors A = E[x xᵀ] and S = E[δ δᵀ] of the Fisher with
    sampled labels (Martens & Grosse 2015) are summed over the domains learned and the protected text. The product of
    sums approximates the sum of the domains' Kronecker products, with extra cross terms. Each domain's factors are
    measured on the model right after it learned that domain.

    Args:
        mode: "hard": an update's coordinates in the two eigenbases with λ_S λ_A above a threshold τ are removed;
            "soft": each is multiplied by τ/(τ + λ_S λ_A).
        energy: share of Σ λ_S λ_A that lies above τ, in (0, 1].
        scope: "layer": a τ for each layer; "model": one for all, so that layers which matter more lose more.
        rest: embeddings, head, norms and biases, once there is any curvature: "freeze", or "damp": "soft" whatever the
            mode, by the Fisher's diagonal, and for a matrix by its rows' diagonal times the second moment of what its
            rows' gradients are (for an embedding: tokens × directions).
        samples: labels drawn for each token.

    The defaults had the best mean score, and learned most, of four settings on the validation part of real text: two
    domains, 25 steps each, one seed.
    """

    name = "curvature"
    protects = True
    options = ("mode", "energy", "scope", "rest", "samples")
    default_lr = 2e-3

    def __init__(
        self,
        mode: str = "soft",
        energy: float = 0.9,
        scope: str = "layer",
        rest: str = "damp",
        samples: int = 1,
    ) -> None:
        for option, value, allowed in (
            ("mode", mode, MODES),
            ("scope", scope, ("layer", "model")),
            ("rest", rest, ("freeze", "damp")),
        ):
            if value not in allowed:
                raise ValueError(f"{option}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
        check_share("energy", energy)
        self.mode, self.energy, self.scope, self.rest = mode, energy, scope, rest
        self.samples = check_at_least("samples", samples, 1)
        self.factors: dict[str, Factors] = {}
        self.projections: dict[str, CurvatureProjection] = {}
        self._before: dict[str, Tensor] = {}
        self._layers: dict[str, dict[str, Any]] = {}

    def check(self, model: nn.Module) -> None:
        super().check(model)
        refuse_shared(model)
        watched_layers(model, None)

    def protect(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_first(self.name, not self.factors)
        self._observe(model, batches)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.check(model)
        refuse_resized(self.name, {name: projection.shape for name, projection in self.projections.items()}, model)
        weights = self._weights(model)
        self._layers = {name: {"surviving": 1.0, "leak": None} for name in weights}
        self._before = {}
        if not self.projections:
            return model
        parameters = {name: model.get_parameter(name) for name in weights}
        shares = surviving_shares(
            model, parameters, batches, lambda name, gradient: self.projections[name].share_inside(gradient)
        )
        for name, share in shares.items():
            self._layers[name]["surviving"] = share
        if message := scarcity(self._layers):
            warnings.warn(f"{self.name}: {message}", stacklevel=2)
        self._before = {name: model.get_parameter(name).detach().to("cpu", copy=True) for name in weights}
        return model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return ProjectedAdamW(model.named_parameters(), lr=lr, projections=self.projections)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        for name, before in self._before.items():
            change = model.get_parameter(name).detach().cpu().double() - before.double()
            self._layers[name]["leak"] = self.projections[name].share_inside(change)
        self._before = {}
        self._observe(model, batches)
        for name, layer in self._layers.items():
            rows, columns = self.projections[name].shape
            used = round(self.projections[name].used())
            layer |= {"width": rows * columns, "used": used, "free": rows * columns - used}

    def record(self) -> dict[str, Any]:
        return {"layers": self._layers}

    def save(self, folder: Path) -> None:
        tensors = {
            f"{name}:{kind}": factor
            for name, pair in self.factors.items()
            for kind, factor in zip(("rows", "columns"), pair, strict=True)
        }
        storage.write(folder / _FILE, "curvature", tensors, names=list(self.factors))

    def restore(self, base: nn.Module, folders: Sequence[Path]) -> nn.Module:
        model = super().restore(base, folders)
        path = folders[-1] / _FILE
        tensors, facts = storage.read(path, "curvature", "a run of the method curvature", "names")
        try:
            self.factors = {name: (tensors[f"{name}:rows"], tensors[f"{name}:columns"]) for name in facts["names"]}
        except KeyError as error:
            raise ValueError(f"{path}: the curvature is damaged ({error}); learn this domain again") from error
        self._set_projections(model)
        return model

    def _weights(self, model: nn.Module) -> dict[str, tuple[str, bool]]:
        """Name of each layer's weight -> the layer's name, and whether its weight is (in, out)."""
        layers = watched_layers(model, None)
        return {f"{name}.weight": (name, is_transposed(layer)) for name, layer in layers.items()}

    def _observe(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Add the curvature of a text, as the model is now."""
        weights = self._weights(model)
        found: dict[str, Factors] = {}
        curvature = CurvatureProbe(model, samples=self.samples).run(batches).layers
        for name, (layer, transposed) in weights.items():
            factors = curvature[layer]
            pair = (factors.outputs, factors.inputs)
            found[name] = pair[::-1] if transposed else pair
        if self.rest == "damp":
            found |= self._rest_factors(model, batches, weights)
        for name, pair in found.items():
            old = self.factors.get(name)
            self.factors[name] = pair if old is None else _sum(old, pair)
        self._set_projections(model)

    def _rest_factors(self, model: nn.Module, batches: Iterable[Batch], weights: Iterable[str]) -> dict[str, Factors]:
        rest = {name: p for name, p in model.named_parameters() if name not in set(weights)}
        sums: dict[str, Factors] = {}

        def see(gradients: dict[str, Tensor]) -> None:
            for name, gradient in gradients.items():
                squares = _squares(gradient)
                old = sums.get(name)
                sums[name] = squares if old is None else _sum(old, squares)

        tokens = sampled_gradients(model, rest, batches, see, samples=self.samples)
        result = {}
        for name, (rows, columns) in sums.items():
            rows = rows / (tokens * self.samples)
            # Both are of the whole gradient; as a product they must have its mass once.
            columns = columns / columns.diagonal().sum().clamp(min=torch.finfo(columns.dtype).tiny)
            result[name] = (rows.cpu(), columns.cpu())
        return result

    def _set_projections(self, model: nn.Module) -> None:
        weights = self._weights(model)
        curvatures = dict(self._curvatures(model))
        shared = self._threshold([curvatures[name] for name in weights]) if self.scope == "model" else None
        self.projections = {
            name: CurvatureProjection(
                curvature,
                self._threshold([curvature]) if shared is None else shared,
                self.mode if name in weights else "soft",
            )
            for name, curvature in curvatures.items()
        }

    def _threshold(self, curvatures: Sequence[Kronecker]) -> float:
        return threshold_of(curvatures, self.energy) if any(curvature.mass for curvature in curvatures) else 0.0

    def _curvatures(self, model: nn.Module) -> Iterator[tuple[str, Kronecker]]:
        for name, pair in self.factors.items():
            parameter = model.get_parameter(name)
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            rows, columns = pair
            yield name, Kronecker.of(rows.to(parameter.device), columns.to(parameter.device), dtype)


def _sum(first: Factors, second: Factors) -> Factors:
    return first[0] + second[0], first[1] + second[1]


def _squares(gradient: Tensor) -> Factors:
    """Of a matrix its rows' squared norms and its columns' second moment; of anything else its squares, as rows."""
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    if gradient.dim() != 2:
        return wide.square().flatten(), wide.new_ones(1, 1)
    return wide.square().sum(1), wide.mT @ wide
