# One environment for everything, in .venv; set up again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINKS := build/types
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-models test unit lint types crash fuzz bench gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
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

lint: $(READY)  ## ruff
	$(BIN)/ruff check .

# mypy cannot see through the mapping of folders to packages, so it gets a tree of links that looks like the package.
types: $(READY)  ## mypy, strict
	rm -rf $(LINKS) && mkdir -p $(LINKS)/vitscore
	for entry in vitscore/*; do ln -s "$(CURDIR)/$$entry" $(LINKS)/vitscore/; done
	for package in kernels shards bench; do ln -s "$(CURDIR)/$$package" $(LINKS)/vitscore/; done
	cd $(LINKS) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p vitscore

fuzz: $(READY)  ## the long fuzz run: 10,000 damaged images, 2,000 damaged tars
	$(BIN)/python -m pytest -m fuzz tests/test_fuzz.py

crash: $(READY)  ## the long crash tests: every system call failing, kills, power loss, sixty random kills
	$(BIN)/python -m pytest -m crash tests/test_crash.py

bench: $(READY)  ## throughput; writes JSON and prints a table
	$(BIN)/python -m vitscore.bench

gpu: $(READY)  ## on a machine with an NVIDIA GPU: its tests, then the benches; JSON into $$OUT
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m vitscore.bench

clean:  ## remove everything that was built, the environment included
	rm -rf $(VENV) build demo-run .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
