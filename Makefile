# Everything here sets itself up: a virtual environment in this folder, torch before what depends on it, the package.
#   make demo         train a small DeepSeekMoE without a bias, with Megatron-Core's and with ours; table and picture
#   make test         every test
#   make test-latest  the tests of the core and of parity on Python 3.12 and megatron-core 0.19.2
#   make check        style and types
#   make docs         the pages that are generated from the code and from the results of the benchmarks

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON_LATEST ?= python3.12
TORCH = torch==2.13.0
VENV = .venv
LATEST = .venv-latest
ARGS ?=

.PHONY: demo test test-latest check docs setup clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(VENV)/bin/alflb demo $(ARGS)

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(ARGS)

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy benchmarks

docs: $(VENV)/ready
	$(VENV)/bin/python docs/generate.py
	$(VENV)/bin/python -m benchmarks.report

test-latest: $(LATEST)/ready
	$(LATEST)/bin/python -m pytest tests/test_routing.py tests/test_margins.py tests/test_loads.py tests/rules tests/theory tests/hosts tests/distributed $(ARGS)

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(LATEST)/ready: pyproject.toml
	$(PYTHON_LATEST) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check 'megatron-core==0.19.2' --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LATEST)
