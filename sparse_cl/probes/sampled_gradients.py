"""Gradients with labels drawn from the model's own prediction: what estimates of the Fisher information are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sparse_cl.models.losses import predictions
from sparse_cl.models.passes import Batch, evaluation

from .gradients import requiring_grad

See = Callable[[dict[str, Tensor]], None]


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
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if not parameters:
        raise ValueError("parameters: expected at least one {name: parameter}, got none")
    weights = list(parameters.values())
    generator: torch.Generator | None = None
    number = tokens = 0
    with evaluation(model), requiring_grad(weights), torch.enable_grad():
        for number, batch in enumerate(batches, 1):
            logits, _, _ = predictions(model, batch)
            if not len(logits):
                continue
            generator = generator or torch.Generator(logits.device).manual_seed(seed)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            chances = wide.detach().softmax(-1)
            if not chances.isfinite().all():
                raise ValueError(f"logits that are not finite in batch {number}; look at that batch and the weights")
            for sample in range(samples):
                labels = torch.multinomial(chances, 1, generator=generator).flatten()
                loss = nn.functional.cross_entropy(wide, labels, reduction="sum")
                found = torch.autograd.grad(loss, weights, retain_graph=sample < samples - 1, allow_unused=True)
                gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
                _check_finite(gradients, number)
                see(gradients)
            tokens += len(logits)
    if not tokens:
        raise ValueError(
            "batches: expected at least one with a token that counts, got "
            + (f"{number} without any" if number else "no batch; is the domain empty?")
        )
    return tokens


def _check_finite(gradients: Mapping[str, Tensor], number: int) -> None:
    # One transfer per batch, not one per parameter.
    if not gradients:
        return
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients.values()]
    finite = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite()
    if not finite.all():
        raise ValueError(
            f"a gradient that is not finite in {list(gradients)[int((~finite).nonzero()[0])]}, batch {number}; look at "
            "that batch, and at the model's weights and dtype (float16 overflows where bfloat16 does not)"
        )
