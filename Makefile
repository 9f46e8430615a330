# Every command that the project's documents name. Each makes the environment .venv first, where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: warnings about package registries are hundreds of lines, errors stay.
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
READY := $(VENV)/.ready
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NATIVE_INPUTS := $(CXX_SOURCES) CMakeLists.txt setup.py pyproject.toml

.PHONY: build test lint demo bench bench-all kernels-table gpu-bundle gpu-check cuda-check cuda-table format clean

# The environment, then the package: built in place, against the torch that is installed.
$(VENV)/.installed: requirements-dev.txt requirements-no-deps.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --requirement requirements-dev.txt
	$(INSTALL) --no-deps --requirement requirements-no-deps.txt
	touch $@

$(READY): $(VENV)/.installed $(NATIVE_INPUTS)
	PATH="$(abspath $(BIN)):$$PATH" $(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@

build: $(READY)

# Triton decides when it is imported whether it interprets its kernels, so these run once more, in their own process.
INTERPRETED := $(patsubst %,tests/ia3_kernels/test_%.py,triton_interpreted operators gradients mlp contract exact_gpu)

test: $(READY)  ## the whole suite
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) -k triton

demo: $(READY)  ## fine-tune a real language model, and compare
	$(BIN)/python -m bench.demo --output build/demo

lint: $(READY)  ## formatting, lints and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

bench: $(READY)  ## operators, with pytest-benchmark
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-group-by=group

bench-all: $(READY)  ## every suite behind docs/performance.md; an idle machine and half an hour
	$(BIN)/python -m bench all --json build/bench.json
	$(BIN)/python -m bench.report build/bench.json

# Where there is nvcc and no GPU. build/gpu-bundle is what to take to the GPU, with the checkout.
ARCH := sm_90a
gpu-bundle: $(VENV)/.installed  ## compile the CUDA kernels for the GPU of another machine
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tools.gpu_bundle --arch $(ARCH) $(ARGS)

# With the Python that is there, and nothing installed: ARGS="--part host" for less.
gpu-check:  ## proves and measures the kernels on this machine's GPU, in a quarter of an hour
	$(PYTHON) tools/gpu_check.py $(ARGS)

kernels-table: $(READY)  ## compile every Triton launch for GPUs that are not here, a quarter of an hour
	$(BIN)/python -m tools.inspect_kernels --write docs/kernels.md

cuda-check: $(READY)  ## compile the CUDA kernels for every architecture, and inspect them; needs nvcc, no GPU
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tools.inspect_cuda $(ARGS)

cuda-table:
	$(MAKE) cuda-check ARGS="--write docs/kernels.md"

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist *.egg-info ia3_kernels/*.so .mypy_cache .ruff_cache .pytest_cache
