# Everything a user or CI calls. `make setup` is run by the others where it is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A company's certificates count too.
export UV_SYSTEM_CERTS := 1

.PHONY: help setup demo miniature-cpu miniature-gpu test lint bench gpu-bench gpu-3b gpu-check aot docs lock clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP)  ## .venv from the hashed requirements.lock

# uv is bootstrapped with pip into the environment itself, so that nothing else on the machine changes.
$(STAMP): requirements.lock setup.py
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup  ## the whole story on embedded data, in minutes, on a CPU
	$(BIN)/fd-scale demo

miniature-cpu: setup  ## the paper's experiment on CIFAR-10, within an hour on two cores; DATA=folder of its parquet files
	$(BIN)/fd-scale miniature --data "$(DATA)"

miniature-gpu: setup  ## the same and its ablations on one GPU, 9 minutes a call, resumed; DATA= as above
	$(BIN)/fd-scale miniature --study gpu --minutes 9 --run-dir runs/miniature_gpu --data "$(DATA)"

# Those that start ranks of their own take two cores each: one at a time.
test: setup  ## all tests; no GPU, no network; those of SLURM where it is installed
	$(BIN)/python -m pytest tests/unit tests/kernels --numprocesses 2 --dist loadfile $(PYTEST_OPTIONS)
	$(BIN)/python -m pytest tests/distributed tests/end_to_end tests/slurm $(PYTEST_OPTIONS)

lint: setup  ## ruff, mypy, codespell, shellcheck, links between the pages of docs/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/shellcheck .ci/run slurm/*.sh slurm/*.sbatch slurm/cluster.env.example
	$(BIN)/mkdocs build --strict --quiet

bench: setup  ## our step against a bare loop, and the loader
	$(BIN)/fd-scale bench step

gpu-bench: setup  ## kernels beside their peers on a GPU, 9 minutes a call, resumed; SHAPE=regex picks
	$(BIN)/python -m fd_kernels.benchmarks --match "$(SHAPE)"

gpu-3b: setup  ## whole steps of SwinV2-G and -B on one GPU, 9 minutes a call, resumed; CELL=regex picks
	$(BIN)/fd-scale bench giant --match "$(CELL)"

gpu-check: setup  ## the tests that need a CUDA device, and compute-sanitizer
	$(BIN)/python -m pytest -m gpu --require-gpu
	$(BIN)/python -m fd_kernels.sanitize

aot: setup  ## compiles the Triton kernels with no GPU: registers, spills, tensor cores
	$(BIN)/python -m fd_kernels.aot

docs: setup  ## docs/ as a site, site/index.html; its search needs a server: .venv/bin/mkdocs serve
	$(BIN)/mkdocs build --strict

lock:  ## writes requirements.lock anew (needs uv)
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --all-extras \
	  --python-version 3.11 -c constraints.txt setup.py -o requirements.lock

clean:  ## removes the environment and caches, not runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info build site
