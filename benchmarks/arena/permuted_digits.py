"""Permuted digits: the same handwritten digits ten times over, each time under another permutation of their pixels.

    python -m benchmarks.arena.permuted_digits --out DIR           # compare the methods, a minute or two on two cores
    python -m benchmarks.arena.permuted_digits --out DIR --tune    # choose their settings, on validation images

A network 784-256-256-10, one head for all tasks, learns task after task without seeing earlier ones again. `orthogonal`
is ours. Each method gets the same number of settings to choose from, the same epochs and batches, and in each seed the
same images, permutations and initial weights. The digits are scikit-learn's (`pip install '.[bench]'`), upsampled to
28 x 28; the permutations are those of Goodfellow et al. 2013.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from sparse_cl import SubspaceMemory, SubspaceProjectedAdamW
from sparse_cl.four_domains.metrics import summarize

TASKS, EPOCHS, BATCH = 10, 8, 32
SEEDS, TUNING_SEEDS = (0, 1, 2), (100, 101)
MEASURES = ("acc", "bwt", "learning_accuracy")


@dataclass(frozen=True)
class Task:
    """Images (count, 784) in [0, 1] and labels (count,), to train on and to score on."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    epochs: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.epochs):
            for index in torch.randperm(len(self.images)).split(BATCH):
                yield self.images[index], self.labels[index]


# The methods. Each yields after the training of a task, before it notes anything for the next one.


def orthogonal(model: nn.Module, tasks: list[Task], lr: float, energy: float):
    """AdamW whose update is orthogonal to the inputs that earlier tasks gave each layer."""
    memory = SubspaceMemory(model, energy=energy, source="inputs")
    optimizer = SubspaceProjectedAdamW(model.named_parameters(), lr=lr, memory=memory)
    for task in tasks:
        for images, labels in task.batches():
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        yield memory
        remember(memory, model, task.images)


@torch.no_grad()
def remember(memory: SubspaceMemory, model: nn.Module, images: Tensor) -> None:
    """Ends a task: what its images used of each layer joins the memory."""
    with memory.watch():
        model(images)
    memory.observe()
    memory.consolidate()


def adamw(model: nn.Module, tasks: list[Task], lr: float, weight_decay: float):
    """Sequential fine-tuning."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    for task in tasks:
        for images, labels in task.batches():
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        yield None


def projected_gradient(model: nn.Module, tasks: list[Task], lr: float, energy: float):
    """AdamW on the projected gradient: the memory of `orthogonal`, and the projection before the step."""
    memory = SubspaceMemory(model, energy=energy, source="inputs")
    weights = [model.get_parameter(name) for name in memory.names]
    for task in tasks:
        # New for each task: moments of the last one lie in what is used now. Biases are frozen after the first.
        optimizer = torch.optim.AdamW(weights if memory.domains else model.parameters(), lr=lr, fused=True)
        for images, labels in task.batches():
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            for weight in weights if memory.domains else ():
                memory.subspace(weight).project_out_(weight.grad)
            optimizer.step()
        yield memory
        remember(memory, model, task.images)


def gpm(model: nn.Sequential, tasks: list[Task], lr: float, energy: float):
    """Gradient projection memory (Saha, Garg & Roy 2021, algorithm 1), with SGD; biases frozen after the first task."""
    layers = [module for module in model if isinstance(module, nn.Linear)]
    bases: dict[nn.Module, Tensor] = {}
    for task in tasks:
        trained = [layer.weight for layer in layers] if bases else model.parameters()
        optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9)
        for images, labels in task.batches():
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            for layer, basis in bases.items():
                layer.weight.grad -= layer.weight.grad @ basis @ basis.mT
            optimizer.step()
        yield None
        x = task.images
        for module in model:
            if isinstance(module, nn.Linear):
                bases[module] = _gpm_basis(bases.get(module), x, energy)
            x = module(x).detach()


def _gpm_basis(basis: Tensor | None, x: Tensor, energy: float) -> Tensor:
    """Adds to ``basis`` (n, r) the fewest directions with which it explains ``energy`` of inputs ``x`` (samples, n)."""
    rest = x if basis is None else x - x @ basis @ basis.mT
    # Right singular vectors of the rest, which has more rows than columns.
    values, vectors = torch.linalg.eigh(rest.mT.double() @ rest.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).float()
    total = x.double().square().sum()
    explained_before = total - values.sum() + values.cumsum(0) - values
    added = vectors[:, : int((explained_before < energy * total).sum())]
    return torch.linalg.qr(added if basis is None else torch.cat([basis, added], 1))[0]


METHODS = {
    "adamw": adamw,
    "adamw-best-acc": adamw,
    "projected-gradient": projected_gradient,
    "gpm": gpm,
    "orthogonal": orthogonal,
}

# What --tune tries: twelve settings a method.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "adamw": {"lr": (3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3), "weight_decay": (0.01, 0.1)},
    "projected-gradient": {"lr": (1e-3, 2e-3, 4e-3, 8e-3), "energy": (0.98, 0.99, 0.995)},
    "gpm": {"lr": (0.005, 0.01, 0.02, 0.04), "energy": (0.98, 0.99, 0.995)},
    "orthogonal": {"lr": (5e-4, 1e-3, 2e-3, 4e-3), "energy": (0.98, 0.99, 0.995)},
}

# What it chose: the best mean accuracy at the end (ACC). AdamW gets that by learning little, so it is there a second
# time, with the best learning accuracy: what the others have to match.
CHOSEN: dict[str, dict[str, float]] = {
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
    "adamw-best-acc": {"lr": 1e-4, "weight_decay": 0.01},
    "projected-gradient": {"lr": 2e-3, "energy": 0.995},
    "gpm": {"lr": 0.02, "energy": 0.995},
    "orthogonal": {"lr": 1e-3, "energy": 0.99},
}


def make_tasks(seed: int, count: int = TASKS, epochs: int = EPOCHS, held_out: str = "test") -> list[Task]:
    """Tasks of 1221 training images, scored on 360 test images or on 216 validation images; the first unpermuted."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = interpolate(images, size=(28, 28), mode="bilinear").flatten(1)
    labels = torch.tensor(digits.target)
    # The test images are the same in every seed, so that no choice made on validation images can have seen them.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, others = order[:360], order[360:]
    generator = torch.Generator().manual_seed(seed)
    others = others[torch.randperm(len(others), generator=generator)]
    validation, train = others[:216], others[216:]
    scored = {"test": test, "validation": validation}[held_out]
    pixels = [torch.arange(784), *(torch.randperm(784, generator=generator) for _ in range(count - 1))]
    return [Task(images[train][:, p], labels[train], images[scored][:, p], labels[scored], epochs) for p in pixels]


