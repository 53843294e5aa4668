"""Prints each case's ratios to torch.optim.AdamW(fused=True), and writes them with ``--results FILE``."""

import json
import platform
import subprocess
from collections import defaultdict
from pathlib import Path

import torch

BASELINE = "torch fused"


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FILE", help="write a summary as JSON")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in getattr(session, "benchmarks", []) if b.extra_info.get("contender")]
    if not measured:
        return
    cases = defaultdict(dict)
    for bench in measured:
        cases[bench.extra_info["case"]][bench.extra_info["contender"]] = bench
    rows = []
    for case, contenders in cases.items():
        for contender, bench in contenders.items():
            row = {
                "case": case,
                "contender": contender,
                "median_ms": round(bench.stats.median * 1e3, 3),
                "min_ms": round(bench.stats.min * 1e3, 3),
                "gb_per_s": round(bench.extra_info["bytes"] / bench.stats.median / 1e9, 2),
            }
            for base in (b for b in contenders if b.startswith(BASELINE)):
                row[f"{base} / this"] = round(contenders[base].stats.median / bench.stats.median, 2)
            rows.append(row)
    copy = measured[0].extra_info["copy_gb_per_s"]
    terminalreporter.section("ratios (median time of torch.optim.AdamW(fused=True) over this)")
    for row in rows:
        ratios = "  ".join(f"{k} {v:6.2f}" for k, v in row.items() if k.endswith("/ this"))
        line = f"{row['case']:28s} {row['contender']:22s} {row['median_ms']:9.2f} ms {row['gb_per_s']:7.2f} GB/s"
        terminalreporter.write_line(f"{line}  {ratios}")
    terminalreporter.write_line(f"copy bandwidth of this process: {copy:.2f} GB/s (bytes read plus bytes written)")
    if config.getoption("results"):
        path = Path(config.getoption("results"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**_machine(), "copy_gb_per_s": round(copy, 2), "rows": rows}, indent=1) + "\n")


def _machine() -> dict:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
