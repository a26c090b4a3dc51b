# The two commands that a newcomer needs are `make serve` and `make test`; `make` alone lists all.
#
# Every target first makes sure that .venv holds the package and its development tools. The installation runs again
# only when pyproject.toml has changed since the last complete one. Recipes exec the program, so that Ctrl-C and
# SIGTERM reach it and not a shell in between.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Port of the API, further arguments for the program, and the interpreter that .venv is made with.
PORT ?= 8000
ARGS ?=
PYTHON ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

# The interpreter of the GPU commands, which install nothing: it has torch, triton and transformers, and what is missing
# besides may lie on PYTHONPATH.
GPU_PYTHON ?= python3
GPU_NEEDS := torch, triton, transformers, numpy, msgspec, pydantic, psutil, safetensors, typer, rich

.PHONY: help install serve test lint format bench gpu-check gpu-bench clean

help:
	@echo 'make serve    serve the embedded models   (PORT=8000  ARGS="MODEL --replicas 2 …")'
	@echo 'make test     run the tests               (ARGS="tests/cluster -k blocks")'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   rewrite the sources as make lint wants them'
	@echo 'make bench    run every benchmark         (takes about half an hour on two idle cores)'
	@echo 'make gpu-check gpu-bench    prove and measure the engine on a GPU, without .venv and without Ray'
	@echo '              (GPU_PYTHON=python3  ARGS="--json FILE --only kernels"; ARGS=--tiny tries it on a CPU)'
	@echo 'make clean    remove .venv, caches, benchmark models and results'

install: $(INSTALLED)

# pip prints nothing unless it fails; the stamp is written last, so that an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml .ci/find-python $(wildcard kernels/native/*.cpp kernels/native/*.h)
	@set -e; python=$$(PYTHON='$(PYTHON)' .ci/find-python); \
	echo "Installing into .venv with $$($$python --version); the first time this takes some minutes."; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $$python -m venv --clear .venv; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'; \
	touch $@

serve: $(INSTALLED)
	@exec $(BIN)/troupe serve --port $(PORT) $(ARGS)

test: $(INSTALLED)
	@exec $(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED) .typecheck/raytroupe
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@exec $(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff check --fix --quiet .
	@exec $(BIN)/ruff format .

# The repository root is the package, whatever the checkout is called; mypy finds packages by the names of folders,
# so it is shown the root through a link of the right name (mypy_path in pyproject.toml).
.typecheck/raytroupe:
	@mkdir -p .typecheck
	@ln -sfn .. $@

bench: $(INSTALLED)
	@exec $(BIN)/python -m raytroupe.deploy.bench.suite $(ARGS)

gpu-check gpu-bench: gpu-%: .typecheck/raytroupe
	@$(GPU_PYTHON) -c 'import $(GPU_NEEDS)' || { echo 'error: $(GPU_PYTHON) lacks one of: $(GPU_NEEDS); install it there' \
		'or name another interpreter: make $@ GPU_PYTHON=…' >&2; exit 2; }
	@PYTHONPATH="$(CURDIR)/.typecheck$${PYTHONPATH:+:$$PYTHONPATH}" \
	exec $(GPU_PYTHON) -m raytroupe.deploy.bench.gpu.$* $(ARGS)

clean:
	rm -rf .venv .typecheck .mypy_cache .pytest_cache .ruff_cache .hypothesis bench-models bench-results *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
