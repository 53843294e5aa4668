"""What `sparse-cl probe` is told to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROBES = ("activation", "gradients", "curvature", "rank", "capacity")
"""What can be asked for. "activation": sparsity, overlap, hubs and dormant neurons; "gradients": cosines, angles and
interference."""


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of `sparse-cl probe`.

    Attributes:
        models: folders or Hub names of causal language models; none: the embedded one.
        data, domains: see `data.load_domains`.
        probes: some of `PROBES`.
        records: training records of each domain, the first ones.
        batch_size: records a pass.
        max_length: tokens of prompt and response together.
        blocks: residual blocks that probes which keep matrices look at, evenly spread; activations are seen in all.
        energy: share of the inputs' energy that the directions in use explain.
        critical: whether to search the critical sparsity, which takes about ten passes more over each domain.
        dtype: of the weights: "float32", or "bfloat16" for models that are large.
        seed: of everything random.
    """

    models: tuple[str, ...] = ()
    data: str | None = None
    domains: tuple[str, ...] = ("code", "math", "medical", "general")
    probes: tuple[str, ...] = PROBES
    records: int = 128
    batch_size: int = 16
    max_length: int = 256
    blocks: int = 8
    energy: float = 0.95
    critical: bool = False
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("records", "batch_size", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 16:
            raise ValueError(f"max_length must be at least 16 tokens, got {self.max_length}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy: expected a share in (0, 1], got {self.energy}")
        for name in self.probes:
            if name not in PROBES:
                raise ValueError(f"unknown probe {name!r}; there are {', '.join(PROBES)}")
        if not self.probes:
            raise ValueError(f"probes: expected at least one of {', '.join(PROBES)}, got none")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), **{name: list(getattr(self, name)) for name in ("models", "domains", "probes")}}


def check_out(out: Path) -> None:
    """Whether `out` may be a new report's folder.

    Raises:
        ValueError: it is a file, or a folder that is not empty.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out must be a folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another --out, or delete it")
