"""The studies by name: what is run in each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_cl.four_domains.domains import DEFAULT_DOMAINS
from sparse_cl.four_domains.settings import GIVEN, REVERSE, Settings
from sparse_cl.methods import METHODS

from . import main_study
from .grid import best_points, kept, over
from .scale_study import WIDTHS
from .size import FAMILY
from .sources import HELD_OUT, SOURCES, write_sources

ORDERS, SEEDS = (GIVEN, REVERSE), (0, 1, 2)


def routed(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """Routing by token and its controls, over rates; beside them AdamW of all weights."""
    variants: dict[str, dict[str, Any]] = {
        "top": {},
        "mask": {"routing": "none", "open": 0.1},
        "none": {"routing": "none"},
        "random": {"routing": "random"},
    }
    points = {
        f"{name}-{lr:g}": {"method": "routed", "lr": lr, "options": options}
        for lr in (4e-3, 1.5e-3, 5e-4)
        for name, options in variants.items()
    } | {f"adamw-{lr:g}": {"method": "adamw", "lr": lr} for lr in (4e-4, 2e-4, 1e-4)}
    return over(_base_5m(models, data), ORDERS, SEEDS, points)


def ceiling(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """Sixteen domains at two widths: what methods that protect learn of each, beside a model of its own for each."""
    sources = _sources(data, out)
    points = {
        "single": {"method": "single", "lr": 1e-3},
        "adamw": {"method": "adamw", "lr": 1e-3},
        "orthogonal": {"method": "orthogonal", "lr": 1e-3},
        "elastic": {"method": "elastic", "lr": 1e-3},
    }
    found = {}
    for model in ("base-5m", "stories260k"):
        base = _base_5m(models, sources, model=str(models / model), domains=SOURCES, eval_records=16)
        found |= {f"{model}-{name}": settings for name, settings in over(base, (GIVEN,), (0,), points).items()}
    return found


def tracks(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """A track a domain, beside AdamW of all weights."""
    points = {f"two-four-{lr:g}": {"method": "two-four", "lr": lr} for lr in (2e-3, 1e-3)}
    return over(_base_5m(models, data), ORDERS, SEEDS, {**points, "adamw-0.001": {"method": "adamw", "lr": 1e-3}})


def demo(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """What `make demo` runs, over five seeds; it reads neither models nor data."""
    points = {name: {"method": name, "lr": METHODS[name].default_lr} for name in ("adamw", "lora", "elastic")}
    return over(Settings(steps=100), (GIVEN,), range(5), points)


def tuning(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """Six settings of every method, on domains that none is tested on."""
    sources = _sources(data, out, *main_study.DATA)
    base = _base_5m(models, sources, domains=main_study.TUNING, split="validation", score="learned")
    return over(base, (GIVEN,), (main_study.TUNING_SEED,), main_study.tuning_points())


def further(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """Baselines and nulls at settings that `tuning` had no room for; after it."""
    base = next(iter(tuning(models, data, out).values()))
    points = main_study.further(main_study.chosen(kept("tuning")))
    return over(base, (GIVEN,), (main_study.TUNING_SEED,), points)


def main(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """What tuning chose, on domains that nobody tuned on, and at other rates; after `tuning`."""
    sources = _sources(data, out, *main_study.DATA)
    base = _base_5m(models, sources, domains=main_study.TESTING, eval_records=256, score="learned")
    points = main_study.chosen(kept("tuning"))
    asked_first = {entry: point for entry, point in points.items() if entry in main_study.ASKED_FIRST}
    wanted = (
        (main_study.OF_CURVES, asked_first | main_study.curves(asked_first)),
        (main_study.OF_CURVES, main_study.other_strengths(asked_first)),
        (main_study.SEEDS, asked_first),
        (main_study.SEEDS, points),
        (main_study.OF_CURVES, main_study.curves(points)),
    )
    return {name: run for seeds, some in wanted for name, run in over(base, (GIVEN,), seeds, some).items()}


def long(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """What tuning chose, frozen: `main`'s domains with more steps, and sixteen domains; after `tuning`."""
    chosen = main_study.chosen(kept("tuning"))
    points = {name: chosen[name] for name in main_study.LONG if name in chosen}
    four = {"domains": main_study.TESTING, "eval_records": 256}
    sixteen = {"domains": SOURCES, "eval_records": 64}
    found = {}
    for settings, steps in ((sixteen, 30), (four, 100), (four, 300), (sixteen, 100)):
        sources = _sources(data, out, *(main_study.DATA if settings is four else ()))
        base = _base_5m(models, sources, steps=steps, score="learned", **settings)
        runs = over(base, (GIVEN,), (0,), points)
        found |= {f"{len(settings['domains'])}x{steps}-{name}": run for name, run in runs.items()}
    return found


