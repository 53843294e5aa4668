"""Checkpoints as they come: a model's folder, an adapter's, or what `sparse-cl run` wrote of a method."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from sparse_cl.four_domains.sequence import Progress
from sparse_cl.methods import METHODS
from sparse_cl.methods.lora import merged
from sparse_cl.models.loading import load_model


def load_checkpoint(path: str, base: nn.Module) -> nn.Module:
    """The model of a checkpoint, in the dtype and on the device of its base, without adapters: they are merged.

    Args:
        path: a model's folder or Hub name; the folder of an adapter of PEFT on `base`; a method's folder of
            `sparse-cl run` (the model after its last finished domain), or one of the folders in it, a domain's. Of
            `orthogonal-lora` all adapters up to there are merged.
        base: the untouched base model. It may be changed: load it again where it is needed.

    Raises:
        ValueError: the folder of a method that has finished no domain, or that is called like none.
    """
    folder = Path(path)
    finished = _finished(folder)
    if not finished and folder.name in [stage.name for stage in _finished(folder.parent)]:
        stages = _finished(folder.parent)
        finished = stages[: [stage.name for stage in stages].index(folder.name) + 1]
    if finished:
        method = finished[0].parent.name
        if method not in METHODS:
            raise ValueError(
                f"{finished[0].parent}: its folder is called by no method ({', '.join(METHODS)}), so how to load it is "
                "not known; give it the name that sparse-cl run gave it, or the folder of one domain's model"
            )
        return merged(METHODS[method]().restore(base, finished))
    if (folder / "progress.json").is_file():
        raise ValueError(f"{path}: no domain was finished there; let sparse-cl run go on, or give another checkpoint")
    if (folder / "adapter_config.json").is_file():
        import peft

        return merged(peft.PeftModel.from_pretrained(base, folder))
    first = next(base.parameters())
    return load_model(path)[0].to(first.device, first.dtype)


def _finished(folder: Path) -> list[Path]:
    """Folders of the finished domains of a method's folder; none where it is no such folder."""
    path = folder / "progress.json"
    if not path.is_file():
        return []
    progress = Progress.from_json(json.loads(path.read_text(encoding="utf-8")))
    numbers = range(1, len(progress.stages))  # the first stage is the base model
    return [stage for number in numbers for stage in sorted(folder.glob(f"{number}-*"))]
