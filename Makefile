# make          prepare .venv: torch, a small pip-packaged ComfyUI, this package and its tools
# make demo     start a real ComfyUI and run the shared workflows; images go to output/
# make test     run the tests
# make check    lint, format and type checks
# make reproduce  train a small world, measure every method of the paper in it, write the report (ARGS=large: on a GPU)
# make bench    measure the pack against the stock nodes (ARGS=reuse: Guidance Cache; ARGS=training: the trainer);
#               docs/benchmarks.md says what
# make clean    remove .venv and the caches
#
# COMFYUI_PATH=DIR    use the ComfyUI in DIR, not the pip-packaged one (demo, test)
# MODEL=F CONCEPT=F   your own SD1.5 checkpoint and concept UNet (demo)
# PYTHON=FILE         run in this interpreter's environment as it is, not in .venv (pip install -e '.[dev,evaluate]' there)
# BASE_PYTHON=FILE    make .venv from this Python (3.10 to 3.12)
# TORCH="torch==X torchvision==Y"    another pair for a new .venv
# ARGS="-k words"     further arguments for pytest, or for the benchmark (ARGS=--small; ARGS="training --small")
# CONTRIBUTING.md gives the same as plain commands.

.DEFAULT_GOAL := venv
.DELETE_ON_ERROR:
.PHONY: venv demo test check bench reproduce lint types clean

VENV := .venv
PINS := requirements/comfyui-0.0.1.txt
TORCH ?= -r requirements/torch.txt
STAMP := $(VENV)/.complete
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

ifdef PYTHON
READY := require-pack
else
PYTHON := $(VENV)/bin/python
READY := $(STAMP)
endif

# `python -m pytest` would put the repository root on sys.path, where nodes/ shadows ComfyUI's nodes.py.
PYTEST := $(PYTHON) -c 'import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.main())'

venv: $(READY)

demo: $(READY)
	$(PYTHON) -m comfyui_gcfg.demo

# Two processes, a file's tests in one of them: each has models of its own, so more of them would need more memory.
# The editor's are run where there is a browser, or where one can be brought. Of the random graphs 60, not all 300.
test: export GRAPHS ?= 60
test: $(READY)
	@$(PYTHON) -m comfyui_gcfg.testkit.browser
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

reproduce: $(READY)
	$(PYTHON) -m comfyui_gcfg.reproduction $(ARGS)

bench: $(READY)
	$(PYTHON) -m comfyui_gcfg.benchmarks $(ARGS)

check: lint types

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# The root is the package, whatever the checkout is called: mypy sees it under its name through a link.
types: $(READY)
	@mkdir -p .cache/mypy && ln -sfn "$(CURDIR)" .cache/mypy/comfyui_gcfg
	$(PYTHON) -m mypy

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info

# The embedded ComfyUI runs on no other Python. `python3` comes first: it is the one its user knows.
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
BASE_PYTHON ?= $(firstword $(shell for p in python3 python3.12 python3.11 python3.10; do \
	if $$p -c '$(SUITABLE)' 2>/dev/null; then echo $$p; fi; done))

# Written last, so that an interrupted installation is not taken for a good one: without it .venv is made anew.
# Later changes of the pins are installed on top, and keep the torch that is there.
$(STAMP): pyproject.toml $(PINS)
	@[ -e $@ ] || $(or $(BASE_PYTHON),false) -c '$(SUITABLE)' || { \
	  echo "$(VENV) needs Python 3.10, 3.11 or 3.12 with its venv module: name one, make BASE_PYTHON=FILE." >&2; exit 1; }
	[ -e $@ ] || { rm -rf $(VENV) && $(BASE_PYTHON) -m venv $(VENV); }
	[ -e $@ ] || $(PIP) install -c $(PINS) $(TORCH)
	$(PIP) install -q --no-warn-conflicts -c $(PINS) -e '.[dev,evaluate]'
	$(PIP) install -q --no-deps -r $(PINS)
	@touch $@

require-pack:
	@$(PYTHON) -c 'import comfyui_gcfg' || { \
	  echo "PYTHON=$(PYTHON) cannot import comfyui_gcfg: run $(PYTHON) -m pip install -e '.[dev,evaluate]' first." >&2; exit 1; }
