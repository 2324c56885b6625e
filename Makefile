# Two commands matter: `make demo` and `make test`. Both make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= a red apple
export PYTHONSAFEPATH = 1

.PHONY: demo test lint type bench clean
.DEFAULT_GOAL := demo

.venv/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/sjd generate "$(PROMPT)" --method ar --output out/apple-ar.png
	$(BIN)/sjd generate "$(PROMPT)" --method maximal --output out/apple.png

test: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: .venv/.ready
	$(BIN)/mypy

bench: .venv/.ready
	$(BIN)/python bench/generate.py --quick
	$(BIN)/python bench/kernels.py

clean:
	rm -rf .venv build dist out *.egg-info
