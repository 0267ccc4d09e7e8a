# Sets up .venv by itself where a target needs it: `make test` and `make quickstart` work in a fresh clone.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/installed

# Gives each test process one core; together they use $(WORKERS)
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
INSTALL := python -m pip install -q --disable-pip-version-check

# Lists slow tests of what depends on versions most: models that bring their code to the Hub, and formats of other libraries
VERSION_TESTS := tests/test_export.py tests/models/test_flat_folder.py tests/test_export_formats.py tests/recipes/test_quantize.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart demo test test-slow test-triton gpu test-versions test-oldest test-newest test-clients coverage lint format types
.PHONY: docs reports build release clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
	@echo
	@echo "  Variables: PYTHON=$(PYTHON) makes .venv, WORKERS=$(WORKERS) test processes"

# Lets the pins choose torch as well: without them pip would take whatever build is newest. Asks for Python first, since an
# environment keeps the one that it was made with
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make ... PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP) ## Train small GPT-2s with Neural Attention and with the dot product, and compare them
	$(BIN)/python recipes/language_modeling.py recipes/configs/quickstart.yaml

demo: .venv-demo/installed ## Open a page that shows attention, scores and scorers of a model, and what a patch changes
	.venv-demo/bin/python recipes/demo/app.py

# Has an environment of its own with all other pins, since Gradio takes older versions of these two than the pinned ones
.venv-demo/installed: pyproject.toml constraints.txt recipes/demo/requirements.txt
	$(PYTHON) -m venv --clear .venv-demo
	grep -v -e '^pillow==' -e '^tomlkit==' constraints.txt > .venv-demo/constraints.txt
	.venv-demo/bin/$(INSTALL) -c .venv-demo/constraints.txt -e . -r recipes/demo/requirements.txt
	@touch $@

# Drives a browser that is on the machine: playwright brings none
.venv-demo/testable: .venv-demo/installed
	.venv-demo/bin/$(INSTALL) -c .venv-demo/constraints.txt playwright==1.65.2 pytest pytest-timeout pytest-xdist
	@touch $@

test: $(STAMP) ## Run the tests that are not marked slow: some of every part
	$(TESTS) -m "not slow"

test-slow: $(STAMP) ## Run the tests that are marked slow
	$(TESTS) -m slow

test-triton: $(STAMP) ## Run the tests of the Triton kernels on the CPU, in Triton's interpreter
	TRITON_INTERPRET=1 $(TESTS) -m interpreter tests/ops

gpu: ## Test the Triton kernels on a GPU and measure them, in 8 minutes; without one, say what that would be
	$(PYTHON) recipes/benchmark_gpu.py

# Lets old libraries call what others have deprecated since: there, and only there, deprecations are no errors
test-oldest: BIN := .venv-oldest/bin
test-oldest: .venv-oldest/installed ## Run the fast tests with the oldest versions of all libraries
	$(TESTS) --allow-deprecations -m "not slow"
	$(TESTS) --allow-deprecations -m slow $(VERSION_TESTS)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/$(INSTALL) -c constraints-oldest.txt -e '.[dev]'
	@touch $@

# Makes this environment anew, since what is newest changes by the day. torch is the pinned one: pip offers newer ones as CUDA
# builds only
test-newest: BIN := .venv-newest/bin
test-newest: ## Run the fast tests with the newest versions of all libraries
	$(PYTHON) -m venv --clear .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/constraints.txt
	$(BIN)/$(INSTALL) -c .venv-newest/constraints.txt -e '.[dev]'
	$(TESTS) -m "not slow"
	$(TESTS) -m slow $(VERSION_TESTS)

# Has an environment of its own, so that all other tests show what works without these libraries
test-clients: BIN := .venv-clients/bin
test-clients: .venv-clients/installed .venv-demo/testable ## Run the tests of TRL, DeepSpeed, torchao and other clients, and the page's
	$(TESTS) tests/clients
	OMP_NUM_THREADS=1 .venv-demo/bin/python -m pytest -q -rs tests/clients/test_demo.py

.venv-clients/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-clients
	.venv-clients/bin/$(INSTALL) -c constraints.txt -e '.[clients,dev]'
	@touch $@

test-versions: test-oldest test-newest ## Run the fast tests with the oldest and with the newest versions of all libraries
	@.venv-newest/bin/python -m tests.helpers.packages

coverage: $(STAMP) ## Run the fast tests and list the lines that none of them ran
	$(TESTS) -m "not slow" --cov --cov-report=term-missing:skip-covered

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Fix style and formatting where that can be done by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types
	$(BIN)/mypy

# Silences by the variable a notice about the end of Material for MkDocs in 2027: what is printed then is a fault
docs: $(STAMP) ## Build the documents as a site into site/, and check their links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html, or serve it with its search: $(PYTHON) -m http.server --directory site"

reports: $(STAMP) ## Write the reports, pictures and tables of all studies anew from the JSON of their runs
	@failed=0; for study in recipes/studies/*.yaml; do \
		name=$$(basename $$study .yaml); results=model_cards/studies/$${name%-small}; \
		[ -d $$results ] || continue; echo $$results; \
		OMP_NUM_THREADS=1 $(BIN)/python recipes/study.py $$study --results $$results --report_only \
			--pages README.md docs/*.md docs/evidence/*.md > /dev/null || failed=1; \
	done; exit $$failed

build: $(STAMP) ## Build sdist and wheel into dist/
	$(BIN)/python -m build --no-isolation

release: lint types ## Do everything of a release but the upload, for which it prints the commands
	.ci/release

clean: ## Remove .venv, caches and built files (trained models in runs/ stay)
	rm -rf .venv .venv-oldest .venv-newest .venv-clients .venv-demo .venv-gpu .coverage .coverage.* build dist site
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
