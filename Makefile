# Every target sets up what it needs in $(VENV). Needed on the machine: Python >= 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
# Apart from the tests' environment, in which JAX would look for the accelerators.
COMPILERS := $(VENV)-compilers
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test test-all test-wheel mutants faults check format bench compilers bench-compiled docs figures dist clean FORCE

help: ## Say what can be made
	@echo "usage: make TARGET [PYTHON=python3] [VENV=.venv] [WORKERS=2]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed-examples ## Train on real data in three ways, print the comparison, draw it
	@$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.installed-test ## Run the tests (ARGS="-k name" to choose)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: $(VENV)/.installed-test ## Run the tests with the lowest and the newest versions, on each Python, and of a wheel
	@$(BIN)/python tests/matrix.py $(CELLS) -- $(ARGS)

test-wheel: $(VENV)/.installed-test ## Build a wheel and run a few tests on it
	@$(BIN)/python tests/matrix.py smoke

mutants: $(VENV)/.installed-test ## Break the package in known ways and see that the tests notice
	@$(BIN)/python tests/mutations.py $(ARGS)

faults: $(VENV)/.installed-test ## Kill a training program twenty times in a row
	@OPTACCUM_KILLS=20 $(BIN)/python -m pytest -q tests/test_faults.py $(ARGS)

check: $(VENV)/.installed-dev ## Check formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

format: $(VENV)/.installed-dev ## Format, and fix what lint can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-bench ## Measure against the peers
	@$(BIN)/python -m benchmarks $(ARGS)

compilers: ## Compile for TPU and H100, which need not be here; check memory and collectives
	@$(MAKE) --no-print-directory VENV=$(COMPILERS) $(COMPILERS)/.installed-compilers
	@$(COMPILERS)/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/compilers $(ARGS)

bench-compiled: ## Write what these compilers say into the benchmark's results
	@$(MAKE) --no-print-directory VENV=$(COMPILERS) $(COMPILERS)/.installed-compilers
	@$(COMPILERS)/bin/python -m benchmarks.compiled $(ARGS)

docs: $(VENV)/.installed-docs ## Build the documentation into site/, strictly and without the network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)
	@echo "The documentation: site/index.html"

figures: $(VENV)/.installed-examples ## Draw the documentation's figures anew
	@$(BIN)/python docs/figures/draw.py $(ARGS)

dist: $(VENV)/.installed-dist ## Build a wheel and a source release into dist/, and check them
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist
	@$(BIN)/python -m twine check --strict dist/*

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(COMPILERS) figures site build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made anew when PYTHON is another version, and an extra is installed again when pyproject.toml changes.
$(VENV)/.python: FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "optaccum needs Python >= 3.11; " \
	    f"{sys.executable} is {sys.version.split()[0]}. Name another: make ... PYTHON=python3.12")'
	@version=$$($(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".")'); \
	if [ "$$version" != "$$(cat $@ 2>/dev/null)" ]; then \
	    echo "Making $(VENV) with Python $$version"; \
	    rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && echo "$$version" > $@; \
	fi

$(VENV)/.installed-%: $(VENV)/.python pyproject.toml
	@echo "Installing optaccum[$*] into $(VENV) (once; a minute or two)"
	@$(PIP_INSTALL) -e ".[$*]"
	@touch $@

FORCE:
