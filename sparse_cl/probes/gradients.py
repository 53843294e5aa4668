"""The mean gradient of a domain, layer by layer, with what its sampling error needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.models.losses import Loss, answer_loss
from sparse_cl.models.parts import Linear, is_transposed, linear_layers, matrix_of
from sparse_cl.models.passes import Batch, evaluation

from .checks import check_counted, check_finite, check_least
from .resampling import GROUPS
from .result import Result

#: Numbers that a gradient is folded to. A prime, so that no column of a matrix folds onto few of them: the columns of
#: massive activations hold most of some gradients.
SKETCH = 1021


def spearman_brown(half: float | None) -> float | None:
    """The correlation of two wholes, from two halves' c: 2c/(1+c) (Spearman 1910, Brown 1910); None at c <= -1/2.

    Noise alone can make the halves' correlation negative. Then so is the result, and far from 0 the formula means
    nothing.
    """
    return None if half is None or half <= -0.5 else 2 * half / (1 + half)


@dataclass(frozen=True)
class MeanGradient(Result):
    """Mean gradient of the loss over the tokens of one domain.

    Attributes:
        layers: name -> (outputs, inputs), on the CPU, float32 (float64 for float64 weights): 4 bytes a weight.
        sketches: name -> (groups, SKETCH) float64, a count sketch of the gradient summed over each group of batches.
        split_half: name -> cosine of the mean gradients of two halves of the batches; None with less than two batches,
            or where a half is zero. The whole model's is under "".
        loss: mean loss, in nats per token.
        tokens, batches: how many the means are over.
        seed: of the sketches; only sketches with the same seed can be compared.
    """

    layers: dict[str, Tensor]
    sketches: dict[str, Tensor]
    split_half: dict[str, float | None]
    loss: float
    tokens: int
    batches: int
    seed: int

    def reliability(self, name: str = "") -> float | None:
        """How well a second sample of as many tokens would agree: the split-half cosine, corrected for its length."""
        return spearman_brown(self.split_half[name])

    def to_json(self) -> dict[str, Any]:
        layers = {
            name: {
                "shape": list(gradient.shape),
                "norm": float(torch.linalg.vector_norm(gradient, dtype=torch.float64)),
                "split_half": self.split_half[name],
                "reliability": self.reliability(name),
            }
            for name, gradient in self.layers.items()
        }
        known = {"loss": self.loss, "tokens": self.tokens, "batches": self.batches}
        return {**known, "reliability": self.reliability(), "layers": layers}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.layers)


class GradientProbe:
    """Mean gradients of linear layers' weights over a domain.

    A batch's gradient counts by its number of tokens, so the mean is over tokens. The user's ``.grad`` is not touched.
    While it runs it holds 8 bytes per watched weight on the weight's device, plus one batch's gradient.

    Args:
        model: any module.
        modules: name -> layer with a weight matrix. None: the linear layers of all residual blocks.
        loss: ``loss(model, batch) -> (sum over tokens, number of tokens)``. None: the answer loss, which needs
            input_ids.
        groups: batches are dealt to so many groups, which are what a bootstrap resamples; even ones make one half of
            the split, odd ones the other.
        seed: of the signs in the sketches (Charikar, Chen & Farach-Colton 2002).

    Raises:
        ValueError: fewer than two groups; no layer; one without a plain matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module] | None = None,
        *,
        loss: Loss | None = None,
        groups: int = GROUPS,
        seed: int = 0,
    ):
        check_least(2, groups=groups)
        self.model, self.loss, self.groups, self.seed = model, loss or answer_loss, groups, seed
        self.modules = watched_layers(model, modules)

    def run(self, batches: Iterable[Batch]) -> MeanGradient:
        """One pass forward and backward over the batches, in evaluation mode.

        Raises:
            ValueError: no token that counts; a loss or gradient that is not finite; a layer the loss does not reach.
        """
        weights = [module.weight for module in self.modules.values()]
        sums = [_GradientSum(weight, self.groups, self.seed * 1_000_003 + i) for i, weight in enumerate(weights)]
        total: float | Tensor = 0.0
        tokens = number = counted = 0
        with evaluation(self.model), requiring_grad(weights), torch.enable_grad():
            for number, batch in enumerate(batches, 1):
                loss, count = self.loss(self.model, batch)
                if not count:
                    continue
                # Of the mean: a sum over a long batch could overflow in float16.
                gradients = torch.autograd.grad(loss / count, weights, allow_unused=True)
                for name, gradient in zip(self.modules, gradients, strict=True):
                    if gradient is None:
                        raise ValueError(
                            f"{name}: the loss of batch {number} does not depend on its weight; watch layers that run "
                            "in every forward pass: modules={name: layer}"
                        )
                folded = [own.add(g, count, counted) for own, g in zip(sums, gradients, strict=True)]
                totals = dict(zip([*self.modules, "the loss"], [*folded, loss.detach()], strict=True))
                check_finite("a gradient that is", totals, number)
                total, tokens, counted = total + loss.detach().double(), tokens + count, counted + 1
        check_counted(tokens, number)
        split = [own.halves() for own in sums]
        halves = {name: cosine(*parts.tolist()) for name, parts in zip(self.modules, split, strict=True)}
        halves[""] = cosine(*sum(split, torch.zeros(())).tolist())
        used = min(self.groups, counted)
        layers, sketches = {}, {}
        for (name, module), own in zip(self.modules.items(), sums, strict=True):
            mean = own.mean(tokens)
            layers[name] = mean.mT.contiguous() if is_transposed(module) else mean
            sketches[name] = own.sketch[:used].cpu()
        return MeanGradient(layers, sketches, halves, float(total) / tokens, tokens, counted, self.seed)


