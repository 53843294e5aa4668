"""Kronecker factors of the Fisher information of each layer, their spectra, and how much of it is flat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.linalg import randomized_svd
from sparse_cl.models.parts import Linear, shape_of
from sparse_cl.models.passes import Batch, evaluation
from sparse_cl.subspace.moments import ExactMoment

from .angles import subspace_overlap
from .checks import check_alike, check_domains, check_finite, check_least, check_shares
from .gradients import watched_layers
from .sampled_gradients import Prediction, predicted

#: λ_S λ_A at or below this share of the layer's largest counts as flat.
THRESHOLDS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

_Pair = tuple[ExactMoment, ExactMoment]
"""Σ x xᵀ and Σ δ δᵀ of one layer."""

_Seen = tuple[Tensor, Tensor, int]
"""Of a layer in one pass: its input rows; its output, in the graph; and which version of the output that is."""


@dataclass(frozen=True)
class Factors:
    """F ≈ S ⊗ A of one layer's weight (m outputs, n inputs); its eigenvalues are the products of theirs.

    Attributes:
        inputs: A = E[x xᵀ], (n, n), float32 (float64 for float64 layers), on the CPU.
        outputs: S = E[δ δᵀ], (m, m), as `inputs`.
        input_values, output_values: their eigenvalues, float64, largest first, none below 0.
        halves: the same of even and of odd batches alone; empty with a single batch.
    """

    inputs: Tensor
    outputs: Tensor
    input_values: Tensor
    output_values: Tensor
    halves: tuple[Factors, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.output_values), len(self.input_values)

    def flat_share(self, threshold: float) -> float:
        """Share of the m·n directions with λ_S λ_A <= threshold · the largest. 1 where the curvature is zero.

        Raises:
            ValueError: a threshold below 0.
        """
        if not threshold >= 0:
            raise ValueError(f"threshold: expected a share of the largest eigenvalue, at least 0, got {threshold}")
        a, s = self.input_values, self.output_values
        if not (a[0] > 0 and s[0] > 0):
            return 1.0
        # Each direction of S allows A's eigenvalues up to a bound: counted in A sorted, without the m × n products.
        bounds = threshold * a[0] * (s[0] / s)  # infinite where an eigenvalue of S is zero
        return int(torch.searchsorted(a.flip(0).contiguous(), bounds, right=True).sum()) / (len(a) * len(s))

    def effective_directions(self) -> float:
        """Participation ratio (Σλ)²/Σλ² of the products λ_S λ_A: how many directions carry the curvature; 0 of none."""
        ratios = [values.sum().square() / values.square().sum() for values in (self.input_values, self.output_values)]
        product = float(ratios[0] * ratios[1])
        return product if product == product else 0.0

    def trace(self) -> float:
        """tr S · tr A: the mean squared norm of a token's gradient, in nats², if x and δ are independent."""
        return float(self.input_values.sum() * self.output_values.sum())


@dataclass(frozen=True)
class Curvature:
    """Of one domain.

    Attributes:
        layers: name -> its factors.
        tokens: predicting tokens that the means are over.
        samples: labels drawn for each.
    """

    layers: dict[str, Factors]
    tokens: int
    samples: int

    def to_json(self, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
        """Spectra as at most 64 quantiles from the largest to the smallest, and the flat share at each threshold.

        `flat_halves`: of the halves of the batches, None with a single one: an idea of its error. `flat_null`: of white
        noise of as many tokens. Too few tokens make directions look flat, and this says how many.
        """

        def flat(factors: Factors) -> list[float]:
            return [factors.flat_share(threshold) for threshold in thresholds]

        layers = {
            name: {
                "shape": list(factors.shape),
                "inputs": _quantiles(factors.input_values),
                "outputs": _quantiles(factors.output_values),
                "flat": flat(factors),
                "flat_halves": [flat(half) for half in factors.halves] or None,
                "flat_null": flat(self._white(factors)),
                "effective_directions": factors.effective_directions(),
                "trace": factors.trace(),
            }
            for name, factors in self.layers.items()
        }
        return {"tokens": self.tokens, "samples": self.samples, "thresholds": list(thresholds), "layers": layers}

    def _white(self, factors: Factors) -> Factors:
        """What white noise of as many tokens gives."""
        outputs, inputs = factors.shape
        spectra = white_spectrum(inputs, self.tokens), white_spectrum(outputs, self.tokens * self.samples)
        return Factors(factors.inputs, factors.outputs, *spectra)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}": getattr(factors, kind)
            for name, factors in self.layers.items()
            for kind in ("input_values", "output_values")
        }


