# The two commands of the README, and the developer's: each makes its own virtual environment when there is none.
#   make demo    the whole road on synthetic x-rays, ending with a report      make lint    ruff and mypy
#   make test    the test suite                                                make bench   benchmarks of this machine
#   make soak    30 random kills and 60 signals; more with KILLS=N             make test-slow     tests that take minutes
#   make fuzz    20,000 damaged files, 44,000 unusual ones                     make test-extras   only those of EXTRAS
#   make docs    the documents as a site: open site/index.html                 make test-docs     the code on their pages
#   make clean   remove the environment and what the commands above wrote      make notebook      run the notebook anew
#   TORCH=cpu    torch without CUDA, when the environment is made              PYTHON=python3.13   another Python
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
KILLS ?= 30
PYTEST_ARGS ?= -n auto --dist loadfile
EXTRAS ?= dev
TORCH ?=
BIN := $(VENV)/bin
COMMA := ,
READY := $(VENV)/.ready-$(subst $(COMMA),+,$(EXTRAS))
CPU_TORCH := https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH=$(TORCH): wanted TORCH=cpu, or nothing for the build that pip finds)
endif

.DEFAULT_GOAL := help
.PHONY: help environment environment-docs demo test test-extras test-slow soak lint fuzz bench docs test-docs notebook clean

help:
	@sed -n '2,8s/^# *//p' Makefile

VERSION := import sys; print(*sys.version_info[:2], sep=".")
ASKED := $(filter-out file,$(origin PYTHON))# not empty: whoever calls make named a Python

# An environment is used as it is when its Python starts, is new enough and the one asked for, has pip, and still lies
# where it was made, which its scripts hold. pip compiles what it installs: without bytecode every process would compile
# torch anew. The constraints pin everything.
environment:
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
	    && head -2 $(BIN)/pip | grep -qF '$(abspath $(BIN))/' \
	    && { test -z '$(ASKED)' || test "$$($(PYTHON) -c '$(VERSION)')" = "$$($(BIN)/python -c '$(VERSION)')"; } \
	    || { $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, found {v[0]}.{v[1]}; try make PYTHON=python3.11")' \
	        && { test ! -e $(VENV) || echo "$(VENV) is of another Python or was made in another folder: it is made anew"; } \
	        && $(PYTHON) -m venv --clear $(VENV); }
	@test -e $(READY) && ! test pyproject.toml -nt $(READY) && ! test constraints.txt -nt $(READY) || { \
	    echo "Installing ddpm-lmk[$(EXTRAS)] for Python $$($(BIN)/python -c '$(VERSION)') into $(VENV). Most of it is torch:"; \
	    echo "its CPU build is 0.2 GB to download (1.4 GB of disk in all); PyPI's build for Linux has CUDA: 2.8 GB (5 GB)."; \
	    echo "For the CPU build where pip would take the other: make clean, then add TORCH=cpu to the command."; \
	    $(BIN)/python -m pip install -c constraints.txt $(TORCH:cpu=--extra-index-url $(CPU_TORCH)) -e '.[$(EXTRAS)]' && touch $(READY); }

demo: environment
	$(BIN)/ddpm-lmk demo --out $(OUT)

test: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

test-extras: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'extra and not slow' $(PYTEST_ARGS)

test-slow: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

soak: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --kills $(KILLS) --steps $$(( 20 * $(KILLS) )) --out soak.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.sweep_soak --steps 90 --out soak_sweep.json
	$(BIN)/python -m tests.faults.signals_anywhere --signals $$(( 2 * $(KILLS) )) --out signals_anywhere.json

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kinds

# The extra `docs` beside those asked for. Nothing is fetched but by pip.
environment-docs:
	@$(MAKE) --no-print-directory environment EXTRAS=$(EXTRAS)$(if $(filter docs,$(subst $(COMMA), ,$(EXTRAS))),,$(COMMA)docs)

docs: environment-docs
	$(BIN)/python docs/build.py site && echo site/index.html

test-docs: environment-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/docs

notebook: environment-docs
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter nbconvert --execute --to notebook --inplace docs/first-landmarks.ipynb

bench: environment
	$(BIN)/ddpm-lmk bench all --out benchmarks/results

clean:
	rm -rf $(VENV) $(OUT) site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
