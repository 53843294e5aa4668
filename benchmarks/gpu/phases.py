"""What gpu.sh runs: its phases in order, each within the time that is left, and the table at the end."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

from benchmarks.gpu.run import FAILED, NOT_REACHED, ROOT, Run, commit, write
from benchmarks.gpu.table import table

#: Seconds after which a phase starts no further case, so that no phase takes the time of all.
LIMITS = {"build": 150, "tests": 90, "sanitizer": 90, "bandwidth": 75, "steps": 150, "projector": 45, "probes": 45}
#: Phases that are scripts of this folder, by these names.
SCRIPTS = ("bandwidth", "steps", "projector", "probes")
#: What a case that has started may take past the deadline before it is killed.
GRACE = 15
WORKERS = 6

HERE = Path(__file__).parent


def execute(command: list, end: float, capture: bool = True, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command, which is killed with all its processes some time after ``end``."""
    done = subprocess.run(
        ["timeout", "-k", "3", f"{max(1.0, end + GRACE - time.time()):.0f}", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
        errors="replace",
    )
    if capture:
        print(done.stdout, end="", flush=True)
    return done.returncode, done.stdout or ""


def run_here(name: str, *options: str) -> tuple[int, str]:
    """Exit code and output of a script at tiny sizes in this process, where what takes long is imported already."""
    before, sys.argv = sys.argv, [name, *options, "--tiny"]
    said, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(HERE / name), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
        print(said.getvalue(), end="", flush=True)
    return code, said.getvalue()


def explained(code: int, output: str) -> str:
    """Why a command failed: that it was out of time, or its last lines."""
    last = " | ".join(line for line in output.splitlines() if line.strip())[-600:]
    return f"killed, over time: {last}" if code in (124, 137) else f"exit code {code}: {last}"


def build(run: Run, end: float, dry: bool) -> int:
    """Takes the libraries that lie in the tree if they load and are of these sources, and else builds them."""

    def inspect() -> dict | None:
        code, output = execute([sys.executable, HERE / "run.py"], end)
        if code:
            return None
        found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        if not dry and found["device"].startswith("CPU"):
            raise RuntimeError("torch sees no GPU; --dry-run needs none")
        return found if dry or all(found["libraries"].values()) else None

    def libraries() -> dict:
        found, how = inspect(), "those in the tree"
        if found is None and not dry:
            how = "built here"
            code, output = execute(
                [sys.executable, "setup.py", "build_ext", "--inplace"],
                end,
                SPARSE_CL_CUDA="1",
                CMAKE_CUDA_ARCHITECTURES=os.environ.get("CMAKE_CUDA_ARCHITECTURES", "native"),
            )
            if code:
                raise RuntimeError(explained(code, output))
            found = inspect()
        if found is None:
            raise RuntimeError("the libraries do not load, or are of other sources: see the log")
        run.data["versions"] = {key: value for key, value in found.items() if key != "libraries"}
        return {"how": how, "libraries": found["libraries"]}

    run.cases.clear()  # a machine of its own has libraries of its own
    run.case("libraries", libraries)
    return run.finish()


def cuda_tests() -> list[Path]:
    """Those of nothing but a GPU, and one that has a case of it."""
    return [*sorted((ROOT / "tests").rglob("test_*_cuda.py")), ROOT / "tests" / "subspace" / "test_sharing.py"]


def run_tests(files: list[Path], end: float, dry: bool) -> dict[str, dict]:
    """{file: counts and failures}. A file none of whose tests passed has failed, but in a dry run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-rs", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        code, output = execute([sys.executable, "-m", "pytest", *options, *files], end)
        tests = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    results = {}
    for file in files:
        own = [t for t in tests if file.stem in f"{t.get('classname')}.{t.get('name')}".split(".")]
        bad = {t.get("name"): x.get("message") or "" for t in own for x in t if x.tag in ("failure", "error")}
        reasons = {x.get("message") for t in own for x in t if x.tag == "skipped"}
        skipped = sum(t.find("skipped") is not None for t in own)
        passed = len(own) - skipped - len(bad)
        found = {"passed": passed, "skipped": skipped, "failed": len(bad)}
        if bad:
            found |= {"status": "failed", "failures": {name: reason[:300] for name, reason in bad.items()}}
        elif not own or not (passed or dry):
            why = f"all were skipped: {sorted(map(str, reasons))}" if own else explained(code, output)
            found |= {"status": "failed", "error": f"no test passed; {why}"[:800]}
        results[file.name] = found
    return results


def tests(run: Run, end: float, dry: bool) -> int:
    files = cuda_tests()
    # All in one process where none will run: most of the time goes into imports.
    together = cache(lambda: run_tests(files, end, dry))

    def one(file: Path) -> None:
        run.case(file.name, lambda: together()[file.name] if dry else run_tests([file], end, dry)[file.name], needs=5)

    with ThreadPoolExecutor(1 if dry else WORKERS) as pool:
        list(pool.map(one, files))
    return run.finish()


def sanitizer(run: Run, end: float, dry: bool) -> int:
    def check(tool: str) -> dict:
        if dry:
            code, output = run_here("sanitize.py")
        else:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
            script = HERE / "sanitize.py"
            code, output = execute([*command, script], end, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        lines = {mark: [line for line in output.splitlines() if mark in line] for mark in ("SUMMARY", "checked")}
        if code or not lines["checked"] or not (dry or lines["SUMMARY"]):
            raise RuntimeError(explained(code, output))
        return {"summary": " ".join(lines["SUMMARY"])[-200:], "checked": lines["checked"][-1]}

    for tool in ("memcheck", "racecheck"):
        run.case(tool, partial(check, tool), needs=10)
    return run.finish()


def script(run: Run, end: float, dry: bool) -> int:
    options = ["--json", str(run.path), "--deadline", f"{end:.1f}"]
    if dry:
        return run_here(f"{run.phase}.py", *options)[0]
    # A process of its own: an illegal access of one phase would fail all later ones.
    return execute([sys.executable, HERE / f"{run.phase}.py", *options], end, capture=False)[0]


RUNNERS: dict[str, Callable[[Run, float, bool], int]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    **dict.fromkeys(SCRIPTS, script),
}


def perform(name: str, path: Path, deadline: float, dry: bool) -> str:
    """Runs a phase and enters it in the file; returns its status."""
    data = json.loads(path.read_text())
    before = next((entry for entry in data["phases"] if entry["name"] == name), {})
    print(f"\n==== {name} ====", flush=True)
    if name != "build" and before.get("status") == "passed" and before.get("commit") == commit():
        print("as in the earlier run")
        return "passed"
    start = time.time()
    if start >= deadline:
        code = NOT_REACHED
        data["not_reached"].append(f"{name}: all that is not there yet")
        write(path, data)
    else:
        end = deadline if dry else min(deadline, start + LIMITS[name])
        try:
            code = RUNNERS[name](Run(name, path, end, dry), end, dry)
        except Exception as error:
            traceback.print_exc()
            code = f"{type(error).__name__}: {error}"
    status = {0: "passed", NOT_REACHED: "skipped-by-budget"}.get(code, "failed")
    data = json.loads(path.read_text())
    entry = {"name": name, "status": status, "seconds": round(time.time() - start, 1), "commit": commit()}
    if status == "failed" and not any(c["status"] == "failed" for c in data.get(name, {}).values()):
        entry["error"] = code if isinstance(code, str) else explained(code, "")
    data["phases"] = [e for e in data["phases"] if e["name"] != name] + [entry]
    write(path, data)
    print(f"{name}: {status}, {entry['seconds']:.0f} s", flush=True)
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="every phase on the CPU at tiny sizes")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="an earlier gpu.json, whose results are kept")
    given = parser.parse_args(arguments)
    chosen = os.environ.get("PHASES", "").split() or list(LIMITS)
    if unknown := set(chosen) - set(LIMITS):
        parser.error(f"PHASES: {sorted(unknown)} are none of {', '.join(LIMITS)}")
    data = json.loads(given.resume.read_text()) if given.resume else {}
    if data and data["dry_run"] != given.dry_run:
        parser.error(f"--resume: {given.resume} is of a {'dry' if data['dry_run'] else 'real'} run, this one is not")
    data.pop("versions", None)
    data |= {"dry_run": given.dry_run, "phases": data.get("phases", []), "not_reached": []}
    os.environ["COMMIT"] = commit()
    path = Path(os.environ["OUT"]) / "gpu.json"
    write(path, data)
    deadline = time.time() + float(os.environ.get("SECONDS_LIMIT") or (600 if given.dry_run else 230))
    statuses = {}
    for name in LIMITS:
        if name in chosen or name == "build":
            statuses[name] = perform(name, path, deadline, given.dry_run)
        if statuses.get("build") == "failed":
            break
    data = json.loads(path.read_text())
    data["bars"], text = table(data)
    write(path, data)
    print(text)
    return FAILED if "failed" in statuses.values() else NOT_REACHED if "skipped-by-budget" in statuses.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
