"""All methods on the same data, each tuned on validation with the same budget, then tested over seeds and orders.

    python -m benchmarks.arena.compare_methods tune --model DIR --data DIR --reference FILE --out DIR
    python -m benchmarks.arena.compare_methods test --model DIR --data DIR --reference FILE --out DIR

`tune` tries each method four times: with three learning rates of one grid, then with the next rate if the best lay at
an edge, and else with another value of its main option; and takes what has the lowest mean bits per byte after the
last domain, on records held out of training; with `--by learned` what learned most, for methods that others are to be
measured against at full learning. `test` runs what was chosen with other seeds on the test records, in the given order
and in reverse; `python -m benchmarks.arena compare OUT/test` compares. With `--protect FILE` that text is protected:
`tune` then tries weights of it with the settings that were chosen without, and takes the largest whose score is within
1 % of the best; such runs stand beside those without. Both run several processes of one thread, and go on where they
were stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.domains import DEFAULT_DOMAINS
from sparse_cl.four_domains.settings import Settings, methods_named

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST = (3e-4, 1e-3, 3e-3)
"""Tried of the grid in any case."""
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "lora-wd": {"weight_decay": 1.0},
    "freeze-lower": {"frozen_share": 0.75},
    "ewc": {"ewc_lambda": 1000.0},
    "mofo": {"fraction": 0.05},
    "migu": {"quantile": 0.9},
    "o-lora": {"lambda_1": 5.0},
    "osf": {"effective_rank": 0.7},
    "sparse-masked": {"fraction": 0.05},
    "sparse-masked-lora": {"fraction": 0.05},
    "selective-write": {"closed": 0.5},
    "orthogonal": {"energy": 0.9},
    "orthogonal-lora": {"energy": 0.9},
    "orthogonal-masked": {"energy": 0.9},
    "elastic": {"strength": 50.0},
    "elastic-lora": {"strength": 50.0},
    "curvature": {"mode": "hard"},
    "two-four": {"score": "fisher"},
}
"""Another value of each method's main option; methods without one have the rates alone."""
TEXT_WEIGHTS = (0.2, 1.0, 3.0)
TUNING_SEED, SEEDS, ORDERS = 100, (0, 1, 2), ("given", "reverse")
LOWEST = {"acc": lambda summary: summary["acc"], "learned": lambda summary: -summary["learned"]}
"""What settings are chosen by → a number of a run's summary, the lower the better."""

Choice = dict[str, Any]
"""`lr` and `options` of the method, and once tried the `scores`."""


