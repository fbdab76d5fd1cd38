# Every target needs only git, make and Python 3.11 or newer; the first one builds .venv with the versions of constraints.txt.
#
#   PYTHON=python3.12     the interpreter .venv is built from (default: python3)
#   TORCH_INDEX=URL       package index torch is installed from. By default pip's own; on Linux that build brings several
#                         gigabytes of CUDA libraries. Without an NVIDIA GPU give PyTorch's CPU index, named on
#                         https://pytorch.org/get-started (choose Pip, Linux, CPU).
#   TEST_WORKERS=4        processes that run the tests side by side (default: 2); each takes a core and about 2 GB

PYTHON ?= python3
TORCH_INDEX ?=
TEST_WORKERS ?= 2
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
BIN := .venv/bin
STAMP := .venv/.psft-env

.PHONY: help env quickstart test test-all check bench
.DEFAULT_GOAL := help

help:
	@echo "make env         build .venv with the pinned versions"
	@echo "make quickstart  environment, bundled model, a short PSFT run on this machine"
	@echo "make test        the tests, without the slow ones"
	@echo "make test-all    all tests"
	@echo "make check       lint, types, the fastest tests"
	@echo "make bench       the benchmarks, then the tables of docs/performance.md (hours on 2 cores)"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "make env: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make env PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("make env: %s is Python %d.%d; the pinned TRL and transformers need Python 3.11 or newer. Name one: make env PYTHON=/path/to/python3.11" % (sys.executable, v[0], v[1]))'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make env: '$(PYTHON)' has no venv module. Install it (Debian, Ubuntu: python3-venv), or name another: make env PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: env
	$(BIN)/psft quickstart

# Tests of one file stay in one process: they share what their fixtures made.
SIDE_BY_SIDE := -n $(TEST_WORKERS) --dist loadfile

test: env
	$(BIN)/python -m pytest -q -m "not slow" $(SIDE_BY_SIDE)

test-all: env
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

# The rooms whose tests take seconds and need no model.
FAST_TESTS := $(wildcard tests/ops tests/objectives tests/window tests/runs)

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -x -m "not slow" $(FAST_TESTS)

bench: env
	$(BIN)/python -m benchmarks
