# `make demo` and `make test` set up everything they need in .venv; nothing else has to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# The small model of `make demo` and `make explore`.
MODEL ?= llava
# Tests run in one process per core; threads of their own would only get in each other's way.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

# Where an environment keeps its packages.
PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: help demo explore test test-slow test-oldest check format pictures clean

help:
	@echo "make demo         concepts of a shipped small model, in one to two minutes (MODEL=llava, idefics2, qwen2_vl, molmo)"
	@echo "make explore      the web page: ask a shipped small model, look inside, intervene (MODEL=...)"
	@echo "make test         lint, types and the test suite"
	@echo "make test-slow    the rest of the suite: wheel in an empty environment, training, big sweeps"
	@echo "make test-oldest  the core of the suite with the oldest transformers that is supported"
	@echo "make format       rewrite the code in the house's format"
	@echo "make pictures     the README's pictures (needs /usr/bin/chromium)"

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-tests: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[tests]"
	# What tests compare with, without its dependencies: those of overcomplete, a rival, are vision models and their CUDA
	# libraries; those of pycocoevalcap, whose CIDEr and BLEU are the reference for ours, serve scorers in Java.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps overcomplete pycocoevalcap
	@touch $@

demo: $(VENV)/.installed
	env -u OMP_NUM_THREADS $(BIN)/hooked-mm demo --model $(MODEL) --output runs/demo

$(VENV)/.installed-app: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[app]"
	@touch $@

explore: $(VENV)/.installed-app
	env -u OMP_NUM_THREADS $(BIN)/hooked-mm explore --small $(MODEL)

check: $(VENV)/.installed-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

test-slow: $(VENV)/.installed-tests
	$(BIN)/pytest -n auto --dist worksteal -m slow

# All else is that of the first environment, whose folder comes behind its own.
$(OLDEST)/.installed: $(VENV)/.installed-tests constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --requirement constraints-oldest.txt
	$(BIN)/python $(PACKAGES) > "$$($(OLDEST)/bin/python $(PACKAGES))/others.pth"
	@touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal -m "oldest and not slow"

format: $(VENV)/.installed-tests
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pictures: $(VENV)/.installed-tests
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[pictures,app]"
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python docs/learning_curves.py
	$(BIN)/python docs/explorer_picture.py

clean:
	rm -rf $(VENV) $(OLDEST) runs build dist *.egg-info
