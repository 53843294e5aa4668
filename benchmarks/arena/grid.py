"""Studies: many runs, each in a folder of its own that resumes, and one file of results that is kept.

A study is a list of `Settings` with one method each, by the name of its folder. `run` makes those that are not done,
and after each writes all that are into one JSON file. That file is enough to go on from, on another machine too, and a
table is made from it alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.experiment import INPUTS
from sparse_cl.four_domains.files import BASE, RESULTS, read_json, write_json
from sparse_cl.four_domains.folder import SETTINGS
from sparse_cl.four_domains.results import read_runs
from sparse_cl.four_domains.settings import GIVEN, Settings
from sparse_cl.methods.carried import fingerprint
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


def run(name: str, study: Mapping[str, Settings], out: Path, part: int = 0, parts: int = 1) -> list[dict[str, Any]]:
    """Make the runs that are not done, every `parts`-th from the `part`-th on, and return the results of all that are.

    Of a finished run the weights are deleted. A warning names what was kept of other settings, and is dropped.

    Args:
        name: of the study, and of its file in `KEPT`.
        out: of the runs, a folder each.
    """
    before = {run["name"] for run in kept(name)} if _file(name).is_file() else set()
    found = keep(name, study, out)
    if dropped := sorted(before - {run["name"] for run in found}):
        warnings.warn(f"{_file(name)}: {', '.join(dropped)} had other settings, or are not in the study", stacklevel=2)
    for run_name, settings in list(study.items())[part::parts]:
        # One that failed is tried again: another machine may have the memory that it wants.
        if any(run["name"] == run_name and "failed" not in run for run in found):
            continue
        _share_base(settings, out, out / run_name)
        experiment.run(settings, out / run_name)
        _share_base(settings, out, out / run_name)
        for weights in (out / run_name).glob("*/*"):
            if weights.is_dir():
                shutil.rmtree(weights)
        found = keep(name, study, out)
    return found


def keep(name: str, study: Mapping[str, Settings], out: Path) -> list[dict[str, Any]]:
    """Write a study's results where they are kept, those that were kept with them; returns them in the study's order.

    Left out is what is bulky; a path is its last name. What was kept of other settings is dropped.
    """
    with _alone(out):
        before = {run["name"]: run for run in (kept(name) if _file(name).is_file() else ())}
        found: list[dict[str, Any]] = []
        for run_name, settings in study.items():
            made = _kept(out / run_name) if (out / run_name / RESULTS).is_file() else ()
            if own := [{"name": run_name, **run} for run in made if _same(run["settings"], settings)]:
                found += own
            elif run_name in before and _same(before[run_name]["settings"], settings):
                found.append(before[run_name])
        if found:
            KEPT.mkdir(exist_ok=True)
            write_json(_file(name), {"runs": found})
        return found


def kept(name: str) -> list[dict[str, Any]]:
    """A study's results.

    Raises:
        ValueError: none are kept.
    """
    if not _file(name).is_file():
        raise ValueError(f"study: no results of {name!r} are kept in {KEPT}; run it first")
    return json.loads(_file(name).read_text(encoding="utf-8"))["runs"]


def best_points(name: str) -> dict[str, str]:
    """Method → the point of a study that ends lowest (ACC), of the runs that are kept with the first order and seed."""
    runs = kept(name) if _file(name).is_file() else []
    scores: dict[str, dict[str, float]] = {}
    for run in runs:
        point, of, _ = run["name"].rpartition(f"-{GIVEN}-seed0")
        if of and "failed" not in run:
            scores.setdefault(run["method"], {})[point] = run["summary"]["acc"]
    return {method: min(own, key=own.__getitem__) for method, own in scores.items()}


def _file(name: str) -> Path:
    return KEPT / f"{name}.json"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time of those that run parts of a study."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _share_base(settings: Settings, out: Path, folder: Path) -> None:
    """Give a run the base model's scores that another run of the study has, or keep its own for the others."""
    own = ["methods", "lr", "options", "method_options", "autocast", "steps", "batch_size", "score"]
    # The embedded data are drawn from the seed; those of a folder are the same for all.
    own += ["seed"] if settings.data else []
    scored = {key: value for key, value in settings.to_json().items() if key not in own}
    scored["model_files"] = fingerprint(str(settings.model))
    shared = out / f"base-{hashlib.sha256(json.dumps(scored, sort_keys=True).encode()).hexdigest()[:12]}.json"
    # With the digests of what was read: the run refuses a base that was scored on other data.
    names = (BASE, INPUTS)
    with _alone(out):
        if shared.is_file() and not folder.exists():
            folder.mkdir(parents=True)
            write_json(folder / SETTINGS, settings.to_json())
            for name, content in read_json(shared).items():
                write_json(folder / name, content)
        elif not shared.is_file() and all((folder / name).is_file() for name in names):
            write_json(shared, {name: read_json(folder / name) for name in names})


def _same(recorded: Mapping[str, Any], settings: Settings) -> bool:
    """Whether a run was made with these settings, as far as its record knows them; wherever the data lay.

    An older record does not know each of today's options; what it would say of `score` is known.
    """
    (method,) = settings.methods
    own = {"lr": settings.lr_of(method), "method": settings.make_method(method).settings()}
    now = json.loads(json.dumps({**_named(settings.to_json()), **own}))
    known = {key: value for key, value in recorded.items() if key not in ("data", "lr")}
    # A rate may be written as a product, which ends in other bits.
    same_lr = math.isclose(recorded["lr"], own["lr"])
    return same_lr and all(now.get(key) == value for key, value in {"score": None, **known}.items())


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the names of files for paths."""
    return {key: Path(value).name if value and key in _PATHS else value for key, value in settings.items()}


def _kept(folder: Path) -> Iterator[dict[str, Any]]:
    for run in read_runs(folder):
        domains = []
        for record in run.get("domain_records", ()):
            room = {"room": _room(record["layers"])} if record.get("layers") else {}
            domains.append({**_slim(record), **room})
        yield {**_slim(run), "settings": _named(run["settings"]), "domain_records": domains}


def _room(layers: Layers) -> dict[str, float]:
    """Means over layers of the free share of directions, after the domain, and of B, the gradient's share before it."""
    return {
        "free": fmean(layer["free"] / layer["width"] for layer in layers.values()),
        "surviving": fmean(layer["surviving"] for layer in layers.values()),
    }


def _slim(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _BULKY}