def gemma(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """Gemma 3 270M, vocabulary trimmed: methods over rates, those that matter most first; then the reverse order and a
    second seed, each method at its best rate of the first seed; then rates less likely to be the best, and EWC."""
    # As tuned for `main`; "sfa-pair" is the default, its paper's.
    options = {"ewc": {"ewc_lambda": 1000.0}, "l2-sp": {"alpha": 1.0}, "sfa": {"mean": "running"}}

    def points(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
        return {
            f"{name}-{lr:g}": {"method": name.removesuffix("-pair"), "lr": lr, "options": options.get(name, {})}
            for name, given in rates.items()
            for lr in given
        }

    usual = points({"adamw": [5e-5], "elastic": [5e-5], "lora": [5e-4], "elastic-lora": [5e-4]})
    first = usual | points({"adamw": [2e-5, 8e-6, 1e-4, 3.2e-6], "elastic": [2e-5, 8e-6], "lora": [2e-4]})
    first |= points({"self-replay": [5e-5, 8e-6], "l2-sp": [8e-6, 2e-5], "sfa": [2e-5], "lora": [8e-5]})
    # SFA lessens what a step does, so that its best rate is looked for above that of the other baselines.
    first |= points({"replay-5": [8e-6, 5e-5], "sfa-pair": [5e-5, 2e-5]})
    later = points(
        {"elastic-lora": [2e-4], "replay-5": [2e-5], "self-replay": [2e-5], "sfa": [5e-5], "ewc": [8e-6, 2e-5]}
    )
    known = first | later
    every = over(_pretrained(models / "gemma-trimmed", data, out), ORDERS, (0, 1), known)
    wanted: list[tuple[Iterable[str], str, int]] = [(usual, GIVEN, 1), (first, GIVEN, 0)]
    best = [point for point in best_points("gemma").values() if point in known]
    wanted += [(best, REVERSE, 0), (best, GIVEN, 1), (later, GIVEN, 0)]
    names = [f"{point}-{order}-seed{seed}" for some, order, seed in wanted for point in some]
    return {name: every[name] for name in names}


def qwen(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """Qwen2.5-Coder 0.5B with the four main methods: a quarter of `gemma`'s steps, for all alike, as it is larger; and
    answers by likelihood, which take most of the time, so that a domain is scored from when it is learned on."""
    rates = {"adamw": 2e-5, "elastic": 2e-5, "lora": 2e-4, "elastic-lora": 2e-4}
    points = {f"{name}-{lr:g}": {"method": name, "lr": lr} for name, lr in rates.items()}
    scored = {"steps": 15, "eval_records": 32, "score": "learned", "metrics": ("bits_per_byte", "accuracy")}
    return over(_pretrained(models / "qwen-coder-0.5b", data, out, **scored), (GIVEN,), (0,), points)


def size(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """AdamW over rates on the scale study's models and on base-5m, as long as in `gemma`."""
    found = {}
    for model in (*(f"{FAMILY}-{width}-{seed}" for width in WIDTHS for seed in SEEDS), "base-5m"):
        seeds = SEEDS if model == "base-5m" else (int(model.rpartition("-")[2]),)
        points = {f"{model}-{lr:g}": {"method": "adamw", "lr": lr} for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
        found |= over(_base_5m(models, data, model=str(models / model), steps=60), (GIVEN,), seeds, points)
    return found


_WAKING: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "renew": {"wake": 0.1},
    "renew-more": {"wake": 0.3},
    "renew-boost": {"wake": 0.1, "boost": 3.0},
    "boost": {"wake": 0.1, "boost": 3.0, "renew": False},
}


def waking_choice(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """Which way of waking neurons: selective write on validation records, 15 steps a domain."""
    points = {name: {"method": "selective-write", "lr": 1e-3, "options": options} for name, options in _WAKING.items()}
    return over(_base_5m(models, data, split="validation", steps=15), (GIVEN,), (0,), points)


def waking(models: Path, data: Path, out: Path) -> dict[str, Settings]:
    """Selective write with and without waking, and elastic, on test records."""
    points = {
        f"selective-{name}": {"method": "selective-write", "lr": 1e-3, "options": _WAKING[name]}
        for name in ("plain", "renew", "boost")
    } | {"elastic": {"method": "elastic", "lr": 1e-3}}
    return over(_base_5m(models, data), ORDERS, SEEDS[:2], points)


STUDIES: Mapping[str, Callable[[Path, Path, Path], dict[str, Settings]]] = {
    study.__name__.replace("_", "-"): study
    for study in (demo, routed, ceiling, tracks, waking_choice, waking, tuning, further, main, long, gemma, qwen, size)
}


def _pretrained(model: Path, data: Path, out: Path, **others: Any) -> Settings:
    """Runs of a real pretrained model, 60 steps of four records a domain, base text protected by those who can."""
    settings: dict[str, Any] = {"steps": 60, "batch_size": 4, "eval_records": 16, "metrics": ("bits_per_byte",)}
    places = {"protect": str(data / "base.txt"), "reference": _base_text(data, out), "domains": DEFAULT_DOMAINS}
    return Settings(**{"model": str(model), "data": str(data), **settings, **places, **others})


def _base_text(data: Path, out: Path) -> str:
    """A file with the beginning of the held-out base text."""
    path = out / "base.test.txt"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text((data / "base.test.txt").read_text(encoding="utf-8")[:24_576], encoding="utf-8")
    return str(path)


def _sources(data: Path, out: Path, names: Sequence[str] = SOURCES, held_out: int = HELD_OUT) -> Path:
    folder = out / f"sources-{len(names)}-{held_out}"
    if not folder.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=out))
        write_sources(data, building, names, held_out)
        try:
            building.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(building)
    return folder


def _base_5m(models: Path, data: Path, **others: Any) -> Settings:
    """Runs of 30 steps of four records a domain, scored in bits per byte of test records."""
    settings: dict[str, Any] = {
        "model": str(models / "base-5m"),
        "data": str(data),
        "steps": 30,
        "batch_size": 4,
        "eval_records": 32,
        "metrics": ("bits_per_byte",),
    }
    return Settings(**{**settings, **others})
