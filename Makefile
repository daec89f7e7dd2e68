# Every target makes its own .venv when it is missing; `make demo` and `make test` are all a fresh clone needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/glowplug demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The README's table. MODEL and FLAGS choose another: make bench MODEL=glm-4.7 FLAGS='--depth 92'
MODEL ?= gpt-oss-120b
FLAGS ?= --strategies eager,torch-full,torch-regional,torch-nested,baked,ordered,hoisted --experts opaque --json benchmarks/$(MODEL).json
bench: $(STAMP)
	$(BIN)/glowplug bench $(MODEL) $(FLAGS)

clean:
	rm -rf $(VENV) .bench
