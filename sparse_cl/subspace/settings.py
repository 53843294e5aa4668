"""What a memory is asked to remember."""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = ("gradients", "inputs")

#: Widths up to this keep the exact second moment: 4 MB, no more than a sketch of a wide layer.
EXACT_WIDTH = 1024


@dataclass(frozen=True)
class Settings:
    """The arguments of a :class:`~sparse_cl.SubspaceMemory`, which says what they mean; stored in its files.

    Raises:
        ValueError: an argument out of range.
    """

    max_rank: int | None = None
    energy: float = 0.95
    source: str = "gradients"
    oversample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {self.source!r}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy: expected a share in (0, 1], got {self.energy}")
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank: expected at least 1, or None for no cap, got {self.max_rank}")
        if self.oversample is not None and self.oversample < 0:
            raise ValueError(f"oversample: expected at least 0, got {self.oversample}")
        if self.oversample is None and self.max_rank is not None:
            object.__setattr__(self, "oversample", max(8, self.max_rank // 8))

    def sketch_columns(self, width: int) -> int | None:
        """Columns of the sketch of a layer of this width; None if its exact moment is kept."""
        if self.max_rank is None or self.oversample is None or width <= EXACT_WIDTH:
            return None
        columns = self.max_rank + self.oversample
        return columns if columns < width else None
