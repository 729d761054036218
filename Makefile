# One environment for everything, in .venv; set up again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3.11
LOWEST_PYTHON ?= python3.12
VENV := .venv
CONSTRAINTS := constraints.txt
LOWEST := .venv-lowest
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINKS := build/types
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-models test unit lowest lint types links crash fuzz bench gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

setup: $(READY)  ## make the environment

demo: $(READY)  ## score the built-in ViT and CLIP on 500 handwritten digits
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		vitscore run demo -m demo-vit -m demo-clip -o demo-run --overwrite

demo-models: $(READY)  ## make the demo's shards and checkpoints again, from a seed
	$(BIN)/python -m vitscore.demo.make

test: lint types unit  ## everything that must pass: lint, types, all tests

# Files side by side: many tests wait for processes that they started.
unit: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lowest:  ## the demo and all tests with the oldest packages that pyproject.toml allows, in .venv-lowest
	$(MAKE) VENV=$(LOWEST) CONSTRAINTS=tests/constraints-lowest.txt PYTHON=$(LOWEST_PYTHON) demo unit

lint: $(READY)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

# A tree of links that looks like the installed package: mypy cannot see through the mapping of folders to packages, and
# an interpreter in which nothing is installed needs no more than to find it.
links:
	@rm -rf $(LINKS) && mkdir -p $(LINKS)/vitscore
	@for entry in vitscore/*; do ln -s "$(CURDIR)/$$entry" $(LINKS)/vitscore/; done
	@for package in kernels shards bench; do ln -s "$(CURDIR)/$$package" $(LINKS)/vitscore/; done

types: $(READY) links  ## mypy, strict
	cd $(LINKS) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p vitscore

fuzz: $(READY)  ## the long fuzz run: 10,000 damaged images, 2,000 damaged tars
	$(BIN)/python -m pytest -m fuzz tests/test_fuzz.py

crash: $(READY)  ## the long crash tests: every system call failing, kills, power loss, sixty random kills
	$(BIN)/python -m pytest -m crash tests/test_crash.py

bench: $(READY)  ## measure this machine, stage by stage and whole; JSON and a picture into $$OUT, else build/bench
	$(BIN)/vitscore bench

# GPU_PYTHON=python3 takes an interpreter that has the packages already, as machines without a network come with.
# PART=1, 2 or 3 runs one part, REHEARSE=1 tiny sizes without a GPU; see bench/GPU.md.
gpu: $(if $(GPU_PYTHON),,$(READY)) links  ## on an NVIDIA GPU, in three parts of 4 to 6 minutes: tests and benches; into $$OUT
	PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/$(LINKS)$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(or $(GPU_PYTHON),$(BIN)/python) -m vitscore.bench.gpu

clean:  ## remove everything that was built, the environment included
	rm -rf $(VENV) $(LOWEST) build demo-run .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
