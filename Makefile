# Every target works on a fresh machine with nothing but Python (3.11 or newer) and make.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-fast matrix lint types format bench docs clean

demo: .venv/installed
	$(BIN)/python examples/quickstart.py

# Three workers, as some tests wait: see tests/conftest.py for what runs where.
PYTEST := $(BIN)/python -m pytest --numprocesses 3

test: .venv/installed
	$(PYTEST)

test-fast: .venv/installed
	$(PYTEST) -m "not process"

# Of CELLS="lowest-3.11 newest-3.13", or of all; see tests/matrix.py.
matrix: .venv/installed
	$(BIN)/python tests/matrix.py $(CELLS)

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/installed
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed-bench
	$(BIN)/python benchmarks/count_calls.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/features.py
	$(BIN)/python benchmarks/distributed.py

docs: .venv/installed
	$(BIN)/hookengine events --markdown > docs/events.md
	$(BIN)/python -m hookengine.model.stub > hookengine/model/__init__.pyi.new
	mv hookengine/model/__init__.pyi.new hookengine/model/__init__.pyi

# The stamps make a second run cost nothing; they are remade when pyproject.toml changes.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	touch $@

clean:
	rm -rf .venv .venv-matrix work_dir .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
