# `make demo`, `make serve` and `make test` work on a fresh machine; the README shows the plain commands behind them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo serve test lint clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.megalite: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megalite needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e .
	touch $@

$(BIN)/.megalite-serve: $(BIN)/.megalite
	$(BIN)/pip install -e '.[serve]'
	touch $@

$(BIN)/.megalite-test: $(BIN)/.megalite
	$(BIN)/pip install -e '.[test]'
	touch $@

demo: $(BIN)/.megalite  ## Install, then generate with the demo model split over two processes
	$(BIN)/python launch/infer.py --config configs/infer/demo.yaml parallel.tp=2

serve: $(BIN)/.megalite-serve  ## Install the serve extra, then serve the demo model at http://127.0.0.1:8000
	$(BIN)/python launch/serve.py --config configs/serve/demo.yaml

test: $(BIN)/.megalite-test  ## Install the test extra and run the tests
	$(BIN)/pytest -q -n 2 --dist loadfile

lint: $(BIN)/.megalite-test  ## Check style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_imports.py
	$(BIN)/mypy

clean:  ## Remove the virtual environment
	rm -rf $(VENV)
