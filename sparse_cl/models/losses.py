"""The answer loss of a language model: cross-entropy of the tokens that count, in nats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .passes import Batch, answer_tokens, call, evaluation

Loss = Callable[[nn.Module, Batch], tuple[Tensor, int]]
"""Maps a model and a batch to the loss summed over tokens (0-d, in the graph) and the number of these tokens."""


def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the model predicts at each place that counts.

    Returns:
        logits: (t, classes), in the model's dtype.
        targets: (t,) int64, the next tokens; None for a batch that has no tokens.
        places: (t,) int64, indices of the predicting tokens in the flattened (batch, length): the token *before* each
            that counts; None where every row predicts.
    """
    output: Any = call(model, batch)
    output = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    counted = answer_tokens(batch, "answers")
    if counted is None:
        return output.reshape(-1, output.shape[-1]), None, None
    assert isinstance(batch, Mapping)  # a batch with tokens is
    # A token is predicted from the one before it.
    before = torch.zeros_like(counted)
    before[:, :-1] = counted[:, 1:]
    places = before.flatten().nonzero().flatten().to(output.device)
    targets = batch["labels" if "labels" in batch else "input_ids"].to(output.device).flatten()[places + 1]
    return output.reshape(-1, output.shape[-1])[places], targets, places


def answer_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of −ln p over the tokens of a batch that count, in nats (0-d float32 or float64), and how many they are.

    Raises:
        ValueError: the batch has no tokens to predict; give a loss of your own.
    """
    logits, targets, _ = predictions(model, batch)
    if targets is None:
        raise ValueError(
            "loss: a batch without input_ids has no next token to predict; pass "
            "loss=lambda model, batch: (loss summed over the batch, number of its entries)"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide, targets, reduction="sum"), len(targets)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], loss: Loss | None = None) -> float:
    """Mean over all tokens that count, in nats per token, in evaluation mode.

    Raises:
        ValueError: no token counts.
    """
    total: float | Tensor = 0.0
    count = 0
    with evaluation(model):
        for batch in batches:
            summed, tokens = (loss or answer_loss)(model, batch)
            total, count = total + summed.double(), count + tokens
    if not count:
        raise ValueError("batches: expected at least one with a token that counts, got none; is the domain empty?")
    return float(total) / count
