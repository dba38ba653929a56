# Everything below works on a machine with only make and Python >= 3.11: the first target that needs it makes the
# virtual environment and installs the package there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Workers of the test suite: compilation is most of it, and takes a core each.
JOBS ?= 2
CASES ?= 2000
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install train test lint fuzz bench bench-device clean

help:
	@echo "make train            train and evaluate a router (ARGS=\"--seed 1\": options of python -m jaxroute.train)"
	@echo "make test             run the test suite (ARGS=\"-m 'not slow'\" for the fast tests)"
	@echo "make lint             check style (ruff) and types (pyright)"
	@echo "make fuzz CASES=n     compare n random engines with the reference simulator"
	@echo "make bench            run the benchmarks, half an hour (ARGS=--quick: two minutes)"
	@echo "make bench-device     checks and rates on this machine's GPU (benchmarks/README.md)"
	@echo "make install          only make the virtual environment $(VENV) with $(PYTHON)"
	@echo "make clean            remove it, and caches"

install: $(READY)

# The CUDA build of JAX is installed where an NVIDIA driver answers.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python >= 3.11; name one: make PYTHON=python3.x ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	extras=dev; if nvidia-smi >/dev/null 2>&1; then extras=dev,cuda; fi; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$$extras]"
	@touch $@

train: $(READY)
	$(BIN)/python -m jaxroute.train $(ARGS)

# A file's tests stay with one worker, so that they share what is compiled.
test: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(CASES)

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

bench-device: $(READY)
	$(BIN)/python -m benchmarks.device $(ARGS)

clean:
	rm -rf .venv* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
