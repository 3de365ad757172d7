# `make` lists the commands. Each of them first makes .venv and installs what constraints.txt pins.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# The oldest Transformers that pyproject.toml allows; it stands before the newer one of .venv in `make test-full`.
FLOOR := build/floor

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo notebook test test-full fuzz soak lint format clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

demo: $(INSTALLED)  ## the whole path on the embedded sample, from PubMed XML to generated text: some minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh build/demo

notebook: $(INSTALLED)  ## run the notebook on the released model and store what it gives
	PYTHONWARNINGS=ignore HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/jupyter execute --inplace notebooks/healthslm.ipynb

test: $(INSTALLED)  ## the tests, at most ten minutes on two cores
	$(PYTEST) -m "not slow"

test-full: $(INSTALLED) $(FLOOR)/installed  ## the tests with the oldest Transformers, then all tests: at most an hour
	PYTHONPATH="$(CURDIR)/$(FLOOR)" $(PYTEST) -m "not slow"
	$(PYTEST)

fuzz: $(INSTALLED)  ## read 20,000 mutated PubMed files: none may crash, hang or lose a record in silence
	$(BIN)/python tests/fuzz_pubmed.py --files 20000

soak: $(INSTALLED)  ## kill a training run at 20 random moments and compare its weights
	$(BIN)/python tests/soak.py --kills 20

lint: $(INSTALLED)  ## what ruff says of the code and its format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove all that make has made
	rm -rf .venv build .pytest_cache .ruff_cache *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e ".[all]"
	touch $@

$(FLOOR)/installed: pyproject.toml constraints.txt | $(INSTALLED)
	rm -rf $(FLOOR)
	mkdir -p $(FLOOR)
	grep -vE "^(transformers|huggingface-hub)==" constraints.txt > $(FLOOR)/constraints.txt
	$(PIP) --target $(FLOOR) -c $(FLOOR)/constraints.txt "transformers==5.16.*"
	touch $@
