# Every target works from a clean clone with nothing but Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-hf families check format plan-golden options-golden gpu gpu-wheels clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q -j 0 -x '/test(s|ing)/' $(VENV)/lib  # on all cores; pip takes one
	@touch $@

demo: $(INSTALLED) ## Draw a demo set, make a real MoE vision-language model sick, try three cures, write the matrix
	$(BIN)/moevlm data build scenes
	$(BIN)/moevlm sweep run ablations/demo

test: $(INSTALLED) ## Run the tests (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal  # a worker per core, a thread per worker

test-slow: $(INSTALLED) ## Run the tests that are left out of `make test`
	$(BIN)/python -m pytest -m slow

test-hf: $(INSTALLED) ## Run the tests of models from Hugging Face; installs the extra `hf`
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hf]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/model/backbones/adopted tests/cli/models tests/cli/test_export_hugging_face.py tests/bench/test_adopted.py

families: $(INSTALLED) ## Write the table of Hugging Face's families anew; installs the extra `hf`
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hf]'
	MOEVLM_WRITE_GOLDEN=1 $(BIN)/python -m pytest -m slow tests/model/backbones/adopted/test_families.py

check: $(INSTALLED) ## Format, lint, types, import contracts, dependencies; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

format: $(INSTALLED) ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

plan-golden: $(INSTALLED) ## Write the golden plans of the shipped studies anew
	MOEVLM_WRITE_GOLDEN=1 $(BIN)/python -m pytest -m "slow or not slow" tests/study/plan/test_golden_plan.py

options-golden: $(INSTALLED) ## Write the frozen list of commands and options anew
	MOEVLM_WRITE_GOLDEN=1 $(BIN)/python -m pytest tests/cli/test_frozen_options.py

DEVICE ?= cuda
gpu: ## All that needs a GPU, in 8 minutes, with this PYTHON and no network: writes .gpu/table.md (DEVICE=cpu rehearses)
	$(PYTHON) tests/on_gpu.py run --device $(DEVICE)

HAVE ?= pip-list.txt
gpu-wheels: ## Fetch what a machine without network lacks (HAVE: its `pip list --format=freeze`)
	$(PYTHON) tests/on_gpu.py wheels --have $(HAVE)

clean: ## Remove what builds and tests left; keeps data and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
