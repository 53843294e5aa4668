"""Which two of each four weights matter most, and what the model computes with these alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_cl.masks import ElementMask, Mask, TwoFourMask
from sparse_cl.models.parts import Linear, is_transposed
from sparse_cl.models.passes import stream

from .fisher import diagonal_fisher
from .gradients import watched_layers
from .inputs import energy_watches

SCORES = ("wanda", "fisher")


def two_four_layers(model: nn.Module) -> dict[str, Linear]:
    """Weight name -> the linear layer of a residual block that has it.

    Raises:
        ValueError: no such layer; one whose weight is (in, out), or whose inputs are no multiple of 4.
    """
    layers = watched_layers(model, None)
    for name, layer in layers.items():
        if is_transposed(layer):
            raise ValueError(
                f"{name} is a {type(layer).__name__}, whose weight is (inputs, outputs); 2:4 goes along the inputs and "
                "needs them last. Take a model of torch.nn.Linear layers"
            )
        if layer.weight.shape[1] % 4:
            raise ValueError(
                f"{name} has {layer.weight.shape[1]} inputs, where 2:4 needs a multiple of 4. Take another model, or "
                "another method"
            )
    return {f"{name}.weight": layer for name, layer in layers.items()}


def two_four_masks(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], score: str = "wanda", *, seed: int = 0
) -> dict[str, TwoFourMask]:
    """The two of each four weights along the input that matter most to a text, for each linear layer of the blocks.

    Args:
        score: "wanda": |W_ij| ‖x_j‖₂ over the text's tokens but each sequence's first (Sun et al. 2023); "fisher":
            W_ij² F_ij, with F the Fisher's diagonal: twice the loss that zeroing the weight costs to second order
            (LeCun, Denker & Solla 1990). Of equal ones the first.
        seed: of the labels that the Fisher is sampled with.

    Returns:
        Weight name -> mask of those two, on the weight's device.

    Raises:
        ValueError: another score, and those of `two_four_layers`.
    """
    scores = _scores(model, batches, score, seed)
    return {name: TwoFourMask(_best(values, 2)) for name, values in scores.items()}


def one_of_four_masks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    taken: Mapping[str, Mask],
    score: str = "wanda",
    *,
    seed: int = 0,
) -> dict[str, ElementMask]:
    """As `two_four_masks`, the one of each four that matters most among those that are not `taken`.

    Args:
        taken: weight name -> mask that leaves at least one of each four.
    """
    scores = _scores(model, batches, score, seed)
    # No score is below 0.
    open_ones = {name: values.masked_fill(taken[name].to_dense(), -1) for name, values in scores.items()}
    return {name: ElementMask(_best(values, 1)) for name, values in open_ones.items()}


def _scores(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], score: str, seed: int) -> dict[str, Tensor]:
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    layers = two_four_layers(model)
    if score == "fisher":
        fisher = diagonal_fisher(model, batches, {name: layer.weight for name, layer in layers.items()}, seed=seed)
        return {name: fisher[name] * layers[name].weight.detach().square() for name in layers}
    watches, energies = energy_watches(layers)
    stream(model, watches, batches, tokens="text")
    return {name: layer.weight.detach().abs() * energies[name].sqrt() for name, layer in layers.items()}


@contextmanager
def only_two_four(model: nn.Module, masks: Mapping[str, Mask], *, semi_structured: bool = False) -> Iterator[nn.Module]:
    """While it lasts, the model computes with the masks' weights alone: the others count as zero.

    For inference. The parameters themselves are not touched, and are the modules' again afterwards, the same objects.

    Args:
        masks: name of an `nn.Linear`'s weight -> the two of each four that count.
        semi_structured: compress the weights for the sparse tensor cores (`torch.sparse`, CUDA of compute capability
            8.0 on). It wants float16 or bfloat16, and rows and columns in multiples of 32 and 64 at most.

    Raises:
        ValueError: a name that is no weight of an `nn.Linear`, a mask of another shape, or a weight that cannot be
            compressed.
    """
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in masks}
    swapped = {}
    for name, mask in masks.items():
        module = modules[name]
        if not isinstance(module, nn.Linear) or not name.endswith("weight"):
            raise ValueError(f"masks: {name!r} is not the weight of a torch.nn.Linear")
        if tuple(mask.shape) != tuple(module.weight.shape):
            raise ValueError(f"masks: {name!r} is {tuple(module.weight.shape)}, but its mask is {tuple(mask.shape)}")
        weight = module.weight.detach()
        weight = weight.masked_fill(~mask.to(weight.device).to_dense(), 0)
        if semi_structured:
            weight = _compressed(weight, name)
        swapped[name] = nn.Parameter(weight, requires_grad=False)
    own = {name: module.weight for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight = swapped[name]
        yield model
    finally:
        for name, module in modules.items():
            module.weight = own[name]


def _compressed(weight: Tensor, name: str) -> Tensor:
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name} is {weight.dtype}; the sparse kernels take float16 and bfloat16: model.bfloat16()")
    try:
        return torch.sparse.to_sparse_semi_structured(weight)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} on {weight.device} cannot be compressed ({error}); leave "
            "semi_structured out"
        ) from error


def _best(scores: Tensor, count: int) -> Tensor:
    """Bool of the scores' shape: the `count` largest of each four, of equal ones the first."""
    groups = scores.view(-1, 4)
    chosen = groups.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, chosen, True).view(scores.shape)
