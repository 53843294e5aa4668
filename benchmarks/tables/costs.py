"""Tables of what a step or a process costs."""

from __future__ import annotations

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


def routed_linear() -> str:
    """Forward and backward of a branch through all neurons over that through k of them."""
    shapes: dict[str, dict[str, float]] = {}
    for row in results("routed-linear")["rows"]:
        shapes.setdefault(row["case"], {})[row["contender"]] = row["median_ms"]
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


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"
