# Everything a person types; `make` alone lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A machine with an NVIDIA driver gets the CUDA build of torch, any other the pinned CPU environment.
CONSTRAINTS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo .ci/constraints-cpu.txt)
EXTRAS ?= dev
SHARD ?= 0/4
STAMP := $(VENV)/.installed-$(EXTRAS)
# What `make constraints` raises: nothing, all (--upgrade) or one package (--upgrade-package NAME).
UPGRADE ?=

.PHONY: help install constraints quickstart test test-all test-slow-shard test-gpu lint format export clean

help:
	@echo "make quickstart   install, build token shards, train, resume, generate, report (about 8 minutes on 2 cores)"
	@echo "make test         install and run the CPU test suite"
	@echo "make test-all     the same with the slow tests"
	@echo "make test-slow-shard SHARD=K/N   shard K (from 0) of N of the slow tests alone"
	@echo "make test-gpu     tests that need a CUDA device"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff rewrite the code"
	@echo "make export       assemble the model file of Hugging Face exports anew from its sources"
	@echo "make constraints  pin the CPU environment anew; UPGRADE=--upgrade raises every version"

install: $(STAMP)

$(STAMP): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$(EXTRAS)]'
	touch $@

# One file for every Python since 3.11 and every platform, from the index's metadata alone: wheels that only this machine
# has do not count. Versions in the file stay unless UPGRADE says otherwise.
constraints: $(BIN)/uv
	$(BIN)/uv pip compile --quiet --no-config --no-python-downloads --universal --python-version 3.11 \
		--fork-strategy fewest --no-annotate --custom-compile-command "make constraints" $(UPGRADE) \
		--extra dev --constraint .ci/constraints.in --output-file .ci/constraints-cpu.txt setup.py

# Not through `install`: constraints that cannot be installed must be replaceable.
$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv

quickstart: install
	$(BIN)/python -m fusiontree.cli quickstart

# Tests start processes of their own; one thread each keeps two cores busy without fighting.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow and not gpu"

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not gpu"

test-slow-shard: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "slow and not gpu" --slow-shard $(SHARD) --durations=15

test-gpu: install
	$(BIN)/python -m pytest -q -m gpu tests

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy fusiontree tools

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

export: install
	$(BIN)/python -m fusiontree.convert.hf_assemble

clean:
	rm -rf $(VENV) build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache
