"""A report as one HTML file that needs nothing else: no network, no script, no file beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_cl import storage
from sparse_cl.four_domains.files import write_json

from .section import PAGE_WIDTH, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = "report.html.jinja"


def write_folder(
    out: Path,
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: str,
) -> None:
    """Makes the folder `out` with `report.html`, `results.json` (the record) and, if any, `tensors.safetensors`.

    Args:
        kind: of the tensors' file, see `sparse_cl.storage.write`.

    Raises:
        ValueError: as `write_report`.
    """
    out.mkdir(parents=True, exist_ok=True)
    if tensors:
        storage.write(out / "tensors.safetensors", kind, tensors)
    write_report(out / "report.html", title, facts, sections)
    # Last: who finds it finds all of the report.
    write_json(out / "results.json", record)


def write_report(path: str | Path, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> None:
    """Write a report; equal arguments give equal bytes. All text is escaped.

    Args:
        path: the file; what is there is replaced.
        title: of the whole report.
        facts: name → value, shown at its top: model, data, settings, versions.
        sections: in the order in which they are read.

    Raises:
        ValueError: two sections have one title; nothing is written.
    """
    import jinja2

    titles = [section.title for section in sections]
    if doubled := {name for name in titles if titles.count(name) > 1}:
        raise ValueError(f"sections: expected titles of their own, got {min(doubled)!r} twice; rename one of them")
    template = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = environment.from_string(template).render(
        title=title,
        facts=facts,
        sections=[
            {"section": section, "figures": [_picture(figure) for figure in section.figures]} for section in sections
        ],
    )
    Path(path).write_text(text, encoding="utf-8")


def _picture(figure: Figure) -> dict[str, str | float]:
    # As an image of its own, not inline: ids of one picture cannot meet those of another.
    import matplotlib

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "sparse_cl"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    inches = figure.get_figwidth()
    return {
        "source": "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
        "percent": round(min(1.0, inches / PAGE_WIDTH) * 100, 1),
        "inches": round(inches, 2),
    }
