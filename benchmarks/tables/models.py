"""Tables of what probes found in models."""

from __future__ import annotations

from statistics import fmean

from .cells import number, results, table

_WIDTHS = (32, 64, 128, 256, 512)


def overlap() -> str:
    """IoU of the most active neurons of two domains."""
    found = results("probe-base-5m")["overlap"]
    at = [found["fractions"].index(share) for share in (0.05, 0.1)]

    def cell(value: float, ends: list[float]) -> str:
        return f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"

    rows = [
        [" – ".join(pair), *(cell(iou[i], interval[i]) for i in at)]
        for pair, iou, interval in zip(found["pairs"], found["mean_iou"], found["mean_interval"], strict=True)
    ]
    rows.append(["chance", *(cell(found["mean_null"][i], found["mean_null_interval"][i]) for i in at)])
    return table(("", "top 5 %", "top 10 %"), rows)


def cosines() -> str:
    """Of domains' gradients, of the whole model."""
    found = results("probe-base-5m")["cosines"]
    whole, rows = found["model"], []
    for i, pair in enumerate(found["pairs"]):
        interval = f"{whole['low'][i]:.2f} to {whole['high'][i]:.2f}"
        cells = [f"{whole['cosine'][i]:.3f}", interval, f"{whole['ceiling'][i]:.2f}", f"{whole['corrected'][i]:.3f}"]
        rows.append([" – ".join(pair), *cells])
    return table(("", "cosine", "interval", "ceiling", "corrected for noise"), rows)


def widths() -> str:
    """|cosine| and overlap by width, means over seeds."""
    models = results("scale-study")
    chance = fmean(model["overlap"]["null"] for model in models if model["family"] == "random")
    rows = []
    for measure, key in (("cosine", "absolute"), ("overlap", "iou")):
        form = ".3f" if measure == "cosine" else ".2f"
        for family in ("random", "pretrained"):
            name = f"\\|cosine\\|, {family}" if measure == "cosine" else f"overlap, {family}"
            name += f" (chance {number(chance, '.3f')})".replace("0.", ".") if name == "overlap, random" else ""
            own = [
                [m[measure][key] for m in models if (m["family"], m["width"]) == (family, width)] for width in _WIDTHS
            ]
            others = [m[measure][key] for m in models if m["family"] not in ("random", "pretrained")]
            cells = [fmean(values) for values in own] + (others if family == "pretrained" else [])
            shown = [number(value, form).replace("0.", ".") for value in cells]
            rows.append([name, *shown, *[""] * (len(_WIDTHS) + len(others) - len(shown))])
    named = [f"{m['model']}, {m['width']}" for m in models if m["family"] not in ("random", "pretrained")]
    return table(("width", *map(str, _WIDTHS), *named), rows)
