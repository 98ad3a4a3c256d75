# Every target builds .venv first if it is missing or if pyproject.toml or constraints.txt changed since.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# The tests start hundreds of processes, each of which would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

# Test files shared out over processes, each file to one, so that what its tests have in common is made once.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# More environments, for what pins another torch or brings a compiler of its own.
XLA := .venv-xla
TPU := .venv-tpu
GPU := .venv-gpu
INTEGRATIONS := .venv-integrations
DOCS := .venv-docs

.PHONY: help demo test test-slow test-long test-xla test-tpu test-gpu test-integrations docs lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       show what the library does, in a minute, on the CPU"
	@echo "make test       run the tests, in two processes; WORKERS=8 for more"
	@echo "make test-slow  run the tests of seconds that 'make test' leaves out"
	@echo "make test-long  run the tests of minutes that both leave out"
	@echo "make test-xla   run the tests under torch-xla, in $(XLA); ARGS='-m slow' for the training runs"
	@echo "make test-tpu   compile for TPUs that are not here, in $(TPU)"
	@echo "make test-gpu   run Triton kernels in its interpreter and compile them for GPUs that are not here, in $(GPU)"
	@echo "make test-integrations  load nfzoo's folders by transformers, timm, transformers.js and others, in $(INTEGRATIONS)"
	@echo "make docs       build the site into build/site, with warnings as errors, in $(DOCS)"
	@echo "make lint       check format, lint rules and types"
	@echo "make format     rewrite the sources in the house format"
	@echo "make clean      remove the environments, build products and caches"

demo: $(STAMP)
	$(BIN)/python -m nfzoo.cli.demo

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) --dist worksteal -m 'slow and not long'

test-long: $(STAMP)
	$(PYTEST) -m long

test-xla: $(XLA)/.installed
	$(XLA)/bin/python -m pytest tests/xla $(ARGS)

test-tpu: $(TPU)/.installed
	$(TPU)/bin/python -m pytest tests/tpu $(ARGS)

test-gpu: $(GPU)/.installed
	$(GPU)/bin/python -m pytest tests/gpu $(ARGS)

test-integrations: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -m pytest -p no:anyio tests/integrations $(ARGS)

# The site's API pages read nfzoo's sources in the tree that a wheel installs, and import nothing.
docs: $(DOCS)/.installed
	rm -rf $(DOCS)/sources
	mkdir -p $(DOCS)/sources/nfzoo
	@ln -s $(addprefix ../../../,$(wildcard nfzoo/*.py nfzoo/[a-z]*/ hub conversion)) $(DOCS)/sources/nfzoo
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(XLA) $(TPU) $(GPU) $(INTEGRATIONS) $(DOCS) build dist *.egg-info .pytest_cache .ruff_cache
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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	mkdir -p $(VENV)/typing/nfzoo
	ln -sfn ../../../hub $(VENV)/typing/nfzoo/hub
	ln -sfn ../../../conversion $(VENV)/typing/nfzoo/conversion
	touch $@

# torch-xla needs torch 2.9, which PyPI has with CUDA alone: gigabytes that nothing here calls. So torch comes without its
# dependencies, and a script makes stand-ins for the libraries that it wants to find.
$(XLA)/.installed: pyproject.toml constraints.txt tests/xla/requirements.txt tests/xla/cuda_stubs.py
	rm -rf $(XLA)
	"$(PYTHON)" -m venv $(XLA)
	@echo "installing torch-xla into $(XLA); this takes minutes, once"
	$(XLA)/bin/python -m pip install --quiet --constraint constraints.txt --requirement tests/xla/requirements.txt
	$(XLA)/bin/python -m pip install --quiet --no-deps torch==2.9.0 torch-xla==2.9.0 nvidia-cuda-runtime-cu12==12.8.90
	$(XLA)/bin/python -m pip install --quiet --no-deps --constraint constraints.txt accelerate
	$(XLA)/bin/python -m pip install --quiet --no-deps --editable .
	$(XLA)/bin/python tests/xla/cuda_stubs.py
	touch $@

$(TPU)/.installed: pyproject.toml constraints.txt
	rm -rf $(TPU)
	"$(PYTHON)" -m venv $(TPU)
	@echo "installing the TPU compiler into $(TPU); this takes minutes, once"
	$(TPU)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[tpu-aot]' pytest pytest-timeout
	touch $@

$(GPU)/.installed: pyproject.toml tests/gpu/requirements.txt
	rm -rf $(GPU)
	"$(PYTHON)" -m venv $(GPU)
	@echo "installing Triton into $(GPU); this takes minutes, once"
	$(GPU)/bin/python -m pip install --quiet --requirement tests/gpu/requirements.txt
	$(GPU)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# LiteRT's converter holds anyio at a version whose plugin for pytest is of an older pytest.
#
# transformers.js brings the native libraries that it computes with; an installation script of theirs, which would fetch
# others, is not run. No lock file is kept, as one names servers.
$(INTEGRATIONS)/.installed: pyproject.toml constraints.txt tests/integrations/requirements.txt tests/integrations/package.json
	@command -v node >/dev/null && command -v npm >/dev/null || { \
		echo "error: transformers.js needs node and npm, which were not found; install Node.js 20 or newer" >&2; exit 1; }
	rm -rf $(INTEGRATIONS)
	"$(PYTHON)" -m venv $(INTEGRATIONS)
	@echo "installing transformers, timm, OpenVINO and transformers.js into $(INTEGRATIONS); this takes minutes, once"
	$(INTEGRATIONS)/bin/python -m pip install --quiet --constraint constraints.txt --editable . \
		--requirement tests/integrations/requirements.txt
	mkdir $(INTEGRATIONS)/node
	cp tests/integrations/package.json $(INTEGRATIONS)/node
	npm install --prefix $(INTEGRATIONS)/node --silent --ignore-scripts --no-package-lock --no-audit --no-fund
	touch $@

$(DOCS)/.installed: docs/requirements.txt
	rm -rf $(DOCS)
	"$(PYTHON)" -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@
