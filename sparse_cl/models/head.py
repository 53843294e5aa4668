"""A language model's output head, which computes logits of those tokens alone that are asked for.

With a vocabulary of 100,000 and more the head is half of a small model's time and most of its activations; prompts and
padding, which no loss counts, are often the greater part of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .passes import IGNORED, head_of


@contextmanager
def logits_only_at(model: nn.Module, tokens: Tensor | None) -> Iterator[None]:
    """While it lasts, a model's logits are (1, n, vocabulary): those of n tokens in the order of the batch.

    What watches the head's input sees all of it, if it was there before. A model without `get_output_embeddings()` is
    left as it is.

    Args:
        tokens: (batch, length) bool, of the batches that pass. None: the first token alone, where a pass is made for
            what stands before the logits. A head with modules of its own, such as an adapter's, is then left as it is:
            what watches may sit inside.

    Raises:
        ValueError: what enters the head are other tokens than those of `tokens`.
    """
    head = head_of(model)
    if head is None or (tokens is None and next(head.children(), None) is not None):
        yield
        return
    kept = None if tokens is None else tokens.flatten().nonzero().flatten()

    def only(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:  # called by keyword
            return None
        rows = args[0].flatten(0, -2)
        if kept is None:
            return rows[:1].unsqueeze(0), *args[1:]
        assert tokens is not None
        if tuple(args[0].shape[:-1]) != tuple(tokens.shape):
            raise ValueError(
                f"tokens: expected those that enter the head, {tuple(args[0].shape[:-1])}, got {tuple(tokens.shape)}"
            )
        return rows[kept.to(rows.device)].unsqueeze(0), *args[1:]

    hook = head.register_forward_pre_hook(only)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def logits_at_labels(model: Any, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a causal language model is called with for the same loss from the logits of labelled tokens alone.

    Only of models of transformers whose loss is its `ForCausalLMLoss`, fed as many tokens as there are labels; the
    others get what was given.

    Args:
        inputs: with `labels` (batch, length), int64, as in transformers: not shifted, −100 where the loss leaves out.
    """
    labels = inputs.get("labels")
    if labels is None or "shift_labels" in inputs or head_of(model) is None or not _hands_on_labels(model):
        yield inputs
        return
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    counted = shifted != IGNORED
    with logits_only_at(model, counted):
        yield {**inputs, "shift_labels": shifted[counted].unsqueeze(0)}


def _hands_on_labels(model: Any) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        return False  # tokens of its own come before those that have labels
    own = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper has the base model's arguments
    forward = inspect.unwrap(type(own).forward)
    passes_on = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(forward).parameters.values())
    # Some compute the loss by themselves, from as many logits as there are labels.
    computes = "loss_function" in forward.__code__.co_names
    return passes_on and computes and getattr(own, "loss_function", None) is ForCausalLMLoss
