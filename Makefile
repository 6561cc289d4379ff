# Everything sets itself up: `make demo` and `make test` work from a fresh clone with Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

DATA ?= data

.PHONY: demo test test-slow lint types docs bench format setup clean

demo: setup
	$(BIN)/robustfpd demo

test: setup
	$(BIN)/python -m pytest -n logical --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest tests/test_site.py -m slow

bench: setup
	$(BIN)/python -m benchmarks --data-root $(DATA) --out results/benchmark/
	$(BIN)/python -m benchmarks --read results/benchmark/*.json --document docs/benchmarks.md

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "robustfpd needs Python 3.11 or newer; set one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[attacks,export,docs,dev]'
	@touch $(READY)

clean:
	rm -rf .venv runs site
