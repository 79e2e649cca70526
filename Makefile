# Everything runs in .venv, which `make setup` makes from requirements/cpu.txt.

VENV := .venv
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

.PHONY: help setup demo test test-slurm check format lock test-vllm clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(INSTALLED)  ## make .venv: the pinned CPU environment and this project, editable (PYTHON=... to choose one)
	@:

$(INSTALLED): pyproject.toml requirements/cpu.txt requirements/install
	@requirements/install pinned $(VENV)
	@touch $@

demo: setup  ## the toy pair on a few prompts, from prompt shards to a report
	@$(VENV)/bin/python -m jobs.demo

test: setup  ## all tests that this machine can run, but for those that need a Slurm
	@$(VENV)/bin/python -m pytest -m "not slurm" --durations=15

test-slurm: setup  ## the tests on a real Slurm of their own; installs its Debian packages where it may
	@tests/slurm/install
	@$(VENV)/bin/python -m pytest -m slurm tests/slurm --durations=5

check: setup  ## lint, format and types; changes nothing
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy

format: setup  ## rewrite the code as `make check` wants it
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

lock:  ## remake requirements/cpu.txt from pyproject.toml and requirements/cpu.in
	@requirements/install lock

test-vllm:  ## the engine's contract on another release: make test-vllm VERSION=0.31.0
	@test -n "$(VERSION)" || { echo "usage: make test-vllm VERSION=0.31.0" >&2; exit 2; }
	@requirements/install release $(VENV)-vllm-$(VERSION) $(VERSION)
	@$(VENV)-vllm-$(VERSION)/bin/python -m pytest tests/test_vllm_contract.py

clean:  ## remove environments, caches and build outputs; keeps outputs/ and multirun/
	@rm -rf $(VENV) $(VENV)-vllm-* build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
