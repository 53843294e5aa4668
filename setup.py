"""Builds the native libraries by CMake, against the torch of the environment that is being installed into."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_MINIMUM = (2, 11)
ROOT = Path(__file__).parent


def find_torch() -> Path:
    """Folder of the torch package; under pip's build isolation ``import torch`` fails, but platlib is the caller's."""
    minimum = ".".join(map(str, TORCH_MINIMUM))
    roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages(), *sys.path]
    for folder in (Path(root) / "torch" for root in roots):
        version_file = folder / "version.py"
        if version_file.exists():
            version = re.search(r"__version__ = '(.+?)'", version_file.read_text()).group(1)
            if tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH_MINIMUM:
                sys.exit(
                    f"sparse_cl needs torch {minimum} or newer, but {folder} is {version}: "
                    f"run `pip install 'torch>={minimum}'`, then install sparse_cl again."
                )
            return folder
    sys.exit(
        f"sparse_cl is built against the torch of your environment, and there is none: "
        f"run `pip install 'torch>={minimum}'`, then install sparse_cl again."
    )


class CMakeBuild(build_ext):
    """Runs CMake once and installs what it built beside the package's Python files."""

    def run(self) -> None:
        try:
            import cmake
            import ninja
            import pybind11
        except ImportError as error:
            sys.exit(f"Building without isolation needs {error.name}: run `pip install cmake ninja pybind11`.")
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sysconfig.get_python_version()}"
        configure = [
            str(Path(cmake.CMAKE_BIN_DIR) / "cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_INSTALL_PREFIX={target / 'sparse_cl'}",
            f"-DSPARSE_CL_TORCH={find_torch()}",
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPARSE_CL_CUDA={os.environ.get('SPARSE_CL_CUDA', 'auto')}",
            f"-DSPARSE_CL_WERROR={os.environ.get('SPARSE_CL_WERROR', '0')}",
        ]
        if "CMAKE_CUDA_ARCHITECTURES" in os.environ:
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['CMAKE_CUDA_ARCHITECTURES']}")
        for command in (configure, [configure[0], "--build", str(build)], [configure[0], "--install", str(build)]):
            try:
                subprocess.check_call(command)
            except subprocess.CalledProcessError:
                sys.exit(f"Building sparse_cl failed: see above. The command was {' '.join(command)}")


# Neither command needs torch. All others find it, or fail before pip resolves dependencies: else pip would fetch a
# torch, gigabytes of it, only to learn that one must be chosen.
if not {"sdist", "egg_info"} & set(sys.argv):
    find_torch()
# `python -m build` unpacks the sdist in an environment of its own, which holds only what is asked for.
alone = Path(sys.prefix).name.startswith("build-env-") and (ROOT / "PKG-INFO").exists()
setup(
    ext_modules=[Extension("sparse_cl._build_info", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[f"torch>={'.'.join(map(str, TORCH_MINIMUM))}"] if alone and "egg_info" in sys.argv else [],
)
