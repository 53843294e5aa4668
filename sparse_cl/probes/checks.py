"""Arguments that several probes take, and what is said where they cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_least(least: int, **numbers: int) -> None:
    """Raises ValueError for the first number below `least`."""
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_shares(**shares: float) -> None:
    """Raises ValueError for the first one outside (0, 1]."""
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name}: expected a share in (0, 1], got {share}")


def check_domains(least: int, **by_domain: Iterable[str]) -> None:
    """Raises ValueError for fewer domains than `least`, 1 or 2."""
    for name, domains in by_domain.items():
        if len(list(domains)) < least:
            wanted = "two domains" if least == 2 else "one domain"
            raise ValueError(f"{name}: expected at least {wanted}, got {', '.join(domains) or 'none'}")


def check_read_again(**by_domain: Mapping[str, Any]) -> None:
    """Raises ValueError where a domain's batches can be read only once."""
    for name, domains in by_domain.items():
        for domain, batches in domains.items():
            if iter(batches) is batches:
                raise ValueError(f"{name}: those of {domain} can be read only once; give a list of them")


def check_alike(name: str, unit: str, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether all domains have the layers, and the sizes of layers, that the first has.

    Args:
        name: of the argument.
        unit: of which a layer has so many, as "neurons".
        sizes: domain -> layer -> its size.

    Raises:
        ValueError: one has others; the first layer that differs is named.
    """
    (first, expected), *others = sizes.items()
    for domain, found in others:
        for layer in [*expected, *found]:
            if expected.get(layer) != found.get(layer):
                raise ValueError(
                    f"{name}: expected one model, but {layer} has {expected.get(layer, 'no')} {unit} in {first} and "
                    f"{found.get(layer, 'none')} in {domain}; run the probe on one model, with the same modules"
                )


def check_counted(tokens: int, batches: int) -> None:
    """Raises ValueError where not one token of so many batches counted."""
    if not tokens:
        raise ValueError(
            "batches: expected at least one with a token that counts, got "
            + (f"{batches} without any" if batches else "no batch; is the domain empty?")
        )


def check_finite(what: str, sums: Mapping[str, Tensor], batch: int) -> None:
    """Raises ValueError, naming layer and batch, where the sum (0-d) of a layer's numbers, `what`, is not finite."""
    if not sums:
        return
    # One transfer per batch, not one per layer.
    device = next(iter(sums.values())).device
    finite = torch.stack([total.to(device, torch.float64) for total in sums.values()]).isfinite()
    if not finite.all():
        raise ValueError(
            f"{what} not finite in {list(sums)[int((~finite).nonzero()[0])]}, batch {batch}; look at that batch, and "
            "at the model's weights and dtype (float16 overflows where bfloat16 does not)"
        )
