PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup paper report docs readme smollm2 test test-slow test-faults lint clean

help:           ## List the targets.
	@grep -E '^[a-z0-9-]+: .*##' Makefile | sed 's/: .*##/\t/'

setup: .venv/installed  ## Make .venv with the project and its tools.

# torch first and alone: another package's requirement could pick a build with gigabytes of CUDA libraries
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[pipeline,dev]'
	touch $@

paper: setup    ## Measure what is missing on the embedded model, write outputs/paper/index.html and paper.md, print the verdicts.
	$(BIN)/python -m pipeline.paper --processes 2

report: paper   ## The same, and open it as a page: outputs/paper/index.html.
	$(BIN)/python -m webbrowser -t "file://$(CURDIR)/outputs/paper/index.html"

docs: setup     ## Build the pages as a site that needs no network: outputs/docs/index.html.
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --quiet

readme: setup   ## The same, and copy tables and figures into the README.
	$(BIN)/python -m pipeline.paper --processes 2 --readme README.md

smollm2: setup  ## Fetch a model of 135 M parameters (93 MB) and run WaveletTriAttn on it: 512 of 4096 tokens, two windows.
	$(BIN)/python -m pipeline.fetch smollm2
	$(BIN)/python -m pipeline model=smollm2 method=wavelet_tri budget=512 document.count=2

# a file's tests stay in one process, which makes what they share once; files with many small tests come last
test: setup     ## Run the fast tests.
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: setup  ## Run the slow tests.
	$(BIN)/python -m pytest -m slow

test-faults: setup  ## Kill, interrupt and starve sweeps; several processes; an MLflow server on PostgreSQL.
	$(BIN)/python -m pytest -m faults

lint: setup     ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:          ## Remove the virtual environment.
	rm -rf .venv
