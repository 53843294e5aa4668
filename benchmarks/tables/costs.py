"""Tables of what a step or a process costs."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from .cells import number, results, table

_PEERS = ("full AdamW", "LoRA", "SHiRA")


def elastic_step() -> str:
    """A whole step with ElasticAdamW over one with AdamW."""
    names = {
        "llama-110m": "Llama of 110 M parameters",
        "gemma3-270m": "Gemma 3 270M (268 M)",
        "gemma-trimmed": "the same, vocabulary cut to 93,261 (160 M)",
    }
    found, rows = results("elastic-step"), []
    for model, name in names.items():
        run = found[model]
        ratios = run["quartiles of the ratio of whole steps"]
        medians = [ratios[f"{key} / AdamW"][1] for key in ("ElasticAdamW", "ElasticAdamW every=4")]
        rows.append([name, run["rank"].replace("auto", "n / 8"), *(number(median, ".2f") for median in medians)])
    return table(("", "r", "ElasticAdamW / AdamW", "with `every=4`"), rows)


def active_linear() -> str:
    """A whole step with ActiveLinear over those of its peers, and its memory beside LoRA's."""
    header = ["", *(f"ours / {peer}" for peer in _PEERS), "gradients, state and adapter, ours / LoRA"]
    rows = []
    for model in ("base-5m", "100 M"):
        for run in results("active-linear").values():
            own = run[model]
            sums = {
                who: sum(own["memory"][who][part] for part in ("gradients", "state", "adapters"))
                for who in ("ours", "LoRA")
            }
            medians = [own["ratios"][f"ours / {peer}"][0] for peer in _PEERS]
            name = f"{model}, {own['tokens']}" + ("" if rows else " tokens a step")
            rows.append([name, *(number(ratio, ".2f") for ratio in (*medians, sums["ours"] / sums["LoRA"]))])
    return table(header, rows)


def adamw_step() -> str:
    """An optimizer's step: torch's fused one over ours, and the plain reference over ours."""
    now, before = _medians("cpu-zen3", "bench_masked_adamw"), _medians("cpu", "bench_masked_adamw")
    rows = []
    for case, times in now.items():
        old = before[case]
        ratios = [number(one["torch fused"] / one["native"], ".2f") for one in (times, old)]
        rows.append([case, *ratios, number(old["reference"] / old["native"], ".0f")])
    return table(("", "torch fused / ours, now", "before, on the Xeon", "plain reference / ours, before"), rows)


_OPS = {
    "bench_subspace_memory": ("observe and consolidate", "SubspaceMemory", ("torch.svd_lowrank", "torch.linalg.svd")),
    "bench_orthonormalize": ("`orthonormalize`", "ours", ("torch.linalg.qr",)),
    "bench_gram_factor": ("`gram_factor`", "native", ("cholesky and inverse",)),
    "bench_project_out": ("`project_out_`", "ours", ("two products", "textbook")),
    "bench_randomized_svd": ("`randomized_svd`", "ours", ("svd_lowrank",)),
}
"""File of benchmarks → the op, which of its contenders is ours, and which it is compared with."""


def linear_algebra() -> str:
    """Ops of the memory: another's time over ours."""
    rows = []
    for file, (op, ours, others) in _OPS.items():
        for case, times in _medians("cpu", file).items():
            against = [f"{number(times[other] / times[ours], '.2f')} (`{other}`)" for other in others]
            rows.append([op, case.replace(" x ", " × "), ", ".join(against)])
    return table(("", "of", "their time / ours"), rows)


def leak() -> str:
    """Share of ‖ΔW‖² in protected directions."""
    rows = []
    for case, shares in results("leak")["leak"].items():
        own, projected = max(shares["fp32"], shares["bf16 master"]), shares["gradient-projected"]
        rows.append([case, *(shown.replace("e-0", "e-") for shown in (f"{own:.0e}", f"{projected:.1e}"))])
    return table(("", "ours", "AdamW on projected gradients"), rows)


def _medians(name: str, file: str) -> dict[str, Mapping[str, Any]]:
    """Case → contender → milliseconds, of a file of benchmarks."""
    found: dict[str, dict[str, Any]] = {}
    for row in results(name)["rows"]:
        if row["file"] == file:
            found.setdefault(row["case"], {})[row["contender"]] = row["median_ms"]
    return found


