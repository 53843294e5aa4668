"""Many runs by method and settings: means and intervals over seeds, orders apart and together."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_cl.four_domains.evaluate import METRICS
from sparse_cl.four_domains.folder import differences
from sparse_cl.four_domains.metrics import LOWER_IS_BETTER, intransigence
from sparse_cl.four_domains.results import RESULTS, read_runs
from sparse_cl.four_domains.verdict import COSTS

from .intervals import Interval, interval

SAME = (
    *("model", "data", "reference", "steps", "batch_size", "max_length", "eval_records", "split", "metrics"),
    *("score", "domains"),
)
"""Settings that must be equal for runs to be compared; of `domains` the order may differ."""
SCORES = ("acc", "learning_accuracy", "learned", "forgetting", "gain_lost", "bwt", "intransigence")
TOGETHER = "all orders"


class EveryRunFailed(ValueError):
    """There is nothing to compare; the message has a line for each run."""


@dataclass
class Row:
    """The runs of one method with one set of settings.

    Attributes:
        name: the method, and what of its settings differs from its other rows.
        settings: learning rate, the method's own, autocast, and the text it protects; with one level.
        runs: (order, seed) → what a run gave: numbers by name.
    """

    name: str
    method: str
    kind: str
    settings: dict[str, Any]
    runs: dict[tuple[str, int], dict[str, Any]]

    def seeds(self, order: str) -> list[int]:
        return sorted(seed for of, seed in self.runs if of == order)

    def over_seeds(self, order: str, column: str, metric: str, orders: Sequence[str]) -> Interval | None:
        """A column's mean and interval; `TOGETHER`: a seed counts with its mean over the orders, where it has all."""
        if order != TOGETHER:
            return interval([self._value(order, seed, column, metric) for seed in self.seeds(order)])
        values = []
        for seed in self.seeds(orders[0]):
            found = [self._value(of, seed, column, metric) for of in orders]
            values.append(None if None in found else statistics.fmean(found))
        return interval(values)

    def _value(self, order: str, seed: int, column: str, metric: str) -> float | None:
        return self.runs.get((order, seed), {}).get(metric, {}).get(column)


@dataclass
class Comparison:
    """Rows of several runs.

    Attributes:
        rows: of every method and setting.
        orders: names of domains with arrows, in the order in which they were found.
        settings: those in `SAME`.
        failed: a line for each run that failed.
    """

    rows: list[Row]
    orders: list[str]
    settings: dict[str, Any]
    failed: list[str]

    def sections(self) -> list[str]:
        """The orders, and `TOGETHER` where there are several."""
        return [*self.orders, TOGETHER] if len(self.orders) > 1 else self.orders

    def columns(self, metric: str) -> list[str]:
        """What there is to show of a metric; costs and drift stand with bits per byte."""
        columns = [*SCORES, *(("reference_change", "drift", *COSTS) if metric == METRICS[0] else ())]
        runs = [run[metric] for row in self.rows for run in row.runs.values() if metric in run]
        return [column for column in columns if any(run[column] is not None for run in runs)]

    def get(self, row: Row, section: str, column: str, metric: str = METRICS[0]) -> Interval | None:
        return row.over_seeds(section, column, metric, self.orders)


def find_folders(folders: Sequence[Path]) -> list[Path]:
    """Folders of runs in and under the given ones.

    Raises:
        ValueError: none is there.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        here = [path.parent for path in sorted(folder.rglob(RESULTS)) if _is_run(path)]
        if not here:
            raise ValueError(f"{folder}: no {RESULTS} of sparse-cl run in it or below; give the --out of finished runs")
        found |= dict.fromkeys(path.resolve() for path in here)
    return list(found)


def _is_run(path: Path) -> bool:
    """Whether it is what `sparse-cl run` writes; `sparse-cl probe` and `drift` call their files by the same name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    return isinstance(data, dict) and "runs" in data


