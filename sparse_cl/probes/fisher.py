"""The diagonal of the Fisher information: how much each single weight matters to what a model predicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .sampled_gradients import sampled_gradients


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    parameters: Mapping[str, nn.Parameter] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information, mean over the tokens that predict an answer token.

    One squared gradient per sequence, with labels drawn from the model (`sampled_gradients`): a sum over fewer tokens
    than a whole batch's has less variance, at a pass forward and backward for each sequence.

    Args:
        batches: by name, with input_ids, and attention_mask and labels as in training.
        parameters: name -> parameter; None: all of the model.
        seed: of the labels.

    Returns:
        name -> as the parameter, float32 (float64 for float64 parameters), in nats² per token; zero for a parameter
        that the prediction does not depend on.

    Raises:
        ValueError: as `sampled_gradients`.
    """
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    sums = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        for name, p in parameters.items()
    }

    def add(gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            gradient = gradient.to(sums[name].dtype)
            sums[name].addcmul_(gradient, gradient)

    tokens = sampled_gradients(model, parameters, _sequences(batches), add, seed=seed)
    return {name: total.div_(tokens) for name, total in sums.items()}


def _sequences(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            yield {name: part[row : row + 1] for name, part in batch.items()}