def routed_linear() -> str:
    """Forward and backward of a branch through all neurons over that through k of them."""
    shapes = _medians("routed-linear", "bench_routed_linear")
    header = ("neurons → outputs, 1,024 tokens", "all neurons", *(f"k = n / {part}" for part in (4, 10, 40)))
    rows = [
        [
            shape.replace("->", "→"),
            f"{own['all neurons']:.1f} ms",
            *(number(own["all neurons"] / own[f"1/{part}"], ".2f") for part in (4, 10, 40)),
        ]
        for shape, own in shapes.items()
    ]
    return table(header, rows)


def sharded_memory() -> str:
    """Of a model that is split over processes: what was measured, and what the planner predicts."""
    rows = []
    found = results("sharded-memory")
    names = {"adamw": "AdamW", "elastic": f"`elastic`, rank {found['rank']}"}
    for case, name in names.items():
        for run in found["cases"]:
            if run["case"] != case:
                continue
            measured, predicted = run["measured"], run["predicted"]
            sent = [
                number(side["sent_bytes"] / 1e6, ".2f") + " MB" if side["sent_bytes"] else "0"
                for side in (measured, predicted)
            ]
            sizes = [_mb(measured[key]) for key in ("weights", "state", "peak")]
            peak = f"{_mb(predicted['peak'])} ({run['peak_error']:+.0%})".replace("-", "−").replace("%", " %")
            rows.append([name, str(run["processes"]), *sizes, peak, *sent])
    header = ("", "processes", "weights", "state", "peak", "predicted", "sent per step", "predicted")
    return table(header, rows)


def planner_check() -> str:
    """The planner against measured peaks and times."""
    cases, rows = results("planner-check")["cases"], []
    for i, case in enumerate(cases):
        sequences, tokens = case["batch"]
        name = f"{case['method']}, {case['width']}, {sequences} × {tokens}"
        errors = [number(case[key], "+.0%") for key in ("peak_error", "seconds_error")]
        rows.append([name, _mb(case["measured_peak_mb"] * 1e6), errors[0], errors[1] if i else "fitted"])
    medians = [number(median(abs(case[key]) for case in cases[1:]), ".1%") for key in ("peak_error", "seconds_error")]
    rows.append(["median of the absolute errors, without the first row", "", *medians])
    return table(("method, width, batch", "peak", "predicted", "predicted time"), rows)


_PLANNED = {
    "llama-3-8b-h200-mixed": "float32 weights, products in bfloat16",
    "llama-3-8b-h200-bf16": "bfloat16 weights",
}


def plan_h200() -> str:
    """Llama-3-8B on one H200, as the planner has it."""
    rows = []
    for file, name in _PLANNED.items():
        plans = results(f"plans/{file}")["methods"]
        for method, plan in plans.items():
            memory, seconds = plan["memory"], plan["step_seconds"]
            over = "" if method == "adamw" else f" ({seconds / plans['adamw']['step_seconds']:.2f} ×)"
            cells = [f"{_gb(memory['peak'])}", _gb(memory["state"]), f"{seconds:.2f} s{over}"]
            rows.append([f"`{method}`, {name}", *cells])
    return table(("", "memory at the peak", "of it the optimizer's state", "time of a step"), rows)


def plan_gpus() -> str:
    """Llama-3 on one and on several GPUs, as the planner has it."""
    rows = []
    for file, name in (("llama-3-8b-h100", "Llama-3-8B"), ("llama-3-70b-h100", "Llama-3-70B")):
        plans = results(f"plans/{file}")["methods"]
        for count in (1, 8, 64):
            both = [plans[f"{method} on {count}"] for method in ("adamw", "elastic")]
            cells = [cell for plan in both for cell in (_held(plan), f"{plan['step_seconds']:.2f} s")]
            sent = both[1]["sent_bytes"]
            rows.append([name, str(count), *cells, f"{_gb(sent)}, {both[1]['sent_seconds']:.2f} s" if sent else "0"])
    each = ("AdamW: memory per GPU", "time per step", "`elastic`: memory per GPU", "time per step")
    return table(("model", "GPUs", *each, "sent per step and GPU"), rows)


def _held(plan: Mapping[str, Any]) -> str:
    fits = plan["fits"].startswith("fits")
    return _gb(plan["memory"]["peak"]) + ("" if fits else ", does not fit")


def _gb(size: float) -> str:
    return f"{size / 1e9:.0f} GB" if size >= 1e11 else f"{size / 1e9:.1f} GB"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"