def _numbers(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a run, by metric and column."""
    before, after = run["R_reference"][0], run["R_reference"][-1]
    summaries = run["summary"]["by_metric"]
    numbers = {metric: {name: found[name] for name in SCORES} for metric, found in summaries.items()}
    numbers[METRICS[0]] |= {
        "reference_change": None if before is None else after - before,
        "drift": run["drift"][-1],
        **{cost: run[cost] for cost in COSTS},
    }
    numbers["R"] = run["R"]
    return numbers


def _own_settings(run: Mapping[str, Any]) -> dict[str, Any]:
    settings = run["settings"]
    own = {"lr": settings["lr"], **settings["method"], "autocast": settings.get("autocast")}
    own["protect"] = settings.get("protect") if run.get("protects") else None
    return own


def gather(folders: Sequence[Path]) -> Comparison:
    """Read the runs in and under the folders.

    Raises:
        ValueError: there is none; or two that cannot be compared, with what differs.
    """
    return gather_runs((folder, run) for folder in find_folders(folders) for run in read_runs(folder))


def same_settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal of runs that are compared."""
    return {name: run["settings"].get(name) for name in SAME} | {"domains": sorted(run["domains"])}


def comparable(runs: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Runs in groups that can be compared, in the order in which they were found."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(json.dumps(same_settings(run)), []).append(run)
    return list(groups.values())


def gather_runs(runs: Iterable[tuple[Path | str, dict[str, Any]]]) -> Comparison:
    """As `gather`, of records, each with where it is from."""
    rows: dict[str, Row] = {}
    orders: dict[str, None] = {}
    failed: list[str] = []
    first: tuple[Path | str, dict[str, Any]] | None = None
    for folder, run in runs:
        same = same_settings(run)
        first = first or (folder, same)
        if differing := differences(first[1], same):
            raise ValueError(
                f"{folder} cannot be compared with {first[0]}; they differ in {differing}. Compare them apart"
            )
        order = " → ".join(run["domains"])
        if "failed" in run:
            failed.append(f"{run['method']} FAILED in {folder}: {run['failed'].splitlines()[0]}")
            continue
        if "kind" not in run:
            raise ValueError(f"{folder}: an older version wrote it, without what is compared here; run it again")
        orders[order] = None
        own = _own_settings(run)
        key = json.dumps([run["method"], own], sort_keys=True)
        row = rows.setdefault(key, Row(run["method"], run["method"], run["kind"], own, {}))
        if (order, run["seed"]) in row.runs:
            warnings.warn(
                f"{folder}: {run['method']} with these settings, order and seed was found before; it is left out",
                stacklevel=2,
            )
            continue
        row.runs[order, run["seed"]] = _numbers(run)
    if not rows:
        raise EveryRunFailed("every run failed:\n" + "\n".join(failed))
    ordered = list(rows.values())
    _name(ordered)
    _add_intransigence(ordered)
    return Comparison(ordered, list(orders), first[1], failed)


def _name(rows: Sequence[Row]) -> None:
    """Append to a method's name what differs between its rows."""
    for row in rows:
        alike = [other for other in rows if other.method == row.method]
        differing = [
            key
            for key in row.settings
            if len({json.dumps(other.settings.get(key), sort_keys=True) for other in alike}) > 1
        ]
        words = (f"{key}={_short(row.settings[key])}" for key in differing)
        row.name = " ".join([row.method, *words])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _add_intransigence(rows: Sequence[Row]) -> None:
    """Against the bound of the same order and seed; of several settings of it, the one that learned most."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        if row.method != "single":
            continue
        for place, run in row.runs.items():
            if place not in best or run[METRICS[0]]["learned"] > best[place][METRICS[0]]["learned"]:
                best[place] = run
    for row in rows:
        for place, run in row.runs.items():
            for metric in run["R"]:
                single = best[place]["R"].get(metric) if place in best else None
                run[metric]["intransigence"] = (
                    None
                    if single is None
                    else intransigence(run["R"][metric], single, lower_is_better=metric in LOWER_IS_BETTER)
                )
