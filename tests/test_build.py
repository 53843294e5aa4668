"""What was built is visible, a missing or broken library is no silent fallback, and torch is found or asked for."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools
import torch

import sparse_cl
from sparse_cl import build_info, ops

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sparse_cl.__file__).parent

ONE_STEP = (ROOT / "tests" / "cases" / "one_step.py").read_text()


# An editable install would find in the repository what a copy of the package lacks.
ONLY_THE_COPY = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"


def python(code, folder=ROOT, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SPARSE_CL_")}
    variables = {**inherited, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "-c", ONLY_THE_COPY + code], cwd=folder, env=variables, capture_output=True, text=True
    )


@pytest.fixture
def copied(tmp_path):
    """A copy of the package without what was built."""
    shutil.copytree(PACKAGE, tmp_path / "sparse_cl", ignore=shutil.ignore_patterns("*.so", "lib", "__pycache__"))
    return tmp_path


def test_build_info_says_what_runs():
    info = build_info()
    assert info["runs"] == {d: "native" if ops.LOADED[d] else "reference" for d in ("cpu", "cuda")}
    assert info.keys() == {"runs", "cpu_levels", "cpu_level", "cuda_architectures", "torch_target", "compiler"}
    if info["cpu_levels"] is None:
        pytest.skip("nothing was built")
    assert info["cpu_levels"][0] == "baseline"
    assert info["cpu_level"] in info["cpu_levels"]
    assert all(re.fullmatch(r"\d+[a-z]?(-real|-virtual)?", arch) for arch in info["cuda_architectures"])
    target = tuple(map(int, info["torch_target"].split(".")))
    assert (2, 11) <= target <= tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    assert info["compiler"]


def test_a_built_library_is_loaded():
    assert (
        ops.LOADED["cpu"] == (PACKAGE / "lib" / "libsparse_cl_cpu.so").exists() or "SPARSE_CL_REFERENCE" in os.environ
    )
    if torch.version.cuda is None:
        assert not ops.LOADED["cuda"]


def test_the_reference_on_request_has_the_same_face():
    done = python(ONE_STEP, SPARSE_CL_REFERENCE="1")
    assert done.returncode == 0, done.stderr
    runs, built, *names = done.stdout.split()
    assert runs == "reference"
    assert built == str(build_info()["cpu_levels"] is not None)
    assert names == sorted(sparse_cl.__all__)
    expected = (
        "SparseMaskedAdamW RowMask ColumnMask ElementMask TwoFourMask save_masks load_masks build_info "
        "ProjectedAdamW SubspaceProjectedAdamW SubspaceProjection LowRankPull DriftBudget CurvatureProjection "
        "ElasticAdamW protect Kronecker SubspaceMemory Subspace orthonormalize randomized_svd project_out_"
    )
    assert set(names) == set(expected.split())


def test_without_a_library_the_reference_runs_and_says_so(copied):
    done = python(ONE_STEP, copied)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["reference", "False"]


def test_an_unbuilt_tree_that_hides_an_installed_build_is_named(copied):
    installed = copied / "site-packages" / "sparse_cl"
    (installed / "lib").mkdir(parents=True)
    (installed / "lib" / "libsparse_cl_cpu.so").touch()
    path = {"PYTHONPATH": os.pathsep.join(map(str, (copied, installed.parent)))}
    done = python("import sparse_cl", copied, **path)
    assert done.returncode == 0, done.stderr
    assert f"RuntimeWarning: sparse_cl was imported from {copied / 'sparse_cl'}, where nothing is built" in done.stderr
    assert f"the copy in {installed} has the native libraries" in done.stderr
    assert "RuntimeWarning" not in python("import sparse_cl", copied, SPARSE_CL_REFERENCE="1", **path).stderr


def test_a_library_that_does_not_load_is_an_error(copied):
    library = copied / "sparse_cl" / "lib" / "libsparse_cl_cpu.so"
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF no library")
    done = python("import sparse_cl", copied)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {library} is there but does not load")
    assert "pip install -e ." in last
    assert "SPARSE_CL_REFERENCE=1" in last
    assert python(ONE_STEP, copied, SPARSE_CL_REFERENCE="1").stdout.split()[0] == "reference"


def test_a_lower_cpu_level_on_request():
    if build_info()["cpu_levels"] is None:
        pytest.skip("nothing was built")
    code = "import sparse_cl; print(sparse_cl.build_info()['cpu_level'])"
    assert python(code, SPARSE_CL_CPU_LEVEL="baseline").stdout.split() == ["baseline"]


@pytest.fixture
def bare(tmp_path):
    """An environment that holds setuptools alone, and setup.py beside it: (python, site-packages, folder)."""
    venv.create(tmp_path / "env", with_pip=False)
    python = next((tmp_path / "env").glob("bin/python"))
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    installed = Path(setuptools.__file__).parent.parent
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "sparse_cl").mkdir()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "sparse_cl")
    return python, site, tmp_path


def build(python, folder):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(python), "setup.py", "-q", "build_ext"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_building_without_torch_says_what_to_do(bare):
    python, _, folder = bare
    message = build(python, folder)
    assert "there is none" in message
    assert "pip install 'torch>=2.11'" in message


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.0", "2.9.0a0+git123"])
def test_building_with_an_old_torch_says_what_to_do(bare, version):
    python, site, folder = bare
    (site / "torch").mkdir()
    (site / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    message = build(python, folder)
    assert f"{site / 'torch'} is {version}" in message
    assert "needs torch 2.11 or newer" in message
    assert "pip install 'torch>=2.11'" in message


def test_building_with_a_torch_that_is_new_enough_gets_past_it(bare):
    python, site, folder = bare
    (site / "torch").mkdir()
    (site / "torch" / "version.py").write_text("__version__ = '2.11.0'\n")
    assert "pip install cmake ninja pybind11" in build(python, folder)


SOURCES = sorted(p for p in (ROOT / "csrc").iterdir() if p.suffix in (".cpp", ".cu", ".h", ".cuh"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_only_the_stable_headers_of_torch_are_included(source):
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', source.read_text())
    unstable = [h for h in included if h.split("/")[0] in ("ATen", "c10", "caffe2", "torch")]
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    assert [h for h in unstable if not h.startswith(stable)] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_no_template_of_the_stable_headers_is_specialised(source):
    assert not re.search(r"struct\s+torch::|namespace\s+torch\b", source.read_text())


def test_only_one_file_names_the_ops_of_this_package():
    saying = [p.name for p in PACKAGE.rglob("*.py") if "torch.ops.sparse_cl" in p.read_text()]
    assert saying == ["ops.py"]


def test_every_op_has_an_opcheck():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparse_cl::")]
    assert names
    for op in (name.removeprefix("sparse_cl::") for name in names):
        files = [p.read_text() for p in Path(__file__).parent.rglob("test_*.py") if f"ops.{op}" in p.read_text()]
        assert any("torch.library.opcheck(" in text for text in files), op
