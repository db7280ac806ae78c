# The two commands of the README, and the developer's: each makes its own virtual environment when there is none.
#   make demo    the whole road on synthetic x-rays, ending with a report      make lint    ruff and mypy
#   make test    the test suite                                                make bench   benchmarks of this machine
#   make soak    30 random kills, digests compared; more with KILLS=N         make test-slow   the tests that take minutes
#   make clean   remove the environment and what the commands above wrote     make fuzz        20,000 damaged files
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
KILLS ?= 30
PYTEST_ARGS ?= -n auto --dist loadfile
EXTRAS ?= dev
BIN := $(VENV)/bin
COMMA := ,
READY := $(VENV)/.ready-$(subst $(COMMA),+,$(EXTRAS))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-extras test-slow soak lint fuzz bench clean

help:
	@sed -n '2,5s/^# *//p' Makefile

# pip compiles what it installs: without bytecode every process would compile torch anew. The constraints pin everything.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, found {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)
	$(BIN)/ddpm-lmk demo --out $(OUT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

test-extras: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'extra and not slow' $(PYTEST_ARGS)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --kills $(KILLS) --steps $$(( 20 * $(KILLS) )) --out soak.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.sweep_soak --steps 90 --out soak_sweep.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.fuzz

bench: $(READY)
	$(BIN)/ddpm-lmk bench all --out benchmarks/results

clean:
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
