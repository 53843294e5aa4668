"""What a method lets through of a domain's gradient, measured before the domain is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from sparse_cl.layout import is_sharded, whole
from sparse_cl.models.losses import answer_loss
from sparse_cl.models.passes import evaluation

from .base import Batch

_GRADIENT_BATCHES = 4
"""Batches whose gradients are looked at; more change the answer little."""


def surviving_shares(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    inside: Callable[[str, Tensor], float],
) -> dict[str, float]:
    """By weight, the share of its gradients' energy that is outside what is protected.

    Energies are summed over halves b of the first batches: 1 - Σ s(G_b) ‖G_b‖² / Σ ‖G_b‖², s what `inside` says; 1
    where there is no gradient.

    Args:
        inside: of a weight's name and gradient, the share of its energy that is inside.

    Raises:
        ValueError: as `each_gradient`.
    """
    total, taken = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)

    def see(name: str, gradient: Tensor) -> None:
        energy = float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        total[name] += energy
        taken[name] += energy * inside(name, gradient)

    each_gradient(model, weights, batches, see)
    return {name: 1.0 - taken[name] / total[name] if total[name] else 1.0 for name in weights}


def each_gradient(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    see: Callable[[str, Tensor], None],
) -> None:
    """Shows the gradient of each weight on each half of the first batches, by the mean answer loss, in evaluation mode.

    Holds one gradient at a time, and runs half a batch, since its float32 activations may take as much memory as a
    whole batch under autocast. Whoever can train an adapter has the memory for this, unless activations are
    checkpointed, which models do in training mode only. Modes, flags and gradients are restored.

    Args:
        weights: by name. No other parameter gets a gradient.
        see: called with a name and the gradient, on the weight's device, which it may not keep.

    Raises:
        ValueError: a loss or gradient that is not finite.
    """
    number = 0

    def show(name: str, weight: Tensor) -> None:
        given, weight.grad = weight.grad, None
        assert given is not None  # the hook runs once it is there
        gradient = whole(given)
        if not gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)).isfinite():
            raise ValueError(_not_finite(f"gradient of {name}", number))
        see(name, gradient)

    with only_gradients_of(model, weights.values()), evaluation(model), torch.enable_grad():
        handles = [
            weight.register_post_accumulate_grad_hook(lambda w, name=name: show(name, w))
            for name, weight in weights.items()
        ]
        try:
            for number, batch in enumerate(islice(batches, _GRADIENT_BATCHES), 1):
                for half in _halves(batch):
                    loss, count = answer_loss(model, half)
                    if not loss.isfinite():
                        raise ValueError(_not_finite("loss", number))
                    if count:
                        # Of the mean: a sum over a long batch could overflow in float16.
                        (loss / count).backward()
                    for name, weight in weights.items():
                        # FSDP2 sets gradients without running hooks.
                        if weight.grad is not None:
                            show(name, weight)
        finally:
            for handle in handles:
                handle.remove()


def _halves(batch: Batch) -> Iterator[Batch]:
    records = len(batch["input_ids"])
    for rows in torch.arange(records).chunk(2):
        yield {name: values[rows[0] : rows[-1] + 1] for name, values in batch.items()}


def _not_finite(what: str, batch: int) -> str:
    return (
        f"the {what} is not finite in batch {batch} of the new domain; look at that batch, and at the model's weights "
        "and dtype (float16 overflows where bfloat16 does not)"
    )


@contextmanager
def only_gradients_of(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these and for nothing else; every flag and gradient is put back.

    Of a model that FSDP2 has split all parameters get one: it heeds the flags of its first pass for good.
    """
    state = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    asked = {id(weight) for weight in weights}
    split = any(is_sharded(p) for p, _, _ in state)
    try:
        for p, flag, _ in state:
            p.grad = None
            p.requires_grad_(flag if split else id(p) in asked)
        yield
    finally:
        for p, flag, grad in state:
            p.requires_grad_(flag)
            p.grad = grad
