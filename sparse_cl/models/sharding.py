"""A model whose parameters are split over processes, by torch's FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .parts import has_adapters


def split(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Splits the rows of each parameter over the processes of a mesh, in place; a pass gathers one block at a time.

    Args:
        model: whole, in every process, on any device.
        options: of torch's ``fully_shard``.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = set(getattr(model, "_no_split_modules", None) or ())
    # Inner modules come last.
    for module in reversed(list(model.modules())):
        if module is model or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, **options)
    return model


def split_over_all(model: nn.Module, device: torch.device) -> nn.Module:
    """As `split`, over all processes.

    Args:
        device: this process's, where its part goes.

    Raises:
        ValueError: a parameter has too few rows for some process to hold one; the model is as before then.
    """
    from torch.distributed.device_mesh import init_device_mesh

    processes = dist.get_world_size()
    for name, param in model.named_parameters():
        rows = len(param) if param.dim() else 0
        # Rows are dealt out in chunks of one size. accelerate tells parts of parameters by their addresses, and empty
        # ones have none.
        if -(-rows // processes) * (processes - 1) >= rows:
            raise ValueError(
                f"shard: {name} has {rows} rows, of which {processes} processes cannot all hold some; start fewer"
            )
    return split(model, init_device_mesh(device.type, (processes,)))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """What `from_pretrained` wants of a split model: whole weights on the CPU, in the first process; nothing in others.

    Of a model with adapters these are the adapters' alone. All processes must call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: dict[str, Any] = get_model_state_dict(
        model,
        options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapters(model)),
    )
    own = {name for name, _ in model.named_parameters()}
    # Gathered, tied weights are equal, but no longer one.
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own
    return {name: value for name, value in found.items() if name not in tied}
