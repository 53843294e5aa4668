# make demo: the four-domain sequence on embedded data, with a report in out/demo
# make test: lint and all tests
# make test-integrations: TRL, Lightning, bitsandbytes, lm_eval and DeepSpeed, which it installs
# make wheel: an sdist and a wheel in dist, the wheel tested in a fresh environment
# make bench: CPU benchmarks; on a machine with a GPU, benchmarks/gpu.sh does the rest
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiling every file of every package takes longer than compiling those that are imported, when they are.
INSTALL := $(BIN)/pip -q --disable-pip-version-check install --no-compile -c constraints.txt
# Some machines say that no bytecode is to be kept. Then each of many processes would compile torch and transformers.
export PYTHONDONTWRITEBYTECODE :=
# One more than there are cores: many tests wait for a process that they started.
WORKERS := $(shell $(PYTHON) -c "import os; print(min(1 + (os.cpu_count() or 1), 4))")
SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh tests/cuda_emulation/*.h tests/cuda_emulation/*.cpp)

.PHONY: demo test test-integrations lint format wheel bench clean

demo: $(VENV)/.built
	rm -rf out/demo
	$(BIN)/sparse-cl run --method adamw,lora,elastic --steps 100 --out out/demo

test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder --durations 15

test-integrations: $(VENV)/.integrations
	$(BIN)/python -m pytest -rs tests/integrations tests/methods/test_users_adapters.py tests/methods/test_unusual_models.py

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Outside the tree, whose sparse_cl would be imported; no isolation, since the build environment has the torch to use.
wheel: $(VENV)/.tools
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip -q --disable-pip-version-check install --no-compile -c constraints.txt dist/*.whl
	cd / && $(CURDIR)/build/wheel/bin/python -I $(CURDIR)/tests/cases/one_step.py native

bench: $(VENV)/.tools
	$(BIN)/python -m pytest benchmarks --results out/bench.json

clean:
	rm -rf $(VENV) build dist out

$(VENV)/.packages: constraints.txt
	@echo "Installing packages into $(VENV); the first time this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools cmake ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	SPARSE_CL_WERROR=1 $(INSTALL) --no-build-isolation -e '.[files]'
	touch $@

# The installed package's own extra: what is built is not built again.
$(VENV)/.tools: $(VENV)/.built
	$(INSTALL) 'sparse_cl[dev]'
	touch $@

# DeepSpeed is no extra, since it is refused. Its ops would have to be compiled, and its build asks for the torch to use.
$(VENV)/.integrations: $(VENV)/.tools
	$(INSTALL) 'sparse_cl[run,integrations]' lm_eval
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation deepspeed
	touch $@
