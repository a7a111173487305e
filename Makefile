# Two commands set everything up: `make sweep` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SPACE ?= cmr_collage
ARGS ?=
OUTPUTS ?= outputs

.PHONY: sweep run test test-faults lint types layers pytest bench ui contact-sheet clean

sweep: $(INSTALLED)
	$(BIN)/python -m orchestrator.sweep $(SPACE) --outputs $(OUTPUTS) $(ARGS)

run: $(INSTALLED)
	$(BIN)/python -m orchestrator.run $(SPACE) --outputs $(OUTPUTS) $(ARGS)

test: lint types layers pytest

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

layers: $(INSTALLED)
	$(BIN)/lint-imports

pytest: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# Every fault, some 20 minutes on 2 idle cores; what was killed, when, and what came of it is added to $(OUTPUTS)/faults.md.
test-faults: $(INSTALLED)
	mkdir -p $(OUTPUTS)
	FAULT_RECORDS=$(abspath $(OUTPUTS))/faults.md OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults tests/orchestrator/test_sweep.py -m "" $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.train_step --short $(ARGS)
	$(BIN)/python -m benchmarks.train_step --network light --short $(ARGS)
	$(BIN)/python -m benchmarks.scoring --short $(ARGS)
	$(BIN)/python -m benchmarks.input --short $(ARGS)
	$(BIN)/python -m benchmarks.ray_overhead --short $(ARGS)
	$(BIN)/python -m benchmarks.sweep_cost --short $(ARGS)
	$(BIN)/python -m benchmarks.quality --short $(ARGS)
	$(BIN)/python -m benchmarks.scaling_model

ui: $(INSTALLED)
	@echo "The table with the columns that matter: http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=cavs"
	$(BIN)/mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(abspath $(OUTPUTS))/mlflow.db

contact-sheet: $(INSTALLED)
	$(BIN)/python -m orchestrator.contact_sheet $(SPACE) --outputs $(OUTPUTS) $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
