"""Gradients with labels drawn from the model's own prediction: what estimates of the Fisher information are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_cl.models.losses import predictions
from sparse_cl.models.passes import Batch, evaluation

from .checks import check_counted, check_finite, check_least
from .gradients import requiring_grad

See = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one batch.

    Attributes:
        number: of the batch, from 1.
        logits, places: as `losses.predictions` gives them; at least one.
        generator: of labels.
        samples: labels that are drawn for each token.
    """

    number: int
    logits: Tensor
    places: Tensor | None
    generator: torch.Generator
    samples: int

    def losses(self) -> Iterator[tuple[Tensor, bool]]:
        """The loss (0-d), summed over the tokens, for each draw of labels; and whether the graph is needed once more.

        Raises:
            ValueError: logits that are not finite.
        """
        wide = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        chances = wide.detach().softmax(-1)
        if not chances.isfinite().all():
            raise ValueError(f"logits that are not finite in batch {self.number}; look at that batch and the weights")
        for sample in range(self.samples):
            labels = torch.multinomial(chances, 1, generator=self.generator).flatten()
            yield nn.functional.cross_entropy(wide, labels, reduction="sum"), sample < self.samples - 1


def predicted(model: nn.Module, batches: Iterable[Batch], seed: int, samples: int) -> Iterator[Prediction]:
    """The predictions for each batch that has a token that counts. Mode and gradients are the caller's to set.

    Raises:
        ValueError: there was no such batch.
    """
    generator: torch.Generator | None = None
    number = tokens = 0
    for number, batch in enumerate(batches, 1):
        logits, _, places = predictions(model, batch)
        if not len(logits):
            continue
        generator = generator or torch.Generator(logits.device).manual_seed(seed)
        tokens += len(logits)
        yield Prediction(number, logits, places, generator, samples)
    check_counted(tokens, number)


def sampled_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batches: Iterable[Batch],
    see: See,
    *,
    seed: int = 0,
    samples: int = 1,
) -> int:
    """Calls `see` with the gradient of each batch's loss, summed over the tokens that count, for sampled labels.

    Labels drawn from the prediction have gradients of mean zero, independent of each other given the inputs. So the
    square of a batch's summed gradient is an unbiased estimate of the sum over its tokens of their squares, the
    Fisher's diagonal (Martens 2020, "New insights and perspectives on the natural gradient method", section 5; for the
    whole batch at once Dangel et al. 2022), and the mean over tokens is Σ G² / (tokens · samples).

    Args:
        model: its output is logits (or has `.logits`).
        parameters: name -> a parameter of the model, frozen or not; no ``.grad`` is touched.
        see: called with {name: gradient}, in the parameters' shapes and dtypes; one that the batch does not reach is
            left out.
        seed: of the labels.
        samples: labels drawn for each token; the passes forward stay the same.

    Returns:
        The number of tokens that counted.

    Raises:
        ValueError: samples below 1; no parameter; no token that counts; a gradient that is not finite.
    """
    check_least(1, samples=samples)
    if not parameters:
        raise ValueError("parameters: expected at least one {name: parameter}, got none")
    weights = list(parameters.values())
    tokens = 0
    with evaluation(model), requiring_grad(weights), torch.enable_grad():
        for prediction in predicted(model, batches, seed, samples):
            for loss, again in prediction.losses():
                found = torch.autograd.grad(loss, weights, retain_graph=again, allow_unused=True)
                gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
                norms = {
                    name: torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
                    for name, g in gradients.items()
                }
                check_finite("a gradient that is", norms, prediction.number)
                see(gradients)
            tokens += len(prediction.logits)
    return tokens
