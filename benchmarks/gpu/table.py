"""The bars that a GPU must meet, against what gpu.json holds."""

from __future__ import annotations

from collections.abc import Iterator

#: Characters of the table, so that the end of an output that is cut holds all of it.
MOST = 9500


class Results:
    """Figures of cases that passed."""

    def __init__(self, data: dict):
        self.data = data

    def case(self, phase: str, case: str) -> dict:
        found = self.data.get(phase, {}).get(case, {})
        return found if found.get("status") == "passed" else {}

    def figure(self, phase: str, case: str, key: str) -> float | None:
        return self.case(phase, case).get(key)

    def ratio(self, mine: str, other: str, key: str = "step_ms") -> float | None:
        """Of two cases of whole steps, if both ran at one size on one device."""
        a, b = self.case("steps", mine), self.case("steps", other)
        alike = all(a.get(k) == b.get(k) for k in ("device", "layers", "tokens"))
        return a[key] / b[key] if a and b and alike and b[key] else None


def bars(data: dict) -> Iterator[tuple[str, float | None, str, float | None]]:
    """What is measured, the figure, on which side of the bar it must be, the bar; without one it is only reported."""
    found = Results(data)
    for case in ("dense fp32", "dense bf16, master"):
        yield f"{case}: share of the copy bandwidth", found.figure("bandwidth", case, "of_copy"), ">=", 0.85
    for case, bar in (("rows 5 % fp32", 15), ("elements 5 % fp32", 3.5)):
        yield f"{case}: times torch's fused fp32", found.figure("bandwidth", case, "speedup"), ">=", bar
    for shape in ("1 B", "8 B"):
        mine = f"active, {shape}: active 5 %"
        peers = (("full AdamW", 0.72), ("LoRA, bf16 adapters", 1.0), ("LoRA, fp32 adapters", None))
        for peer, bar in peers:
            yield f"{mine}: step / {peer}", found.ratio(mine, f"active, {shape}: {peer}"), "<=", bar
        peer = "LoRA, bf16 adapters"
        yield f"{mine}: peak / {peer}", found.ratio(mine, f"active, {shape}: {peer}", "peak_bytes"), "<=", None
    ranks = (2, 4) if data["dry_run"] else (64, 128)
    for shape in ("1 B", "8 B"):
        full = f"projected, {shape}: full AdamW"
        others = [(f"pulled, rank {rank}", 1.15) for rank in (*ranks, f"{ranks[-1]}, TF32")]
        others += [(f"projected, rank {rank}", None) for rank in ranks] + [("our AdamW, fp32 master", None)]
        for who, bar in others:
            yield f"{shape}, {who}: step / full AdamW", found.ratio(f"projected, {shape}: {who}", full), "<=", bar
    for kind in ("pulled", "projected"):
        yield f"host time of a {kind} step, ms", found.figure("steps", f"host time, {kind}", "host_ms"), "<=", 10
        launches = found.figure("steps", f"launches, {kind}", "launches_per_layer")
        yield f"launches per layer of a {kind} step", launches, "<=", 4
    yield "projector: refresh of all 224 layers, ms", found.figure("projector", "refresh", "refresh_ms"), "<=", 150
    probes = found.case("probes", "forward").get("probes", {})
    yield "ActivationProbe / plain forward", probes.get("ActivationProbe", {}).get("ratio"), "<=", 1.2


def details(data: dict) -> Iterator[str]:
    """Two short tables: of each step of the op, and of each whole step."""
    found = Results(data)
    shown = [(name, found.case("bandwidth", name)) for name in data.get("bandwidth", {})]
    shown = [(name, case) for name, case in shown if "of_copy" in case]
    if shown:
        yield f"\n{'copy ' + format(shown[0][1]['copy_gb_per_s'], '.0f') + ' GB/s':44}    ms  torch's    GB/s  of copy"
    for name, case in shown:
        yield f"{name:44}{case['ms']:6.2f}{case['torch_fused_ms']:9.2f}{case['gb_per_s']:8.0f}{case['of_copy']:9.2f}"
    shown = [(name, found.case("steps", name)) for name in data.get("steps", {})]
    shown = [(name, case) for name, case in shown if "step_ms" in case]
    if shown:
        yield f"\n{'ms':40}  step  forward  backward  optimizer    GiB  layers"
    for name, case in shown:
        parts = (
            f"{case['step_ms']:6.1f}{case['forward_ms']:9.1f}{case['backward_ms']:10.1f}{case['optimizer_ms']:11.1f}"
        )
        yield f"{name:40}{parts}{case['peak_bytes'] / 2**30:7.1f}{case['layers']:8d}"


def table(data: dict) -> tuple[list[dict], str]:
    """The bars as objects, and all that a reader wants to see first as text."""
    rows, lines = [], []
    for what, figure, side, bar in bars(data):
        met = None if figure is None or bar is None else figure >= bar if side == ">=" else figure <= bar
        rows.append({"what": what, "figure": figure, "bar": bar and f"{side} {bar}", "met": met})
        shown = "-" if figure is None else f"{figure:.3g}"
        word = "not measured" if figure is None else {None: "", True: "met", False: "MISSED"}[met]
        lines.append(f"{what:58}{shown:>9}  {f'{side} {bar}' if bar else '':9}{word}")
    text = ["", "DRY RUN: tiny sizes on the CPU, the figures mean nothing" if data["dry_run"] else ""]
    text += ["  ".join(f"{k} {v}" for k, v in data.get("versions", {}).items()), *lines]
    text += [*details(data), ""]
    text += [f"{p['name']:12}{p['status']:20}{p['seconds']:7.1f} s  {p.get('error', '')}" for p in data["phases"]]
    checks = {name: c for name, c in data.get("tests", {}).items()}
    if checks:
        counts = {k: sum(c.get(k, 0) for c in checks.values()) for k in ("passed", "failed", "skipped")}
        text.append("tests: " + ", ".join(f"{n} {k}" for k, n in counts.items()) + f" in {len(checks)} files")
    text += [f"{tool}: {c.get('summary', '')} {c['status']}" for tool, c in data.get("sanitizer", {}).items()]
    phases = ("build", "tests", "sanitizer", "bandwidth", "steps", "projector", "probes")
    found = [(f"{phase}: {name}", case) for phase in phases for name, case in data.get(phase, {}).items()]
    for name, case in found:
        if case["status"] != "passed":
            why = case.get("error") or case.get("reason") or "; ".join(case.get("failures", {}))
            text.append(f"{case['status']}: {name}: {why[:160]}")
    for key in ("device", "commit"):
        if len(several := {case[key] for _, case in found}) > 1:
            text.append(f"from more than one {key}: {', '.join(sorted(several))}")
    text += [f"not reached: {name}" for name in data["not_reached"]]
    return rows, "\n".join(text)[:MOST]
