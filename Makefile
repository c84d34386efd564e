# Each target works as the first command on a bare machine with Python 3.11 to 3.13: it makes .venv and installs what it
# needs, no more, once. pip decides where packages come from; where its index offers a CPU build of torch, that is taken.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
FOLDERS := configs dist_attn finetune kernels launch parallel
REQUIRE ?=
DRY ?=

# The first Python that is of a tested version and really starts (a version manager's shim may be there without it).
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)

.PHONY: help setup demo test test-all mutants check types bench gpu clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.dev ## make .venv with everything for development

demo: $(VENV)/.train ## train a tiny model, extend its context over two ranks, draw docs/report.png
	$(BIN)/python -m ringspan.launch.demo

test: $(VENV)/.dev ## run the tests; REQUIRE=slurm,netns,gxx fails those whose system tool is missing
	$(BIN)/python -m pytest -m "not full" $(if $(REQUIRE),--require $(REQUIRE))

test-all: $(VENV)/.dev ## run the tests with the full product of their cases
	$(BIN)/python -m pytest $(if $(REQUIRE),--require $(REQUIRE))

mutants: $(VENV)/.dev ## show that the tests notice: each patch in tests/mutants must make them fail
	$(BIN)/python tests/mutants/run.py

check: $(VENV)/.dev ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(MAKE) --no-print-directory types

types: $(VENV)/.dev ## types alone
	@mkdir -p build/types/ringspan
	@for folder in $(FOLDERS); do ln -sfn ../../../$$folder build/types/ringspan/$$folder; done
	$(BIN)/pyright

bench: $(VENV)/.dev ## run the benchmarks
	$(BIN)/python benchmarks/run.py

# No environment is made and nothing is installed: the machine's python3 has what its GPU needs.
gpu: PYTHON := python3
gpu: ## measure one CUDA device: PART=test|dense|sparse|train|tune OUT=folder; DRY=1: on the CPU, tiny
	timeout --kill-after=10 360 $(PYTHON) benchmarks/gpu.py $(PART) --out $(or $(OUT),$(error give OUT=folder for the results)) $(if $(DRY),--dry)

clean: ## remove what was built; .venv and runs stay
	rm -rf build dist ringspan.egg-info .pytest_cache .ruff_cache .hypothesis

# Stamps: a second call installs nothing, a changed pyproject.toml or constraints file installs what is missing.

$(VENV)/.python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "ringspan needs Python 3.11, 3.12 or 3.13; on Debian 12: sudo apt-get install python3 python3-venv" >&2; exit 1; fi
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python$$version-venv" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml .ci/constraints.txt
	$(PIP) -c .ci/constraints.txt -e '.[train,wandb]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml .ci/constraints.txt
	$(PIP) -c .ci/constraints.txt -e '.[train,wandb,deepspeed,dev]'
	@touch $@ $(VENV)/.train
