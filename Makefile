# Every target builds .venv first if it is missing or if pyproject.toml or constraints.txt changed since.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test test-slow lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       show what the library does, in a minute, on the CPU"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that 'make test' leaves out"
	@echo "make lint       check format, lint rules and types"
	@echo "make format     rewrite the sources in the house format"
	@echo "make clean      remove the environment, build products and caches"

demo: $(STAMP)
	$(BIN)/python -m nfzoo.demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made anew, so that a dependency which was dropped does not linger; the stamp goes with the old one
# and is written last, so a failed installation leaves none. Where the interpreter comes without ensurepip, the pip
# beside it installs pip. The links under typing/ are for pyright, see pyproject.toml.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "error: '$(PYTHON)' was not found; name a Python >= 3.11, as in: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: nfzoo needs Python >= 3.11, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1);" \
			"name a newer one, as in: make PYTHON=python3.12" >&2; exit 1; }
	rm -rf $(VENV)
	"$(PYTHON)" -m venv $(VENV) || { \
		rm -rf $(VENV) && "$(PYTHON)" -m venv --without-pip $(VENV) && \
		"$(PYTHON)" -m pip --python $(BIN)/python install pip; }
	@echo "installing nfzoo and its dependencies into $(VENV); this takes minutes, once"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,plots]'
	mkdir -p $(VENV)/typing/nfzoo
	ln -sfn ../../../hub $(VENV)/typing/nfzoo/hub
	ln -sfn ../../../conversion $(VENV)/typing/nfzoo/conversion
	touch $@
