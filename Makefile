# `make demo` and `make test` each do all the set-up they need; nothing has to be activated first.
PYTHON ?= python3
VENV ?= .venv
# What is already installed is kept unless another accelerator is asked for.
ACCELERATOR ?= $(or $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*))),cpu)
STAMP := $(VENV)/.installed-$(ACCELERATOR)
BIN := $(VENV)/bin
EXTRAS_cpu := test
EXTRAS_tpu := test,tpu
EXTRAS_cuda12 := test,cuda12
EXTRAS_cuda13 := test,cuda13
EXTRAS := $(EXTRAS_$(ACCELERATOR))
PYTEST := $(BIN)/python -m pytest
JOBS ?= 2

.PHONY: help setup demo test test-quick test-slow test-parity bench-decode bench-train tpu-compiler cuda-compiler plans device-check lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## create .venv and install; ACCELERATOR=cpu|tpu|cuda12|cuda13

$(STAMP): requirements.txt pyproject.toml
	@$(if $(EXTRAS),,echo "ACCELERATOR=$(ACCELERATOR) is not one of cpu, tpu, cuda12, cuda13" >&2; exit 2)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=...")'
	@echo "[setup] creating $(VENV) and installing rlvr_jax for $(ACCELERATOR) (a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -r requirements.txt -e ".[$(EXTRAS)]"
	@rm -f $(VENV)/.installed-* && touch $@
	@echo "[setup] done"

demo: setup  ## the whole job, small: base model, DAPO, dual-model decoding, table and figure
	$(BIN)/python -m demo

# The version that the installed jax names. A test and a benchmark compile for TPUs with it, on any machine.
TPU_COMPILER := $(VENV)/tpu-compiler
WANTED_LIBTPU = $(BIN)/python -c 'from importlib.metadata import requires; \
  print(next((r.split(";")[0].strip() for r in requires("jax") if r.startswith("libtpu")), "libtpu"))'

tpu-compiler: setup  ## the TPU compiler (0.2 GB to fetch, 0.7 GB on disk), where there is a wheel; needs no TPU
	@wanted="$$($(WANTED_LIBTPU))"; \
	test "$$(cat $(TPU_COMPILER)/.wanted 2>/dev/null)" = "$$wanted" && exit 0; \
	echo "[setup] fetching the TPU compiler $$wanted (0.2 GB) ..."; rm -rf $(TPU_COMPILER); \
	$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --retries 1 --target $(TPU_COMPILER) "$$wanted" \
	  2>/dev/null && echo "$$wanted" > $(TPU_COMPILER)/.wanted || \
	echo "[setup] $$wanted could not be fetched: the test of the TPU programs will be skipped"

cuda-compiler: $(VENV)/cuda-compiler/.installed  ## the compiler for NVIDIA GPUs in an environment of its own (4.5 GB); needs no GPU

$(VENV)/cuda-compiler/.installed: requirements.txt | setup
	@echo "[setup] fetching jax[cuda13] (4.5 GB) ..."
	@$(BIN)/python -m venv $(VENV)/cuda-compiler
	@$(VENV)/cuda-compiler/bin/python -m pip install --quiet -r requirements.txt \
	  "jax[cuda13]==$$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	@touch $@

plans: setup tpu-compiler  ## the recipes compiled for pods (and GPUs after `make cuda-compiler`): docs/plans; an hour
	$(BIN)/python -m benchmarks.plans $(ARGS)

test: setup tpu-compiler  ## the default checks (no torch needed)
	$(PYTEST) -n $(JOBS) -m "not slow and not parity" $(ARGS)

QUICK := $(patsubst %,tests/test_%.py,train_program decode_program sft_program models_hf)
test-quick: setup  ## a few minutes of them: train, resume, decode, Hugging Face folders
	$(PYTEST) -n $(JOBS) -m "not slow and not parity" $(QUICK) $(ARGS)

test-slow: setup  ## the long checks
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -n $(JOBS) -m "slow and not parity" $(ARGS)

test-parity: setup  ## installs torch, then compares live with transformers
	@echo "[setup] installing torch for the live comparison ..."
	@$(BIN)/python -m pip install --quiet -e ".[test,parity]"
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m parity $(ARGS)

bench-decode: setup  ## installs torch, then measures decoding beside its peers
	@echo "[setup] installing torch for the comparison ..."
	@$(BIN)/python -m pip install --quiet -e ".[test,parity]"
	$(BIN)/python -m benchmarks.decode $(ARGS)

bench-train: setup  ## installs torch, then measures a training update beside it
	@echo "[setup] installing torch for the comparison ..."
	@$(BIN)/python -m pip install --quiet -e ".[test,parity]"
	$(BIN)/python -m benchmarks.train $(ARGS)

# On a machine that has jax for its GPU already: make device-check BARE=1 (nothing is installed). Wheels in .whl are used.
SIZE ?= gpu
BUDGET ?= 450
OUT ?= runs/device_check
device-check: $(if $(BARE),,setup)  ## numbers and speed on one GPU, at most 8 minutes; SIZE=tiny: the same code on any machine
	@! ls .whl/*.whl >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .whl/site .whl/*.whl
	PYTHONPATH=.whl/site $(if $(BARE),$(PYTHON),$(BIN)/python) -m benchmarks.device_check --size $(SIZE) --budget $(BUDGET) --out $(OUT) $(ARGS)

lint: setup  ## ruff and pyright
	@$(BIN)/python -m pip install --quiet -e ".[test,lint]"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

clean:  ## remove the environment and everything the demo made
	rm -rf $(VENV) runs
