# Every target makes .venv first when it is missing or older than what it was made from. PYTHON=python3.12 picks an interpreter.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Not benchmarks/results, which holds the runs that the READMEs quote, made with other options.
BENCH_OUT ?= out/bench
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := demo
.PHONY: install demo test test-long check format bench clean distclean

$(STAMP): setup.py pyproject.toml $(wildcard requirements/*)
	@PYTHON=$(PYTHON) requirements/install.sh $(VENV)
	@touch $@

install: $(STAMP)

demo: $(STAMP)  ## the main job: the same prompts by plain vLLM, its draft_model, and specbranch
	@$(BIN)/vllm-specbranch demo

test: $(STAMP)  ## every test not marked long; half an hour to three quarters on 2 cores; stops between tests after 52
	@$(PYTEST) --session-timeout=3120 $(PYTEST_ARGS)

test-long: $(STAMP)  ## the tests marked long; keeps what they printed
	@mkdir -p benchmarks/results
	@$(PYTEST) -m long -s $(PYTEST_ARGS) | tee benchmarks/results/test-long.txt

check: $(STAMP)  ## the fast one: format, lint, types, unit tests less the longest two
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) tests/unit -m "not long and not steps" $(PYTEST_ARGS)

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)  ## all benchmarks with their defaults, and the papers' pairs as far as measured; results in out/bench (BENCH_OUT); 77: cannot run here
	@mkdir -p $(BENCH_OUT)
	@for script in benchmarks/bench_*.py benchmarks/replay.py; do \
	    $(BIN)/python "$$script" --out "$(BENCH_OUT)/$$(basename "$${script%.py}").json" || [ $$? -eq 77 ]; \
	done
	@results=$$(ls $(BENCH_OUT)/{bench_decode,shipped,weak}.json 2>/dev/null || true); \
	    $(BIN)/python benchmarks/papers.py $$results --out $(BENCH_OUT)/papers.json || [ $$? -eq 1 ]

clean:  ## what tools leave behind; keeps .venv
	@rm -rf build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and .venv
	@rm -rf $(VENV)