def learn(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A run, and of its folder what is not the weights of models."""
    runs = experiment.run(Settings(**settings), folder)
    for weights in folder.glob("*/*-*/"):
        shutil.rmtree(weights)
    return runs


def run_name(name: str, common: dict[str, Any], by: str) -> str:
    """A method or a run in the names of files."""
    return name + ("-protected" if common["protect"] else "") + ("" if by == "acc" else f"-by-{by}")


def attempt(common: dict[str, Any], method: str, choice: Choice, out: Path) -> dict[str, Any] | None:
    """Scores on validation; None: the run failed."""
    words = [f"{name}={value}" for name, value in choice["options"].items()]
    (record,) = learn(
        {
            **common,
            "methods": (method,),
            "lr": {method: choice["lr"]},
            "method_options": {method: choice["options"]} if choice["options"] else {},
            "split": "validation",
            "metrics": ("bits_per_byte",),
            "reference": None,
        },
        out / "tune" / "-".join([run_name(method, common, "acc"), f"{choice['lr']:g}", *words]),
    )
    return None if record.get("failed") else record["summary"]


def tune(common: dict[str, Any], method: str, by: str, out: Path) -> dict[str, Any]:
    """What was tried of a method, and what was best."""
    tried: list[Choice] = []

    def score(choice: Choice) -> float:
        return float("inf") if choice["scores"] is None else LOWEST[by](choice["scores"])

    def add(rate: float, options: dict[str, Any]) -> None:
        choice = {"lr": rate, "options": options}
        tried.append({**choice, "scores": attempt(common, method, choice, out)})

    for rate in FIRST:
        add(rate, {})
    best = min(tried, key=score)["lr"]
    place = GRID.index(best)
    if best == FIRST[0]:
        add(GRID[place - 1], {})
    elif best == FIRST[-1]:
        add(GRID[place + 1], {})
    elif method in OPTIONS:
        add(best, OPTIONS[method])
    return {"method": method, "protect": common["protect"], "by": by, **min(tried, key=score), "tried": tried}


def tune_protected(common: dict[str, Any], method: str, chosen: Choice, out: Path) -> dict[str, Any]:
    """How much a text can weigh beside a domain with what was `chosen` without it, at little cost."""
    tried = []
    for weight in TEXT_WEIGHTS:
        choice = {"lr": chosen["lr"], "options": {**chosen["options"], "text_weight": weight}}
        tried.append({**choice, "scores": attempt(common, method, choice, out)})
    able = [choice for choice in tried if choice["scores"] is not None]
    least = min(choice["scores"]["acc"] for choice in able)
    heaviest = [choice for choice in able if choice["scores"]["acc"] <= 1.01 * least][-1]
    return {"method": method, "protect": common["protect"], "by": "text_weight", **heaviest, "tried": tried}


def test(common: dict[str, Any], chosen: list[dict[str, Any]], by: str, order: str, seed: int, out: Path) -> None:
    """All methods as they were chosen, in one order with one seed."""
    domains = common["domains"] if order == "given" else tuple(reversed(common["domains"]))
    learn(
        {
            **common,
            "domains": domains,
            "methods": tuple(entry["method"] for entry in chosen),
            "lr": {entry["method"]: entry["lr"] for entry in chosen},
            "method_options": {entry["method"]: entry["options"] for entry in chosen if entry["options"]},
            "seed": seed,
            "metrics": ("bits_per_byte", "accuracy"),
        },
        out / "test" / run_name(f"{order}-seed{seed}", common, by),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "test"))
    for name in ("model", "data", "reference"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--method", default="all", help="names, or all, ours, baselines, bounds (default: %(default)s)")
    parser.add_argument("--protect", help="text that the methods protect")
    parser.add_argument("--by", choices=tuple(LOWEST), default="acc", help="what is best (default: %(default)s)")
    parser.add_argument("--orders", default=",".join(ORDERS), help="of test (default: %(default)s)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of test (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="a domain (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-records", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    arguments = parser.parse_args()
    common = {name: getattr(arguments, name) for name in ("model", "data", "reference", "protect", "steps")}
    common |= {name: getattr(arguments, name) for name in ("batch_size", "eval_records")}
    common |= {"autocast": "bf16", "domains": DEFAULT_DOMAINS, "seed": TUNING_SEED}
    folder = arguments.out / "tuned"
    folder.mkdir(parents=True, exist_ok=True)
    names = methods_named(arguments.method.split(","))
    files = {name: folder / f"{run_name(name, common, arguments.by)}.json" for name in names}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        if arguments.stage == "tune":
            missing = [name for name, path in files.items() if not path.is_file()]
            if arguments.protect:
                chosen = {name: json.loads((folder / f"{name}.json").read_text()) for name in missing}
                waiting = [pool.submit(tune_protected, common, name, chosen[name], arguments.out) for name in missing]
            else:
                waiting = [pool.submit(tune, common, name, arguments.by, arguments.out) for name in missing]
            for done in as_completed(waiting):
                result = done.result()
                files[result["method"]].write_text(json.dumps(result, indent=1) + "\n")
                acc = "failed" if result["scores"] is None else f"{result['scores']['acc']:.3f}"
                print(f"{result['method']}: lr {result['lr']:g} {result['options']}, ACC {acc}", flush=True)
        else:
            chosen = [json.loads(path.read_text()) for path in files.values()]
            seeds = [int(seed) for seed in arguments.seeds.split(",")]
            tasks = [(order, seed) for order in arguments.orders.split(",") for seed in seeds]
            waiting = [pool.submit(test, common, chosen, arguments.by, *task, arguments.out) for task in tasks]
            for done in as_completed(waiting):
                done.result()


if __name__ == "__main__":
    main()
