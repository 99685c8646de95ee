# Everything here sets itself up: a virtual environment in this folder, torch before what depends on it, the package.
#   make demo         train a small DeepSeekMoE without a bias, with Megatron-Core's and with ours; table and picture
#   make test         every test
#   make test-hosts   Megatron-Bridge 0.3.1, NeMo 2.7.3 and NeMo-Run for real, on Python 3.11; `make hosts launch` sets up
#   make test-latest  core, parity and Megatron-Bridge 0.6.2 on Python 3.12 and megatron-core 0.19.2; `make latest`
#   make gpu          where there is a GPU: tests that need one, what a router costs, a training; PYTHON=... has megatron-core
#   make reliability  200 kills, 20,000 updates, 10,000 damaged files, and the table of docs/reliability.md
#   make check        style and types
#   make docs         the pages that are generated from the code and from the results of the benchmarks
#   make site         docs/ and a reference of the API as pages in site/; fails on a broken link or a name that is not there

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON_LATEST ?= python3.12
TORCH = torch==2.13.0
VENV = .venv
HOSTS = .venv-hosts
LAUNCH = .venv-launch
LATEST = .venv-latest
PIP_FLAGS ?=
PIP = -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
ARGS ?=
# What may differ with the version of Megatron-Core, SciPy or Python, or with torch's build.
ON_LATEST = tests/test_routing.py tests/test_margins.py tests/test_near_ties.py tests/test_loads.py tests/test_alarms.py tests/rules \
	tests/lab/theory tests/lab/checkpoints tests/hosts tests/distributed tests/traced

# Every rank of every test imports this package and its tests, which nobody else compiles.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test gpu reliability test-hosts test-bridge test-nemo test-latest check docs site setup hosts launch latest clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(VENV)/bin/alflb demo $(ARGS)

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(ARGS)

# Offline, with what that machine has: a virtual environment would bring another torch.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

reliability: $(VENV)/ready
	ALFLB_LONG=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/reliability tests/fuzz $(ARGS)
	$(VENV)/bin/python docs/generate.py

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy benchmarks
	$(VENV)/bin/mypy docs/hooks.py docs/names.py

docs: $(VENV)/ready
	$(VENV)/bin/python docs/generate.py
	$(VENV)/bin/python -m benchmarks.report

site: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Each host has a process of its own that the tests' ranks are forked from, with the host imported.
test-hosts: test-bridge test-nemo
test-bridge: $(HOSTS)/ready
	ALFLB_TESTS_PRELOAD=tests.preloaded_bridge $(HOSTS)/bin/python -m pytest tests/hosts/test_bridge.py $(ARGS)
test-nemo: $(HOSTS)/ready $(LAUNCH)/ready
	ALFLB_TESTS_PRELOAD=tests.preloaded_nemo $(HOSTS)/bin/python -m pytest tests/hosts/test_nemo.py $(ARGS)
	$(HOSTS)/bin/python -m pytest tests/hosts/test_huggingface.py tests/recipes tests/distributed/test_identity.py $(ARGS)
	$(LAUNCH)/bin/python -m pytest tests/recipes -k skypilot $(ARGS)

test-latest: $(LATEST)/ready
	$(LATEST)/bin/python -m pytest $(ON_LATEST) --ignore=tests/hosts/test_bridge.py $(ARGS)
	ALFLB_TESTS_PRELOAD=tests.preloaded_bridge $(LATEST)/bin/python -m pytest tests/hosts/test_bridge.py $(ARGS)

setup: $(VENV)/ready
hosts: $(HOSTS)/ready
launch: $(LAUNCH)/ready
latest: $(LATEST)/ready

$(VENV)/ready: pyproject.toml alflb_megatron/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) '$(TORCH)'
	$(VENV)/bin/python $(PIP) --editable '.[dev]'
	touch $@

$(HOSTS)/ready: pyproject.toml requirements/hosts.txt
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python $(PIP) '$(TORCH)'
	$(HOSTS)/bin/python $(PIP) --no-deps --requirement requirements/hosts.txt --editable .
	touch $@

$(LAUNCH)/ready: pyproject.toml requirements/launch.txt
	$(PYTHON) -m venv $(LAUNCH)
	$(LAUNCH)/bin/python $(PIP) '$(TORCH)'
	$(LAUNCH)/bin/python $(PIP) --no-deps --requirement requirements/launch.txt --editable .
	touch $@

$(LATEST)/ready: pyproject.toml requirements/latest.txt
	$(PYTHON_LATEST) -m venv $(LATEST)
	$(LATEST)/bin/python $(PIP) '$(TORCH)'
	$(LATEST)/bin/python $(PIP) --no-deps --requirement requirements/latest.txt --editable .
	touch $@

# Those of the hosts are large and change with their pins only.
clean:
	rm -rf $(VENV)

distclean: clean
	rm -rf $(HOSTS) $(LAUNCH) $(LATEST)
