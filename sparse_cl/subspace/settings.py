"""What a memory is asked to remember."""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = ("gradients", "inputs")

#: Widths up to this keep the exact second moment while a domain is observed: 4 MB, no more than a wide layer's sketch.
EXACT_WIDTH = 1024

#: Of max_rank "auto": a quarter of a layer's inputs, at least and at most so many. The B of an adapter has few inputs,
#: and of a quarter of them no protection is left.
AUTO_SHARE, AUTO_LEAST, AUTO_MOST = 4, 16, 256


@dataclass(frozen=True)
class Settings:
    """The arguments of a :class:`~sparse_cl.SubspaceMemory`, which says what they mean; stored in its files.

    Raises:
        ValueError: an argument out of range.
    """

    max_rank: int | str | None = None
    energy: float = 0.95
    source: str = "gradients"
    oversample: int | None = None
    seed: int = 0
    share_inputs: bool = True

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {self.source!r}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy: expected a share in (0, 1], got {self.energy}")
        if isinstance(self.max_rank, str) and self.max_rank != "auto":
            raise ValueError(f"max_rank: expected a number, 'auto', or None for no cap, got {self.max_rank!r}")
        if isinstance(self.max_rank, int) and self.max_rank < 1:
            raise ValueError(f"max_rank: expected at least 1, or None for no cap, got {self.max_rank}")
        if self.oversample is not None and self.oversample < 0:
            raise ValueError(f"oversample: expected at least 0, got {self.oversample}")

    def most(self, width: int) -> int:
        """The most directions that are kept of a layer of this width."""
        if self.max_rank == "auto":
            return min(width, AUTO_MOST, max(AUTO_LEAST, width // AUTO_SHARE))
        return width if self.max_rank is None else min(int(self.max_rank), width)

    def sketch_columns(self, width: int) -> int | None:
        """Columns of the sketch of a layer of this width; None if its exact moment is kept."""
        most = self.most(width)
        columns = most + (max(8, most // 8) if self.oversample is None else self.oversample)
        return None if self.max_rank is None or width <= EXACT_WIDTH or columns >= width else columns
