# Each command is enough on a fresh machine with Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test docs bench distortion ablation clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/installed-examples ## train a tokenizer on real photographs and show its pictures
	$(BIN)/python examples/demo.py

test: .venv/installed-dev ## lint, check types, run every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --jaxtyping-packages=xq,beartype.beartype -m "not compile"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m compile

docs: .venv/installed-docs ## build the documentation into site/, any warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/installed-bench ## time xq beside other libraries, half an hour
	$(BIN)/python -m benchmarks.lookup
	$(BIN)/python -m benchmarks.entropy
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.trees
	$(BIN)/python -m benchmarks.losses
	$(BIN)/python -m benchmarks.tokenizers
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.imports
	$(BIN)/python -m benchmarks.report

distortion: .venv/installed-bench ## train codebooks beside other libraries' and compare errors, 15 minutes
	$(BIN)/python -m benchmarks.distortion
	$(BIN)/python -m benchmarks.report

ablation: .venv/installed-bench ## the paper's comparisons on photographs, an hour or two on one core
	$(BIN)/python -m benchmarks.ablation
	$(BIN)/python -m benchmarks.report

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip arrives last in a new environment, so one cut short is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("xq needs Python 3.11 or newer, not %d.%d: name one, as in make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

# The stamp spares an install where pyproject.toml has not changed since the last.
.venv/installed-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -q -e ".[$*]"
	@touch $@
