# make setup   make the environment in .venv
# make demo    train RIDE on a small real data set that scikit-learn ships
# make test    run all tests but the long fault drills
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete
# Bytecode is kept: else every process of a run compiles our packages again.
unexport PYTHONPATH PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test unit drills lint types bench audit clean

setup: $(STAMP)

# Standard builds from the package index, pinned. Compiled to bytecode here, so that libraries load in half the time.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"expertail needs Python 3.11 or later, found {sys.version.split()[0]}; set PYTHON=/path/to/python3.11")'
	@echo 'installs torch, Ray, DeepSpeed, MLflow and the rest in .venv; minutes, most of it downloads'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/expertail train method=ride dataset=digits_lt pace=demo run.name=demo
	@echo
	@echo "report:  runs/demo/report/      this table and pictures"
	@echo "MLflow:  $(BIN)/mlflow server --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port 5000"

test: setup
	$(BIN)/python -m pytest -m 'not drill' -n 2 --dist loadgroup

unit: setup
	$(BIN)/python -m pytest -m 'not drill and not ray and not slow' -n 2 --dist loadgroup tests/unit tests/contract tests/parity tests/properties

drills: setup
	$(BIN)/python -m pytest -m drill

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/epoch.py --out
	$(BIN)/python benchmarks/startup.py
	@echo 'longer, or with data: benchmarks/demo.py, loader.py, learning_check.py, soak.py, studies.py; as modules: benchmarks.tables, .loss_steps'

audit: setup
	$(BIN)/python .ci/audit.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
