# vllm-mtp: set-up, demo and checks. `make` alone prints the targets.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo train-demo bench test test-versions lint format clean

PYTHON ?= python3
METADATA := requirements/vllm-metadata
DRAFTERS := drafters/smollm2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
REQUIREMENTS := requirements/cpu.txt
# Tests at a time; each takes up to 5 GB.
WORKERS ?= 2

# PyPI's torchvision is a CUDA build that breaks `import transformers` where Python finds
# it. Tests of targets that see put it on the path of a process of their own.
VISION := $(VENV)/vision
TORCHVISION := torchvision==0.28.0
SEES := $(VISION)/.installed

# Each stamp is written only once its step is whole, so an interrupted set-up is done
# again and a finished one costs nothing.
PACKAGES := $(VENV)/.packages
READY := $(VENV)/.ready

help: ## Print the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile

setup: $(READY) ## Build .venv: the pinned CPU packages, and both of ours editable
	@echo "setup: $(VENV) is ready"

demo: $(READY) ## Run the demo
	@$(BIN)/vllm-mtp demo

train-demo: $(READY) ## Generate, train, check and measure a drafter in .train-demo
	@BIN=$(BIN) sh examples/train/demo.sh .train-demo

bench: $(READY) ## Measure speed beside stock vLLM, into bench-report
	@$(BIN)/vllm-mtp bench --profile --out bench-report

test: lint ## Run the lint, then the tests
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test-versions: $(READY) ## Test with every vLLM that is said to work (downloads them once)
	@$(BIN)/python -m tools.version_matrix --cache .vllm-versions

lint: $(READY) ## Check style, format and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || \
		{ echo "lint: not formatted; run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary

format: $(READY) ## Fix what the linter can fix, and format
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .

clean: ## Remove .venv, caches and build outputs
	@rm -rf $(VENV) .train-demo bench-report .vllm-versions build dist *.egg-info $(METADATA)/build \
		$(METADATA)/*.egg-info $(DRAFTERS)/build $(DRAFTERS)/src/*.egg-info \
		.mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# From nothing whenever the list changes, so that .venv never holds more than the list.
$(PACKAGES): $(REQUIREMENTS) $(METADATA)/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
		echo "setup: $(PYTHON) not found; install Python 3.11 or later," \
			"or name one: make setup PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: $(REQUIREMENTS) needs Python 3.11 or later, and $(PYTHON) is" \
			"$$($(PYTHON) -V 2>&1); name another: make setup PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "setup: $(PYTHON) lacks the venv module; on Debian or Ubuntu install" \
			"the python3-venv package" >&2; exit 1; }
	@echo "setup: installing $(REQUIREMENTS) in $(VENV) (a few minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --no-deps -r $(REQUIREMENTS)
	@$(PIP) install --no-deps --no-build-isolation ./$(METADATA)
	@touch $@

$(SEES): $(PACKAGES)
	@rm -rf $(VISION)
	@$(PIP) install --no-deps --target $(VISION) $(TORCHVISION)
	@touch $@

# Again when a pyproject.toml changes, for the entry points and the version.
$(READY): $(PACKAGES) $(SEES) pyproject.toml setup.py $(DRAFTERS)/pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable . --editable ./$(DRAFTERS)
	@touch $@
