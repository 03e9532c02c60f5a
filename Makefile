# make setup   .venv with tested versions, done once until pyproject.toml or constraints.txt change
# make demo    the embedded run: tables in the terminal, one HTML report
# make test    the whole CPU suite
# make lint    what the CI asks of a commit
# make peft-suite   PEFT's own tests against our methods; downloads them, keeps nothing

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint peft-suite clean

setup: $(STAMP)

# What a user needs; tests and tools come on top.
$(RUNS): pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once; this takes a minute or two."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e .
	@touch $@

$(STAMP): $(RUNS)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(RUNS)
	$(BIN)/polyrank run

# One thread a process: the tests' tensors are small, and the workers share the cores.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files
	$(BIN)/mypy

peft-suite: $(STAMP)
	$(BIN)/python tests/external/run_peft_suite.py $(SUITE_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
