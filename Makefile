# The one door, for people and for CI. `make` alone lists the targets. Needs Python 3.11 and PyPI, nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH211 := .venv-torch211
BARE := .venv-bare
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
A ?= main
B ?= .
COMPARE_FLAGS ?=
TEST_FLAGS ?=
CLUSTER ?= two_nodes
BENCH_OUT ?= build/bench

# Some containers say so for small images; here hundreds of short processes would each compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-slurm test-torch211 lint format golden docs compare bench peers gpu-bundle has-python312 gpu-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "  Python other than python3.11: make PYTHON=/path/to/python3.11 quickstart"

install: $(READY)  ## create .venv with the tested versions (the other targets do this by themselves)

# Written last: an install that is killed is done again, one that ended is not, until what it depends on changes.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON): install Python 3.11, or say make PYTHON=…" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

quickstart: $(READY)  ## both stages of LiVT on the real images that ship here, then a table
	$(BIN)/livt quickstart

# Three processes for two cores: many tests wait for timeouts and ends of processes.
test: $(READY)  ## the tests, without the slow ones
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not slurm" $(TEST_FLAGS)

test-slow: $(READY)  ## the slow tests: whole runs, killed and continued; and other examples of each property
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not slurm" $(TEST_FLAGS)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "hypothesis and not slow and not slurm" --hypothesis-profile=random $(TEST_FLAGS)

test-slurm: $(READY)  ## the tests on real Slurm clusters, started for them; as root
	LIVT_TEST_CLUSTER=$(CLUSTER) $(BIN)/python -m pytest -m "slurm and not slow" -rs tests/slurm_real $(TEST_FLAGS)

# Over .venv, from which all else comes, CUDA's libraries too.
$(TORCH211)/.ready: $(READY)
	$(BIN)/python -m venv --clear $(TORCH211)
	$(TORCH211)/bin/python scripts/overlay.py $(VENV)
	$(TORCH211)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torch==2.11.0 torchvision==0.26.0 triton==3.6.0
	@touch $@

test-torch211: $(TORCH211)/.ready  ## tests of ranks, checkpoints and training with the oldest torch
	$(TORCH211)/bin/python -m pytest -m "not slow and not slurm" tests/distributed tests/checkpoint tests/train $(TEST_FLAGS)

lint: $(READY)  ## ruff, mypy, the contracts on imports, and words of plain English
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_imports.py
	$(BIN)/python scripts/check_language.py --most 1

format: $(READY)  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(READY)  ## rewrite the golden files; then read the diff
	$(BIN)/python -m pytest --rewrite-golden $(TEST_FLAGS)
	git diff --stat

docs: $(READY)  ## the documentation site, in build/docs/index.html
	$(BIN)/python -m sphinx --fail-on-warning --quiet -b html docs build/docs
	@echo "build/docs/index.html"

compare: $(READY)  ## train two revisions, A=main and B=., and compare their losses bit for bit
	$(BIN)/python scripts/compare.py $(A) $(B) $(COMPARE_FLAGS)

bench: $(READY)  ## run every benchmark; tables here, JSON in build/bench
	@mkdir -p $(BENCH_OUT)
	@for script in benchmarks/*.py; do \
		name=$$(basename $$script .py); \
		if grep -q '"--json"' $$script; then \
			$(BIN)/python $$script --json $(BENCH_OUT)/$$name.json $(BENCH_FLAGS) || exit 1; \
		fi; \
	done

peers: $(READY)  ## .venv-peers: .venv and, over it, the loaders that the benchmarks compare ours with
	$(BIN)/python -m venv --clear .venv-peers
	.venv-peers/bin/python scripts/overlay.py $(VENV)
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt

gpu-bundle: $(READY)  ## .whl: what benchmarks/gpu.sh needs on a GPU machine without a network (docs/gpu.md)
	$(BIN)/python scripts/gpu_bundle.py .whl

# Like such a machine: Python 3.12 and torch 2.11, without what the bundle has. CUDA's libraries, which torch only loads here,
# are those of .venv.
$(BARE)/.ready: $(READY) benchmarks/bare.txt
	$(PYTHON312) -m venv --clear $(BARE)
	$(BARE)/bin/python -m pip install --quiet --no-deps torch==2.11.0 torchvision==0.26.0
	$(BARE)/bin/python -m pip install --quiet -c constraints.txt -r benchmarks/bare.txt 2>$(BARE)/log || { cat $(BARE)/log >&2; exit 1; }
	$(BARE)/bin/python -m pip install --quiet -c constraints.txt --no-deps timm accelerate
	$(BARE)/bin/python -m pip uninstall --quiet --yes pydantic pydantic_core annotated-types typing-inspection
	ln -sfn $$($(BIN)/python -c "import nvidia; print(*nvidia.__path__)") $(BARE)/lib/python3.12/site-packages/nvidia
	@touch $@

has-python312:  ## exit code 0 if there is a Python 3.12, as gpu-check needs
	@$(PYTHON312) -c pass 2>/dev/null

gpu-check: gpu-bundle $(BARE)/.ready  ## benchmarks/gpu.sh in miniature on a CPU, with Python 3.12, torch 2.11 and .whl alone
	QUICK=1 PYTHON=$(BARE)/bin/python benchmarks/gpu.sh build/gpu-check

clean:  ## remove .venv, build and caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
