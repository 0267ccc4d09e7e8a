# Sets up .venv by itself where a target needs it: `make test` and `make quickstart` work in a fresh clone.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/installed

# Each test process gets one core; together they use $(WORKERS)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-fast lint format types docs build clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "  Variables: PYTHON=$(PYTHON) makes .venv, WORKERS=$(WORKERS) test processes"

# The pins choose torch as well: without them pip would take whatever build is newest
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP) ## Train a small GPT-2 with Neural Attention and one with the dot product, and compare them
	$(BIN)/python recipes/language_modeling.py recipes/configs/quickstart.yaml

test: $(STAMP) ## Run all tests
	$(PYTEST)

test-fast: $(STAMP) ## Run the tests that are not marked slow
	$(PYTEST) -m "not slow"

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Fix style and formatting where that can be done by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types
	$(BIN)/mypy

# The variable silences a notice about the end of Material for MkDocs in 2027: what is printed then is a fault
docs: $(STAMP) ## Build the documents as a site into site/, and check their links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html, or serve it with its search: $(PYTHON) -m http.server --directory site"

build: $(STAMP) ## Build sdist and wheel into dist/
	$(BIN)/python -m build --no-isolation

clean: ## Remove .venv, caches and built files (trained models in runs/ stay)
	rm -rf .venv build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
