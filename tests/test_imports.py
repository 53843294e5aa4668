"""The rules of the house, read from the sources: imports run one way, files stay short, light folders stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparse_cl"

#: Folders and files of sparse_cl, each of which imports from its own step and from those before it only.
ORDER = (
    ("layout", "storage"),
    ("reference",),
    ("ops",),
    ("linalg", "masks", "info"),
    ("subspace",),
    ("optim",),
    ("nn", "lora"),
    ("models",),
    ("probes",),
    ("methods",),
    ("integrations",),
    ("arguments", "data"),
    ("four_domains",),
    ("learn", "report"),
    ("planner",),
    ("cli",),
)
#: What these may import of the steps before them; others may import all.
ONLY = {"models": {"masks"}}
#: What an installation of torch alone does not bring.
HEAVY = ("accelerate", "datasets", "matplotlib", "peft", "safetensors", "tokenizers", "tqdm", "transformers")
#: Files that may import transformers and its like at their top, in folders that otherwise need torch alone.
LOADERS = ("models/loading.py", "models/processes.py")
#: Lines that a folder may have.
LIMITS = [
    pytest.param(
        "sparse_cl", 18_000, marks=pytest.mark.xfail(reason="probes and reports are what they are for", strict=True)
    ),
    pytest.param(
        "sparse_cl/planner",
        600,
        marks=pytest.mark.xfail(reason="what a dry run must guess takes the lines", strict=True),
    ),
]


@cache
def modules() -> dict[str, Path]:
    """{dotted name below sparse_cl: file}; a folder's own name is that of its __init__.py, the package's is ""."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute module, whether at the top of the file) of each import, but for those that type checkers alone run.

    `from a import b` counts as a.b where that is a module of sparse_cl, and else as a.
    """
    known = {f"sparse_cl.{name}".rstrip(".") for name in modules()}
    found = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    folder = path.relative_to(ROOT).parts[: -child.level]
                    base = ".".join([*folder, *base.split(".")]).rstrip(".")
                inside = {f"{base}.{alias.name}" for alias in child.names}
                found.extend((name, top) for name in sorted(inside & known) or [base])
                if not inside <= known and inside & known:
                    found.append((base, top))
            else:
                walk(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(ast.parse(path.read_text()), True)
    return found


def within(path: Path) -> list[tuple[str, bool]]:
    """What a file imports of sparse_cl, without that prefix."""
    own = [(name.removeprefix("sparse_cl").removeprefix("."), top) for name, top in imports(path) if is_of(name)]
    return [(name, top) for name, top in own if name]


def is_of(name: str, package: str = "sparse_cl") -> bool:
    return name.split(".")[0] == package


def test_packages_import_in_one_direction():
    rank = {name: step for step, names in enumerate(ORDER) for name in names}
    unknown = {name.split(".")[0] for name in modules()} - rank.keys() - {"", "__main__"}
    assert not unknown, f"ORDER does not say where these stand: {sorted(unknown)}"
    wrong = []
    for name, path in modules().items():
        mine = name.split(".")[0]
        if mine not in rank:
            continue
        for other, _ in within(path):
            theirs = other.split(".")[0]
            below = theirs == mine or rank.get(theirs, -1) < rank[mine]
            if not below or (theirs != mine and theirs not in ONLY.get(mine, {theirs})):
                wrong.append(f"{path.relative_to(ROOT)} imports sparse_cl.{other}")
    assert not wrong, wrong


def test_no_module_imports_itself_by_way_of_others():
    names = modules()
    graph = {
        name: {other for other, _ in within(path) if other in names and other != name} for name, path in names.items()
    }
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, " <- ".join(circle)


def test_the_library_does_not_import_the_workshop():
    wrong = {
        str(path.relative_to(PACKAGE))
        for path in modules().values()
        for name, _ in imports(path)
        if is_of(name, "benchmarks") or is_of(name, "tests")
    }
    assert not wrong


def test_what_needs_torch_alone_imports_nothing_heavier_at_its_top():
    light = ("layout", "reference", "ops", "linalg", "masks", "info", "storage", "subspace", "optim", "nn", "lora")
    wrong = []
    for name, path in modules().items():
        if name.split(".")[0] not in (*light, "models", "probes", "methods", "data") or str(path).endswith(LOADERS):
            continue
        wrong += [f"{name}: {other}" for other, top in imports(path) if top and other.split(".")[0] in HEAVY]
        wrong += [
            f"{name}: {other}" for other, top in within(path) if top and other.replace(".", "/") + ".py" in LOADERS
        ]
    assert not wrong, wrong


def test_importing_the_light_folders_brings_no_heavy_module():
    code = f"""
import sys, torch
before = set(sys.modules)
import sparse_cl, sparse_cl.nn, sparse_cl.models, sparse_cl.probes, sparse_cl.methods, sparse_cl.data
print(*[name for name in {HEAVY} if name in sys.modules and name not in before])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def sources(folder: str) -> dict[str, int]:
    """{file: lines}"""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}


@pytest.mark.parametrize("folder", ["sparse_cl", "tests", "benchmarks"])
def test_no_file_is_long_and_none_is_for_whatever_is_left(folder):
    long = {file: lines for file, lines in sources(folder).items() if lines > 400}
    assert not long, f"more than 400 lines: {long}"
    assert not [file for file in sources(folder) if Path(file).stem in ("util", "utils", "helpers", "misc")]


@pytest.mark.parametrize("folder, limit", LIMITS)
def test_folders_stay_small(folder, limit):
    lines = sum(sources(folder).values())
    assert lines <= limit, f"{folder} has {lines} lines"


def test_no_test_file_imports_another():
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        wrong += [
            f"{path.relative_to(ROOT)}: {name}"
            for name, _ in imports(path)
            if any(part.startswith("test_") for part in name.split("."))
        ]
    assert not wrong, wrong
