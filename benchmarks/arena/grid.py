"""Studies: many runs, each in a folder of its own that resumes, and one file of results that is kept.

A study is a list of `Settings` with one method each, by the name of its folder. `run` makes those that are not done and
gathers all that are into one JSON file; a table is made from that file alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.files import RESULTS, write_json
from sparse_cl.four_domains.results import read_runs
from sparse_cl.four_domains.settings import Settings
from sparse_cl.probes.capacity import Layers

KEPT = Path(__file__).parents[1] / "results" / "arena"
"""Where the results of studies are kept, a file each."""
_BULKY = ("losses", "layers")
"""Of a run, and of what a method reports on a domain."""
_PATHS = ("model", "data", "protect", "reference")


def over(
    base: Settings, orders: Sequence[str], seeds: Sequence[int], points: Mapping[str, Mapping[str, Any]]
) -> dict[str, Settings]:
    """The settings of every point, order and seed, by the folder's name.

    Args:
        base: what all have in common.
        points: name → `method`, `lr`, and `options` of the method.

    Returns:
        By "name-order-seedN", or the name alone where there is one order and one seed.
    """
    several = len(orders) * len(seeds) > 1
    found = {}
    for seed in seeds:
        for order in orders:
            for name, point in points.items():
                method = point["method"]
                options = {method: point["options"]} if point.get("options") else {}
                settings = replace(base, methods=(method,), lr={method: point["lr"]}, method_options=options)
                found[f"{name}-{order}-seed{seed}" if several else name] = settings.arranged(order, seed)
    return found


def run(study: Mapping[str, Settings], out: Path, part: int = 0, parts: int = 1) -> None:
    """Make the runs that are not done, every `parts`-th from the `part`-th on.

    Of a finished run the weights are deleted.
    """
    for name, settings in list(study.items())[part::parts]:
        folder = out / name
        if not (folder / RESULTS).is_file():
            experiment.run(settings, folder)
        for weights in folder.glob("*/*"):
            if weights.is_dir():
                shutil.rmtree(weights)


def gather(study: Mapping[str, Settings], out: Path) -> list[dict[str, Any]]:
    """The records of the runs that are done, without what is bulky and with names of files for paths."""
    done = [name for name in study if (out / name / RESULTS).is_file()]
    return [{"name": name, **kept} for name in done for kept in _kept(out / name)]


def keep(name: str, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write a study's results where they are kept."""
    KEPT.mkdir(exist_ok=True)
    write_json(KEPT / f"{name}.json", {"runs": list(records)})
    return KEPT / f"{name}.json"


def kept(name: str) -> list[dict[str, Any]]:
    """A study's results.

    Raises:
        ValueError: none are kept.
    """
    path = KEPT / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"study: no results of {name!r} are kept in {KEPT}; run it first")
    return json.loads(path.read_text(encoding="utf-8"))["runs"]


def _kept(folder: Path) -> Iterator[dict[str, Any]]:
    for run in read_runs(folder):
        settings = dict(run["settings"])
        for name in _PATHS:
            settings[name] = None if settings.get(name) is None else Path(settings[name]).name
        domains = []
        for record in run.get("domain_records", ()):
            room = {"room": _room(record["layers"])} if record.get("layers") else {}
            domains.append({**_slim(record), **room})
        yield {**_slim(run), "settings": settings, "domain_records": domains}


def _room(layers: Layers) -> dict[str, float]:
    """Means over layers of the free share of directions, after the domain, and of B, the gradient's share before it."""
    return {
        "free": fmean(layer["free"] / layer["width"] for layer in layers.values()),
        "surviving": fmean(layer["surviving"] for layer in layers.values()),
    }


def _slim(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _BULKY}