class _GradientSum:
    """Gradients of one weight, summed: in two halves whole, in groups as sketches."""

    def __init__(self, weight: Tensor, groups: int, seed: int):
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.sums = torch.zeros(2, *weight.shape, dtype=wide, device=weight.device)
        self.sketch = torch.zeros(groups, SKETCH, dtype=torch.float64, device=weight.device)
        # Products of a row's and a column's sign: independent in pairs, as an unbiased inner product needs, and they
        # take m + n numbers where signs of their own would take m n.
        generator = torch.Generator().manual_seed(seed)
        self.signs = [
            (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(weight.device, wide) for size in weight.shape
        ]

    def add(self, gradient: Tensor, tokens: int, batch: int) -> Tensor:
        """Adds the mean gradient over the tokens of one batch; returns a number (0-d) that is finite if it is."""
        group = batch % len(self.sketch)
        wide = gradient.to(self.sums.dtype)
        self.sums[group % 2].add_(wide, alpha=tokens)
        rows, columns = self.signs
        signed = (wide * rows[:, None]).mul_(columns).flatten()
        folded = nn.functional.pad(signed, (0, -len(signed) % SKETCH)).view(-1, SKETCH).sum(0, dtype=torch.float64)
        self.sketch[group].add_(folded, alpha=tokens)
        return folded.sum().to(self.sums.dtype)

    def halves(self) -> Tensor:
        """(3,) float64 on the CPU: product of the two halves, and the square of each."""
        first, second = self.sums
        return torch.tensor([dot(first, second), dot(first, first), dot(second, second)], dtype=torch.float64)

    def mean(self, tokens: int) -> Tensor:
        """On the CPU. The halves are gone afterwards."""
        total = self.sums[0].add_(self.sums[1]).div_(tokens).to("cpu", copy=True)
        del self.sums
        return total


def watched_layers(model: nn.Module, modules: Mapping[str, nn.Module] | None) -> dict[str, Linear]:
    """The layers to watch by name: those given, or the linear layers of all residual blocks.

    Raises:
        ValueError: there is none, or one without a plain weight matrix.
    """
    layers: dict[str, Linear] = linear_layers(model) if modules is None else dict(modules)
    if not layers:
        raise ValueError("modules: expected at least one layer, got none")
    for name, module in layers.items():
        if not isinstance(getattr(module, "weight", None), Tensor) or module.weight.dim() != 2:
            raise ValueError(f"modules: expected layers with a weight matrix, got {type(module).__name__} for {name}")
        if isinstance(module, nn.Linear) or is_transposed(module) or hasattr(module, "get_base_layer"):
            matrix_of(module, name)
    return layers


@contextmanager
def requiring_grad(weights: list[Tensor]) -> Iterator[None]:
    """With gradients for weights that may be frozen; what each had is put back."""
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


def dot(a: Tensor, b: Tensor) -> float:
    """Σ a b in float64, some entries at a time."""
    blocks = zip(a.reshape(-1).split(1 << 20), b.reshape(-1).split(1 << 20), strict=True)
    return float(sum((x.double() @ y.double() for x, y in blocks), torch.zeros((), dtype=torch.float64)))


def cosine(product: float, first: float, second: float) -> float | None:
    """From a·b, ‖a‖² and ‖b‖²; None where one is zero."""
    return product / math.sqrt(first * second) if first > 0 and second > 0 else None
