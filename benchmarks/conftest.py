"""Prints each case beside its file's baseline, and writes all with ``--results FILE``.

A benchmark says what it is in ``benchmark.extra_info``: ``case`` and ``contender``; ``baseline``, how the contenders
that the others are compared with begin; ``bytes`` that it moves at least and ``copy_gb_per_s``, where bandwidth is the
limit. Other numbers in it are shown beside the time.
"""

import json
import platform
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

_RESERVED = ("case", "contender", "baseline", "bytes", "copy_gb_per_s")


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FILE", help="write a summary as JSON")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where ops run")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda":
        for item in items:
            if "device" not in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason="runs on the CPU only"))


@pytest.fixture(scope="session")
def device(request):
    """Of --device. A benchmark that asks for it makes its tensors ``with device:`` and times what ``waiting`` gives."""
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no GPU", returncode=4)
    return chosen


@pytest.fixture(scope="session")
def waiting(device):
    """Turns a call into one that returns when the device is done."""

    def of(call):
        def waited(*args):
            result = call(*args)
            torch.cuda.synchronize()
            return result

        return call if device.type == "cpu" else waited

    return of


@pytest.fixture(scope="session")
def copy_gb_per_s(device, waiting):
    source = torch.ones(150_000_000, device=device)
    target = torch.zeros_like(source)
    copy, times = waiting(target.copy_), []
    for _ in range(7):
        start = time.perf_counter()
        copy(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / sorted(times)[len(times) // 2] / 1e9


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    files = defaultdict(lambda: defaultdict(dict))
    for bench in getattr(session, "benchmarks", []):
        info = bench.extra_info
        if info.get("contender"):
            files[Path(bench.fullname.split("::")[0]).stem][info["case"]][info["contender"]] = bench
    rows = []
    for file, cases in files.items():
        infos = [bench.extra_info for contenders in cases.values() for bench in contenders.values()]
        baseline = infos[0].get("baseline")
        terminalreporter.section(f"{file}: last, median time of {baseline} over this" if baseline else file)
        for case, contenders in cases.items():
            rows += [_row(file, case, name, bench, contenders) for name, bench in contenders.items()]
            for row in rows[-len(contenders) :]:
                terminalreporter.write_line(_line(row))
        if copy := infos[0].get("copy_gb_per_s"):
            terminalreporter.write_line(f"copy bandwidth of this process: {copy:.2f} GB/s (bytes read and written)")
    if rows and config.getoption("results"):
        copies = [
            bench.extra_info["copy_gb_per_s"] for bench in session.benchmarks if "copy_gb_per_s" in bench.extra_info
        ]
        summary = {**_machine(config), **({"copy_gb_per_s": round(copies[0], 2)} if copies else {}), "rows": rows}
        path = Path(config.getoption("results"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1) + "\n")


def _row(file, case, contender, bench, contenders) -> dict:
    info = bench.extra_info
    row = {
        "file": file,
        "case": case,
        "contender": contender,
        "median_ms": round(bench.stats.median * 1e3, 3),
        "min_ms": round(bench.stats.min * 1e3, 3),
        **{key: value for key, value in info.items() if key not in _RESERVED},
    }
    if "bytes" in info:
        row["gb_per_s"] = round(info["bytes"] / bench.stats.median / 1e9, 2)
    for base in (b for b in contenders if info.get("baseline") and b.startswith(info["baseline"])):
        row[f"{base} / this"] = round(contenders[base].stats.median / bench.stats.median, 2)
    return row


def _line(row) -> str:
    shown = [f"{row['case']:28s} {row['contender']:26s} {row['median_ms']:9.2f} ms"]
    for name, value in row.items():
        if name.endswith("/ this"):
            shown.append(f"{name} {value:6.2f}")
        elif name == "gb_per_s":
            shown.append(f"{value:7.2f} GB/s")
        elif name not in ("file", "case", "contender", "median_ms", "min_ms"):
            shown.append(f"{name} {value:.3g}")
    return "  ".join(shown)


def _machine(config) -> dict:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": cpu,
        **({"gpu": torch.cuda.get_device_name()} if config.getoption("--device") == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
