# `make` lists the commands. Each of them first makes .venv and installs what constraints.txt pins.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# The oldest torch and Transformers that pyproject.toml allows, which `make test-full` puts before those of .venv,
# and the tests that they can change: those of files that import one of them, or the training that builds on both. Left
# out are signals, options, the Hub, reports, pages and tokenized files, which use them without depending on their version.
FLOOR := build/floor
FLOOR_EXCEPT = $(addprefix tests/test_,interruption.py command_line.py hub_%.py release.py release_evaluation.py minimal_pairs.py \
	tokens.py tokenizer_report.py)
FLOOR_TESTS = $(filter-out $(FLOOR_EXCEPT),$(shell grep -lE '^ *(from|import) (torch|transformers|accelerate|tiny_models|healthslm.training)' \
	tests/test_*.py))

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# The page in demo/ has its own copy of transformers.js, with the ONNX Runtime that this version was built with.
TRANSFORMERS_JS := @huggingface/transformers@4.3.1 onnxruntime-web@1.31.0-dev.20260914-8d85527a0
VENDOR := demo/vendor

.DEFAULT_GOAL := help
.PHONY: help demo notebook test test-floor test-full test-web fuzz soak lint format clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

demo: $(INSTALLED)  ## run every stage on the embedded sample, from PubMed XML to generated text: some minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh build/demo

notebook: $(INSTALLED)  ## run the notebook on the released model and store what it gives
	PYTHONWARNINGS=ignore HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/jupyter execute --inplace notebooks/healthslm.ipynb

test: $(INSTALLED)  ## the tests, at most ten minutes on two cores
	$(PYTEST) -m "not slow"

test-floor: $(INSTALLED) $(FLOOR)/installed  ## the tests of models and training, with the oldest torch and Transformers
	PYTHONPATH="$(CURDIR)/$(FLOOR)" $(PYTEST) -m "not slow" $(FLOOR_TESTS)

test-full: test test-floor  ## the tests, those with the oldest torch and Transformers, and the slow ones
	$(PYTEST) -m slow

test-web: $(INSTALLED) $(VENDOR)  ## the tests of the page in demo/, in headless Chromium, which is installed on Debian if missing
	command -v chromium > /dev/null || { apt-get update -qq && apt-get install -qq --no-install-recommends chromium; }
	$(BIN)/python -m pytest -x tests/web

fuzz: $(INSTALLED)  ## read 20,000 mutated PubMed files: none may crash, hang or lose a record in silence
	$(BIN)/python tests/fuzz_pubmed.py --files 20000

soak: $(INSTALLED)  ## kill a training run at 20 random moments and compare its weights
	$(BIN)/python tests/soak.py --kills 20

lint: $(INSTALLED)  ## check the code and its format with ruff, and its types with mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove all that make has made
	rm -rf .venv build $(VENDOR) .mypy_cache .pytest_cache .ruff_cache *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e ".[all]"
	touch $@

$(FLOOR)/installed: pyproject.toml constraints.txt | $(INSTALLED)
	rm -rf $(FLOOR)
	mkdir -p $(FLOOR)
	grep -vE "^(torch|setuptools|transformers|huggingface-hub)==" constraints.txt > $(FLOOR)/constraints.txt
	$(PIP) --target $(FLOOR) -c $(FLOOR)/constraints.txt "torch==2.11.*" "transformers==5.16.*"
	touch $@

$(VENDOR): demo/vendor.sha256
	command -v npm > /dev/null || { apt-get update -qq && apt-get install -qq --no-install-recommends npm; }
	rm -rf build/vendor $@
	mkdir -p build/vendor/files
	cd build/vendor && npm pack --silent --ignore-scripts $(TRANSFORMERS_JS)
	cd build/vendor && for archive in *.tgz; do tar xzf $$archive; done
	cd build/vendor/package && mv LICENSE $(addprefix dist/,transformers.min.js ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm) ../files
	cd build/vendor/files && sha256sum --check --quiet ../../../$<
	mv build/vendor/files $@