class CurvatureProbe:
    """The Fisher information of each layer's weight, in Kronecker factors (Martens & Grosse 2015).

    A = E[x xᵀ] of the layer's inputs and S = E[δ δᵀ] of the gradients at its outputs, over the tokens whose next token
    is an answer token. Its labels are drawn from the model's own prediction: with the data's labels it would be the
    "empirical Fisher", which is not a curvature (Kunstner et al. 2019). δ of a token is of the loss summed over the
    sequence, later tokens included. Memory: 8 (m² + n²) bytes per layer, whatever the number of tokens, on the layer's
    device.

    Args:
        model: its output is logits (or has `.logits`).
        modules: name -> linear layer. None: the linear layers of all residual blocks.
        seed: of the labels.
        samples: labels drawn for each token; the passes forward stay the same.

    Raises:
        ValueError: samples below 1; no layer.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None, *, seed: int = 0, samples: int = 1
    ):
        check_least(1, samples=samples)
        self.model, self.seed, self.samples = model, seed, samples
        self.modules = watched_layers(model, modules)

    def run(self, batches: Iterable[Batch]) -> Curvature:
        """One pass forward and `samples` backward over the batches, in evaluation mode; no ``.grad`` is touched.

        Raises:
            ValueError: no token that counts; activations or gradients that are not finite; a layer that did not run.
        """
        # Even and odd batches apart, so that two halves can be compared.
        moments = {name: (_moments(module), _moments(module)) for name, module in self.modules.items()}
        counts = [0, 0]
        with ExitStack() as stack:
            stack.enter_context(evaluation(self.model))
            stack.enter_context(torch.enable_grad())
            seen: dict[str, _Seen] = {}
            for name, module in self.modules.items():
                stack.callback(module.register_forward_hook(_note(seen, name), with_kwargs=True).remove)
            for counted, prediction in enumerate(predicted(self.model, batches, self.seed, self.samples)):
                half = counted % 2
                self._add({name: pair[half] for name, pair in moments.items()}, seen, prediction)
                counts[half] += len(prediction.logits)
                seen.clear()
        layers = {name: self._factors(*pair, *counts) for name, pair in moments.items()}
        return Curvature(layers, sum(counts), self.samples)

    def _factors(self, even: _Pair, odd: _Pair, evens: int, odds: int) -> Factors:
        def factors(pair: Sequence[Tensor], tokens: int, halves: tuple[Factors, ...] = ()) -> Factors:
            inputs, outputs = pair[0] / tokens, pair[1] / (tokens * self.samples)
            values = [torch.linalg.eigvalsh(m.double()).flip(0).clamp(min=0) for m in (inputs, outputs)]
            return Factors(inputs, outputs, values[0], values[1], halves)

        first, second = ([moment.moment.cpu() for moment in pair] for pair in (even, odd))
        halves = (factors(first, evens), factors(second, odds)) if odds else ()
        return factors([a + b for a, b in zip(first, second, strict=True)], evens + odds, halves)

    def _add(self, moments: Mapping[str, _Pair], seen: Mapping[str, _Seen], prediction: Prediction) -> None:
        missing = [name for name in self.modules if name not in seen]
        if missing:
            raise ValueError(
                f"{missing[0]} did not run in batch {prediction.number}; watch layers that run in every forward pass"
            )
        sums = {
            name: rows.sum(dtype=torch.float32 if rows.dtype != torch.float64 else None)
            for name, (rows, _, _) in seen.items()
        } | {"the logits": prediction.logits.detach().sum()}
        check_finite("activations that are", sums, prediction.number)
        for name, (rows, output, version) in seen.items():
            if output._version != version:
                raise ValueError(
                    f"{name}: its output is changed in place by what follows (ReLU(inplace=True)?), so its own "
                    "gradient is not to be had; make that out of place"
                )
            moments[name][0].add(_counted(rows, prediction.places))
        outputs = [output for _, output, _ in seen.values()]
        for loss, again in prediction.losses():
            deltas = torch.autograd.grad(loss, outputs, retain_graph=again, allow_unused=True)
            for name, delta in zip(seen, deltas, strict=True):
                if delta is None:
                    raise ValueError(f"{name}: the prediction does not depend on its output; watch other layers")
                moments[name][1].add(_counted(delta, prediction.places))
        energies = {name: pair[1].energy() for name, pair in moments.items()}
        check_finite("gradients that are", energies, prediction.number)


def curvature_overlap(curvatures: Mapping[str, Curvature], share: float = 0.05) -> dict[str, Any]:
    """How much of the most curved input and output directions each pair of domains has in common.

    Of each factor the eigenvectors of its k = max(1, round(share · width)) largest eigenvalues, compared by
    ‖UᵀV‖²_F/k.

    Returns:
        JSON: `domains`, `pairs`, `share`; `layers` -> "inputs" and "outputs", a value a pair; "inputs_null", k/width,
        what random directions have; "inputs_ceiling", a value a domain, what two halves of its batches have (each of
        half the tokens), None with a single batch; and the same of outputs.

    Raises:
        ValueError: fewer than two domains, other layers in one than in the others, or a share outside (0, 1].
    """
    check_shares(share=share)
    check_domains(2, curvatures=curvatures)
    check_alike(
        "curvatures",
        "outputs and inputs",
        {domain: {name: one.shape for name, one in found.layers.items()} for domain, found in curvatures.items()},
    )
    domains = list(curvatures)
    layers: dict[str, dict[str, Any]] = {}
    for name in curvatures[domains[0]].layers:
        layers[name] = {}
        of = [curvature.layers[name] for curvature in curvatures.values()]
        for kind in ("inputs", "outputs"):
            leading = [_leading(getattr(factors, kind), share) for factors in of]
            halves = [[_leading(getattr(half, kind), share) for half in factors.halves] for factors in of]
            width, count = leading[0].shape
            layers[name] |= {
                kind: [subspace_overlap(*both) for both in combinations(leading, 2)],
                f"{kind}_null": count / width,
                f"{kind}_ceiling": [subspace_overlap(*both) if both else None for both in halves],
            }
    pairs = [list(pair) for pair in combinations(domains, 2)]
    return {"domains": domains, "pairs": pairs, "share": share, "layers": layers}


def white_spectrum(width: int, rows: int) -> Tensor:
    """Eigenvalues of the second moment of so many white rows, by the law of Marchenko & Pastur (1967).

    Returns:
        (width,) float64, largest first: the law's quantiles at even distances, and zeros where there are fewer rows
        than directions.
    """
    ratio = width / rows
    # Along x = 1 + γ + 2√γ cos t the density is smooth: 2 sin²t / (π x) dt, and 0 / 0 at one end if γ = 1.
    t = torch.linspace(0, torch.pi, 4097, dtype=torch.float64)
    t = (t[1:] + t[:-1]) / 2
    x = 1 + ratio + 2 * ratio**0.5 * t.cos()
    above = (t.sin().square() / x).cumsum(0)
    present = min(width, rows)
    places = (torch.arange(present, dtype=torch.float64) + 0.5) / present * above[-1]
    return torch.cat([x[torch.searchsorted(above, places).clamp(max=len(x) - 1)], x.new_zeros(width - present)])


def _leading(moment: Tensor, share: float) -> Tensor:
    """(width, k): eigenvectors of the largest eigenvalues of a second moment; overlaps come out right to about 1e-4."""
    count = max(1, round(share * len(moment)))
    generator = torch.Generator().manual_seed(0)
    return randomized_svd(moment, count, power_iterations=2, generator=generator)[0]


def _moments(module: Linear) -> _Pair:
    outputs, inputs = shape_of(module)
    dtype = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
    device = module.weight.device
    return ExactMoment(inputs, dtype, device), ExactMoment(outputs, dtype, device)


def _note(seen: dict[str, _Seen], name: str) -> Callable:
    def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        # Where nothing before it is trained, the graph begins here.
        output = output if output.requires_grad else output.detach().requires_grad_()
        rows = args[0] if args else next(iter(named.values()))
        seen[name] = rows.detach(), output, output._version
        return output

    return hook


def _counted(rows: Tensor, places: Tensor | None) -> Tensor:
    rows = rows.reshape(-1, rows.shape[-1])
    return rows if places is None else rows[places.to(rows.device)]


def _quantiles(values: Tensor) -> list[float]:
    """Of sorted values, at most 64 at even distances, the first and the last among them."""
    return values[torch.linspace(0, len(values) - 1, min(64, len(values))).round().long()].tolist()
