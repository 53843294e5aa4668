"""What a report shows of one probe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from sparse_cl.four_domains.figures import PAGE_WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE_WIDTH", "Section", "Table", "decimal", "mean_of_known", "nearest", "new_figure", "span", "within"]


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. The first column names the row; the others are numbers, and stand to the right.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(
                    f"table: expected {len(self.header)} cells in each row, as in its header, got {len(row)} in row "
                    f"{number} ({', '.join(map(str, row[:3]))}, ...)"
                )

    @classmethod
    def of_columns(cls, columns: Iterable[tuple[str, Iterable[str]]]) -> Table:
        """From the head and the cells of each column; columns must be equally long."""
        heads, cells = zip(*columns, strict=True)
        return cls(heads, tuple(zip(*cells, strict=True)))


@dataclass(frozen=True)
class Section:
    """One question that a report answers.

    Attributes:
        title: a few words, unique in a report.
        sentence: what is seen, computed from the numbers, true also where the conjecture fails.
        figures: made by `new_figure`, drawn for a page `PAGE_WIDTH` inches wide.
        table: the numbers behind the sentence.
        note: definitions, formulas, the null, the ceiling and what to beware of: one short paragraph.
    """

    title: str
    sentence: str
    figures: tuple[Figure, ...] = ()
    table: Table | None = None
    note: str = ""


def decimal(value: float | None) -> str:
    """Three decimals; a dash for what is not known."""
    # Debiased estimates lie about 0 on both sides; a zero has no sign.
    return "–" if value is None else f"{round(value, 3) + 0.0:.3f}"


def span(values: Sequence[float] | None) -> str:
    """From the least to the largest; a dash for none."""
    return f"{decimal(min(values))} to {decimal(max(values))}" if values else "–"


def within(interval: Sequence[float | None] | None, form: str = ".3f") -> str:
    """An interval in brackets, to stand after its estimate; nothing where it is not known."""
    if interval is None or None in interval:
        return ""
    return " [{}, {}]".format(*(format(end, form) for end in interval))


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Of those that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def nearest(values: Sequence[float], wanted: float) -> int:
    """The index of the value that is nearest in proportion to a positive one."""
    return min(range(len(values)), key=lambda i: abs(values[i] / wanted - 1))
