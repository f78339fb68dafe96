# Everything runs in .venv, which `make setup` fills; the other targets do it first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup clean

demo: setup
	$(BIN)/fedsim run experiments/digits.toml

test: setup .venv/triton
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedsim needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--config-settings editable_mode=compat --editable '.[dev]'
	touch $@

# The kernels for a GPU, which Triton's interpreter runs on any processor.
.venv/triton: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps triton
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
