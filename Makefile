# make demo   the whole tour on the built-in model; ends in report/index.html
# make test   every test, offline
# make lint   style and types
# make bench  benchmarks; each prints a ratio against a named baseline as JSON
# make clean  removes what the targets above made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := demo

# The stamp is as young as the last install, so that editing the requirements installs again.
# torch is pinned in constraints.txt; where an index offers a CPU build of that version, pip takes it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/trimtab demo --out report

test: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/basedpyright

bench: $(STAMP)
	mkdir -p bench/results
	$(BIN)/python bench/extraction.py --json bench/results/extraction.json
	$(BIN)/python bench/steered_generation.py --json bench/results/steered_generation.json
	$(BIN)/python bench/sweep.py --json bench/results/sweep.json
	$(BIN)/python bench/tune.py --json bench/results/tune.json
	$(BIN)/python bench/strength_claims.py --json bench/results/strength_claims.json

clean:
	rm -rf $(VENV) report build dist .pytest_cache .ruff_cache
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