def make_model() -> nn.Sequential:
    widths = itertools.pairwise((784, 256, 256, 10))
    layers = [module for m, n in widths for module in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def accuracies(model: nn.Module, tasks: list[Task]) -> list[float]:
    right = [model(task.held_out_images).argmax(1) == task.held_out_labels for task in tasks]
    return [float(r.double().mean()) for r in right]


def run(method: str, tasks: list[Task], seed: int, settings: dict[str, float]) -> dict[str, Any]:
    """Trains on all tasks in turn.

    Returns:
        ``R``, the (T+1) x T accuracies of `sparse_cl.four_domains.metrics`; its summary; and ``leak`` of each layer
        over the last task, against the inputs of all tasks before it, where the method has such a memory.
    """
    torch.manual_seed(seed)
    model = make_model()
    R, leak = [accuracies(model, tasks)], None
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for memory in METHODS[method](model, tasks, **settings):
        R.append(accuracies(model, tasks))
        if memory is not None:
            leak = memory.leak(before, model)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
    summary = summarize(R)
    return {"seed": seed, **{key: summary[key] for key in MEASURES}, "leak": leak, "R": R}


def run_all(jobs: list[tuple[str, int, dict[str, float]]], held_out: str) -> list[dict[str, Any]]:
    """`run` of each (method, seed, settings), one in each core at a time."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(partial(_job, held_out), jobs))


def _job(held_out: str, job: tuple[str, int, dict[str, float]]) -> dict[str, Any]:
    method, seed, settings = job
    return {"method": method, "settings": settings, **run(method, make_tasks(seed, held_out=held_out), seed, settings)}


def mean(runs: list[dict[str, Any]], measure: str) -> float:
    return statistics.mean(r[measure] for r in runs)


def tune(methods: list[str]) -> list[dict[str, Any]]:
    """Scores each setting of each method's grid on validation images, and prints the choices."""
    rows = []
    for method in methods:
        grid = GRIDS[method]
        settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        runs = run_all([(method, seed, s) for s in settings for seed in TUNING_SEEDS], "validation")
        for s in settings:
            row = {"method": method, "settings": s}
            row |= {m: round(mean([r for r in runs if r["settings"] == s], m), 4) for m in MEASURES}
            rows.append(row)
            print(_line(row), flush=True)
        for measure in ("acc", "learning_accuracy"):
            best = max((row for row in rows if row["method"] == method), key=lambda row: row[measure])
            print(f"  best {measure}: {best['settings']}", flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    values = f"ACC {row['acc']:.4f}   BWT {row['bwt']:+.4f}   learning accuracy {row['learning_accuracy']:.4f}"
    return f"{row['method']:20s} {values}   " + ", ".join(f"{k} {v:g}" for k, v in row["settings"].items())


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A panel a method: each task's accuracy through the sequence, from its own training on, mean of the seeds."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.8 * len(GRIDS), 3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(GRIDS), sharey=True)
    for axis, method in zip(panels, GRIDS, strict=True):
        own = [r for r in runs if r["method"] == method]
        R = torch.tensor([r["R"] for r in own]).mean(0)[1:]
        count = len(R)
        stages = range(1, count + 1)
        for j in range(count):
            colour = colormaps["viridis"](0.95 * j / (count - 1))
            axis.plot(stages[j:], R[j:, j], color=colour, linewidth=1, marker="o", markersize=2.5)
        seen = [float(R[i, : i + 1].mean()) for i in range(count)]
        axis.plot(stages, seen, color="black", linewidth=2, label="mean of the tasks seen")
        axis.set_title(f"{method}\nACC {mean(own, 'acc'):.3f}, BWT {mean(own, 'bwt'):+.3f}", fontsize=10)
        axis.set_xticks(stages)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, a line a task")
    panels[0].legend(loc="lower left", fontsize=8)
    figure.supxlabel("after task", fontsize=10)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tune", action="store_true", help="score all settings on validation images instead")
    parser.add_argument("--method", default=",".join(GRIDS), help="what to tune (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.tune:
        rows = tune(arguments.method.split(","))
        (arguments.out / "permuted-digits-tuning.json").write_text(_json(rows))
        return
    runs = run_all([(method, seed, CHOSEN[method]) for method in METHODS for seed in SEEDS], "test")
    (arguments.out / "permuted-digits.json").write_text(_json(runs))
    draw(runs, arguments.out / "permuted-digits.png")


def _json(rows: list[dict[str, Any]]) -> str:
    """One row a line, numbers to four digits."""
    short = json.loads(json.dumps(rows), parse_float=lambda number: float(f"{float(number):.4g}"))
    return "[\n" + ",\n".join(json.dumps(row) for row in short) + "\n]\n"


if __name__ == "__main__":
    main()
