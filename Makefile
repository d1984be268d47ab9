# make demo    trains a small network on real handwriting into a 98 % sparse one
# make test    runs the tests
# Both set up all they need: an environment in .venv, torch, the compiled kernels.
#
# With a GPU, newest torch:       make TORCH=torch demo
# With the Python that is there:  make VENV=system demo        (no environment, no network; PYTHON=... picks the Python)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= cpu

ifeq ($(VENV),system)
PY := $(shell command -v $(PYTHON))
STAMPS := build/system
PIP_INSTALL := $(PY) -m pip install --no-build-isolation --no-deps
else
PY := $(abspath $(VENV))/bin/python
STAMPS := $(VENV)/stamps
PIP_INSTALL := $(PY) -m pip install
endif

ifeq ($(TORCH),cpu)
REQUIREMENT := torch
# An environment variable, because it also holds for what pip's isolated builds fetch.
export PIP_CONSTRAINT := $(CURDIR)/constraints-cpu.txt
else
REQUIREMENT := $(TORCH)
endif

# The environment remembers its torch; another one needs another environment.
MADE_WITH := $(shell cat $(STAMPS)/python 2>/dev/null)
ifneq ($(MAKECMDGOALS),clean)
ifneq ($(filter-out $(TORCH),$(MADE_WITH)),)
$(error $(VENV) was made with TORCH=$(MADE_WITH), now TORCH=$(TORCH): `make clean` first, or set VENV)
endif
endif

KERNEL_SOURCES := setup.py $(wildcard _build/*.py csrc/*.* csrc/*/*.*)

.PHONY: demo test test-all test-install bench lint format clean
.SECONDARY:

demo: $(STAMPS)/train
	$(PY) -m rpg_fast train

test: $(STAMPS)/test
	$(PY) -m pytest

test-all: $(STAMPS)/test
	$(PY) -m pytest -m ""

bench: $(STAMPS)/test
	$(PY) -m pytest --benchmark-only benchmarks

test-install: $(STAMPS)/test
	bash tests/install_matrix.sh $(PY)

lint: $(STAMPS)/dev
	PATH="$(dir $(PY)):$$PATH" $(PY) -m pre_commit run --all-files --show-diff-on-failure

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(dir $(PY))clang-format -i $(wildcard csrc/*.* csrc/*/*.*)

clean:
	rm -rf build dist .venv rpg_fast/_C.* *.egg-info

$(STAMPS)/python:
ifneq ($(VENV),system)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(REQUIREMENT)
endif
	mkdir -p $(@D)
	echo "$(TORCH)" > $@

# One stamp for each set of extras: train, test, dev. The install compiles the kernels whose sources have changed.
$(STAMPS)/%: $(STAMPS)/python pyproject.toml constraints-cpu.txt $(KERNEL_SOURCES)
	$(PIP_INSTALL) -e ".[$*]"
	touch $@
