# One command each; `make help` lists them.
#
# The recipes need no shell but sh and no flags of it: GNU make 3.81, which
# macOS has, ignores .SHELLFLAGS. So no recipe has a pipe, which hides the
# failure of what stands before it, and what must not happen after a failure
# stands behind an &&.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check

# The Python that makes the environment: the first of these that is 3.11 or
# newer, or the one that you name: make book PYTHON=python3.13
PYTHON ?= python3 python3.13 python3.12 python3.11 python

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help book pdf test lab bench lint tidy clean
.DELETE_ON_ERROR:

help: ## this list
	@echo "make book    build the book, strictly; prints the page to open"
	@echo "make pdf     the same as one PDF; needs an installed Chromium"
	@echo "make test    run every test: style, units, notebooks, saboteurs, site"
	@echo "make lab     open the chapters in JupyterLab"
	@echo "make bench   measure speed and accuracy, and write benchmarks/report.md"
	@echo "make lint    check the style"
	@echo "make tidy    mend the style, and strip and number the notebooks' cells"
	@echo "make clean   delete what was built (the environment $(VENV) stays)"
	@echo
	@echo "Each makes its environment in $(VENV) when it is missing or outdated."
	@echo "Next: make book"

# The environment: made once, and brought up to date when a pin changes. The
# stamp says that the last installation succeeded.
$(STAMP): requirements.txt pyproject.toml
	@rm -f $@
	@if ! $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null; then \
	  found=; \
	  for python in $(PYTHON); do \
	    if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "Python 3.11 or newer is needed; tried: $(PYTHON)." >&2; \
	    echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making the environment $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@echo "Installing the packages of requirements.txt (a few minutes, once)"
	@$(PIP) install -r requirements.txt && $(PIP) check && touch $@

book: $(STAMP)
	@$(BIN)/python tools/build_book.py

pdf: book
	@$(BIN)/python tools/print_book.py

test: $(STAMP)
	@$(BIN)/python tools/run_tests.py

lab: $(STAMP)
	@echo "JupyterLab opens in your browser; Ctrl+C here ends it."
	@$(BIN)/jupyter lab --notebook-dir=chapters

bench: $(STAMP)
	@$(BIN)/python -m benchmarks
	@echo "Next: read benchmarks/report.md"

lint: $(STAMP)
	@$(BIN)/python tools/run_tests.py style

tidy: $(STAMP)
	@$(BIN)/python tools/tidy_notebooks.py
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@echo "Tidy. Next: make test"

clean:
	@rm -rf _build .exec .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	@find softmaxlib tests tools benchmarks _ext chapters -type d \
	  \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} + 2>/dev/null || true
	@echo "Clean. Next: make book (delete $(VENV) too for a new environment)"
