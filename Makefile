# Everything below works on a machine with only make and Python >= 3.11: the first target that needs it makes the
# virtual environment and installs the package there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs_ready

# Workers of the test suite: compilation is most of it, and takes a core each.
JOBS ?= 2
CASES ?= 2000
SETS ?= gymnax-0 gymnax gymnasium sb3 rejax ray optuna mctx litellm ray-serve openai
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install train test coverage lint package docs loggers fuzz bench live bench-device compat clean

help:
	@echo "make train            train and evaluate a router (ARGS=\"--seed 1\": options of jaxroute train)"
	@echo "make test             run the test suite (ARGS=\"-m 'not slow'\" for the fast tests)"
	@echo "make coverage         the same, and the share of lines that ran, by file in coverage.md"
	@echo "make lint             check style and docstrings (ruff), imports (import-linter) and types (pyright)"
	@echo "make package          build wheel and source archive in dist/, try them outside of the checkout"
	@echo "make docs             build the docs site in build/docs; a warning is an error"
	@echo "make loggers          test the loggers with Weights & Biases and MLflow, offline, in .venv-loggers"
	@echo "make compat           test what needs extras, each in its own virtual environment (SETS=\"gymnax sb3\" for some)"
	@echo "make fuzz CASES=n     compare n random engines with the reference simulator"
	@echo "make bench            run the benchmarks, half an hour (ARGS=--quick: two minutes)"
	@echo "make live             jaxroute serve in front of real vLLM servers, against the simulator (ROUTERS=\"NAME ...\")"
	@echo "make bench-device     checks and rates on this machine's GPU (benchmarks/README.md)"
	@echo "make install          only make the virtual environment $(VENV) with $(PYTHON)"
	@echo "make clean            remove it, and caches"

install: $(READY)

# The CUDA build of JAX is installed where an NVIDIA driver answers. Bytecode is compiled of what is imported, when it is.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python >= 3.11; name one: make PYTHON=python3.x ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	extras=dev; if nvidia-smi >/dev/null 2>&1; then extras=dev,cuda; fi; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--editable ".[$$extras]"
	@touch $@

train: $(READY)
	$(BIN)/jaxroute train $(ARGS)

# A file's tests stay with one worker, so that they share what is compiled; the longest files come first
# (tests/conftest.py), not those of the most tests.
SHARED := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(BIN)/python -m pytest -q $(SHARED) $(ARGS)

coverage: $(READY)
	$(BIN)/python -m pytest -q $(SHARED) --cov --cov-report=markdown:coverage.md $(ARGS)
	@echo "lines that ran: $$($(BIN)/python -m coverage report --format=total) %; by file in coverage.md"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

package: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m tests.package dist

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@

# Anew each time: a page that is left over would hide a broken link.
docs: $(DOCS_READY)
	rm -rf build/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --conf-dir docs . build/docs

# An environment of its own, since MLflow caps the versions of much that it depends on.
loggers:
	$(MAKE) install VENV=.venv-loggers
	.venv-loggers/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[wandb,mlflow]"
	.venv-loggers/bin/python -m pytest -q tests/test_runs_metrics_log.py $(ARGS)

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(CASES)

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

# Real vLLM servers that sleep instead of running a model, in an environment of their own (3 GB). LIVE_TOOLS has the
# scripts that make it and start them.
LIVE ?= build/live
LIVE_TOOLS ?= ../shared/live
ROUTERS ?= index_rule shortest_queue round_robin bert_router

live: $(READY)
	mkdir -p $(LIVE)
	test -d $(LIVE)/v33 || bash $(LIVE_TOOLS)/setup_vllm.sh $(LIVE)/v33 0.33.0
	test -d $(LIVE)/tiny || $(LIVE)/v33/bin/python $(LIVE_TOOLS)/mkmodel.py $(LIVE)/tiny
	LIVE=$(LIVE) LIVE_TOOLS=$(LIVE_TOOLS) $(BIN)/python -m benchmarks.live.cluster $(ROUTERS) $(ARGS)

bench-device: $(READY)
	$(BIN)/python -m benchmarks.device $(ARGS)

# TORCH may name a smaller build (see the script).
compat:
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" tests/compat.sh $(SETS)

clean:
	rm -rf .venv* .pytest_cache .ruff_cache .hypothesis build dist .coverage coverage.md
	find . -name __pycache__ -prune -exec rm -rf {} +
