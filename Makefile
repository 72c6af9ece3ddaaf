# Everything from a fresh clone. PYTHON=python3.12 chooses the other lane, with an environment of its own.

ifeq ($(MAKECMDGOALS),test-latest)
PYTHON ?= python3.12
endif
PYTHON ?= python3
# A pyenv shim is found for every version but runs the chosen one only, so the command has to prove itself.
PYENV := $(lastword $(wildcard $(HOME)/.pyenv/versions/$(patsubst python%,%,$(PYTHON))*/bin/python))
INTERPRETER := $(shell for p in $(PYTHON) $(PYENV); do "$$p" -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
VERSION := $(shell "$(INTERPRETER)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
export PYTHON_BIN := $(CURDIR)/$(BIN)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
CSRC := $(shell find csrc -type f 2>/dev/null)
FORMATTED := $(filter %.cpp %.h %.cu %.cuh,$(CSRC)) benchmarks/keep_pages.c $(wildcard tests/emulated/*.cu)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
define REQUIREMENTS
import tomllib
p = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")
endef
export REQUIREMENTS
# A worker takes a file at a time, whose tests share what they made, and has its part of the cores.
# In the order of collection: by their number of tests the longest files, of few tests, would come last.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-full test-latest test-cuda-build test-gpu checks bench format build system cluster clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

quickstart: build ## train a small vision-language MoE from scratch, evaluate, export and report (about 12 minutes)
	launch/quickstart.sh

test: build cluster ## checks, the short quickstart and every test that this machine can run
	@mkdir -p build; status=0; \
	$(MAKE) --no-print-directory checks >build/checks.log 2>&1 & checks=$$!; \
	launch/quickstart.sh --short || status=1; \
	wait $$checks || status=1; cat build/checks.log; \
	$(PYTEST) --durations=25 || status=1; \
	exit $$status

test-full: build cluster ## every test, the long matrices among them
	$(PYTEST) -m "slow or not slow"

# A run of its own: the other lane's would count as up to date.
test-latest: build ## the short quickstart and the tests of the newest Megatron-Core's lane (Python 3.12)
	@status=0; \
	MMOE_RUN=runs/quickstart-short-$(VERSION) launch/quickstart.sh --short || status=1; \
	$(PYTEST) -m "latest and not slow" || status=1; \
	exit $$status

# compute-sanitizer: without PyTorch's caching allocator, so that an access behind a tensor is one behind an allocation;
# CUDA graphs need it. The benchmark: bandwidths beside those of a copy and a triad, measured in the same run.
test-gpu: build ## the tests that need a CUDA device, the operators under compute-sanitizer, and their bandwidth
	$(BIN)/python -m pytest tests/gpu
	@if command -v compute-sanitizer >/dev/null; then \
	  for tool in memcheck racecheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	      $(BIN)/python -m pytest -m gpu -k "not captured" tests/gpu/test_operators.py || exit 1; \
	  done; \
	else echo "compute-sanitizer was not found: install the CUDA toolkit to run the operators under it"; fi
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/mmoe bench ops --device cuda --skip eager compile transformers megatron --json build/bench-gpu.json; \
	else echo "there is no CUDA device: bandwidths are not measured"; fi

# Two environments must not share mmoe/_C.so, so this one's package is made in build/cuda and found there, never in the
# current directory. opcheck of torch 2.14 looks at the .grad of copies of its own, which torch warns of.
CUDA_BIN := .venv-cuda/bin
CUDA_ENV := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/cuda/lib
test-cuda-build: system ## the extension compiled and loaded against a CUDA build of torch (.venv-cuda, 6 GB; no GPU needed)
	@test -x $(CUDA_BIN)/python || $(INTERPRETER) -m venv .venv-cuda
	$(CUDA_BIN)/python -m pip install --quiet torch==2.14.1 $(foreach p,hypothesis ninja pybind11 pytest setuptools transformers,$(shell grep ^$(p)== constraints.txt))
	MMOE_BUILD_CUDA=1 $(CUDA_BIN)/python setup.py --quiet build --build-base build/cuda --build-lib build/cuda/lib
	$(CUDA_ENV) $(CUDA_BIN)/python tests/csrc/cuda_build.py
	$(CUDA_ENV) $(CUDA_BIN)/python -m pytest -o pythonpath=tests -W "ignore:The .grad attribute of a Tensor that is not a leaf" tests/ops

checks: build ## lint, formats and types
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/pyright --pythonpath $(BIN)/python || status=1; \
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED) || status=1; \
	$(BIN)/shellcheck --external-sources launch/*.sh launch/slurm/*.sbatch || status=1; \
	exit $$status

bench: build ## all benchmarks (two hours on two quiet cores; the ablations want the quickstart's data); rows also go to build/bench-*.json
	$(BIN)/mmoe bench ops --json build/bench-ops.json
	$(BIN)/mmoe bench ops --emulated --json build/bench-emulated.json
	$(BIN)/mmoe bench step --json build/bench-step.json
	$(BIN)/mmoe bench step --sweep
	$(BIN)/mmoe bench step --profile
	$(BIN)/mmoe bench checkpoint --json build/bench-checkpoint.json
	$(BIN)/mmoe bench convert --json build/bench-convert.json
	$(BIN)/mmoe bench data --json build/bench-data.json
	$(BIN)/mmoe bench ablations

format: build ## write what `make checks` asks of formats
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

build: $(BUILT) ## the environment and the compiled parts

# The build needs what is installed (torch's headers, ninja, pybind11), hence no isolation.
$(BUILT): $(INSTALLED) setup.py pyproject.toml $(CSRC)
	@echo "building mmoe"
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# MPICH lies in a folder of its own: its mpirun has the name of Open MPI's, which lies beside the interpreter.
$(INSTALLED): pyproject.toml constraints.txt | system
	@echo "installing the environment $(VENV)"
	@test -x $(BIN)/python || $(INTERPRETER) -m venv $(VENV)
	@$(BIN)/python -c "$$REQUIREMENTS" >$(VENV)/requirements.txt
	@$(PIP_INSTALL) --requirement $(VENV)/requirements.txt
	@$(PIP_INSTALL) --no-deps --prefix $(VENV)/mpich mpich
	@touch $@

# What pip cannot bring. Said in one line where it cannot be installed from here.
system:
	@test -n "$(INTERPRETER)" || { echo "$(PYTHON) does not run: install Python 3.11 or 3.12, or name one: make PYTHON=python3.12" >&2; exit 2; }
	@test -n "$(filter 3.11 3.12,$(VERSION))" || { echo "$(PYTHON) is Python $(VERSION), but Python 3.11 or 3.12 is needed: name one: make PYTHON=python3.12" >&2; exit 2; }
	@need=""; \
	command -v g++ >/dev/null || need="$$need g++"; \
	$(INTERPRETER) -c 'import ensurepip' 2>/dev/null || need="$$need python3-venv"; \
	$(INTERPRETER) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || need="$$need python3-dev"; \
	command -v nvcc >/dev/null && ! test -e /usr/include/boost/context/fiber.hpp && need="$$need libboost-context-dev"; \
	if [ -n "$$need" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing$$need"; \
	    apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y $$need >/dev/null; \
	  else echo "missing system packages: apt-get install$$need (as root), then run make again" >&2; exit 2; fi; \
	fi

# Slurm and network namespaces for the launchers' tests, which are skipped without them. RUNLEVEL=1: no service is started.
cluster:
	@need=""; \
	PATH=$$PATH:/usr/sbin command -v slurmctld >/dev/null || need="$$need slurm-wlm munge"; \
	PATH=$$PATH:/usr/sbin command -v ip >/dev/null || need="$$need iproute2"; \
	if [ -n "$$need" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing$$need"; \
	    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$need; } \
	      >/dev/null \
	      || echo "apt-get install$$need failed: some tests of the launchers are skipped"; \
	  else echo "without apt-get install$$need (as root) some tests of the launchers are skipped"; fi; \
	fi

clean: ## remove the environments and what was built; runs and prepared data stay
	rm -rf .venv .venv-* build dist *.egg-info mmoe/*.so .pytest_cache .ruff_cache
	find mmoe tests -name __pycache__ -type d -prune -exec rm -rf {} +
