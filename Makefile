# make quickstart   train, export, serve and measure a draft on this machine
# make test         what CI runs: environment, lint, types, every test that is not marked nightly
# make test-all     the same with every test: hours on a slow machine
# make fast         the tests that are marked neither slow nor nightly: minutes
PYTHON_BIN := .venv/bin/python
# Tests and examples never ask a model hub, and report nothing to anybody.
export HF_HUB_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1

# Processes that run test files side by side; 0, one file after the other, where they would share a GPU's memory.
PROCESSES ?= $(if $(wildcard /dev/nvidia0),0,2)
# Neither asks a hub. Side by side a process has one thread: two that share cores wait for each other most of the time.
PYTEST := WANDB_MODE=offline HF_HUB_OFFLINE=1 $(PYTHON_BIN) -m pytest
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(PYTEST) -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup lint format types fast test test-all quickstart doctor build clean

help:
	@sed -n 's/^# //p' Makefile | head -n 4
	@echo "also: setup lint format types doctor build clean"

setup:
	@scripts/setup.sh

lint: setup
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .

format: setup
	$(PYTHON_BIN) -m ruff check --fix .
	$(PYTHON_BIN) -m ruff format .

types: setup
	$(PYTHON_BIN) -m mypy

fast: setup
	$(PYTEST) -m "alone and not slow and not nightly"
	$(SIDE_BY_SIDE) -m "not alone and not slow and not nightly"

test: lint types
	$(PYTEST) -m "alone and not nightly"
	$(SIDE_BY_SIDE) -m "not alone and not nightly"

test-all: lint types
	$(PYTEST) -m alone
	$(SIDE_BY_SIDE) -m "not alone"

quickstart: setup
	$(PYTHON_BIN) examples/hf-quickstart/quickstart.py $(ARGS)

doctor: setup
	$(PYTHON_BIN) main.py doctor

build: setup
	$(PYTHON_BIN) -m build

clean:
	rm -rf build dist outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis lightning_logs wandb *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
