# make help lists the targets. Everything runs inside .venv, which the first target that needs it makes.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SLOW ?= not slow
EXAMPLES ?= $(wildcard examples/*.py)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.torchrec: requirements-torchrec.txt requirements-torchrec-no-deps.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-torchrec.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-torchrec-no-deps.txt
	@touch $@

$(VENV)/.launchers: requirements-launchers.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-launchers.txt
	@touch $@

setup: $(VENV)/.dev  ## make .venv and install the pinned requirements

train: $(VENV)/.train  ## train: make train ARGS="embedding=hashed compression=0.1"
	$(BIN)/python train.py $(ARGS)

# the second pass leaves out what the choice of kernels cannot change: what is marked once, also by tests/conftest.py;
# bytecode is kept for it, as pytest takes seconds to rewrite all assertions; threads that wait leave the cores alone
PYTEST2 = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal
test: $(VENV)/.dev  ## the tests, less the slow ones, with the compiled kernels and then with the reference ones
	EMBEDDINGS_NATIVE=require $(PYTEST2) -m "$(SLOW)" tests
	EMBEDDINGS_NATIVE=off $(PYTEST2) -m "($(SLOW)) and not once" tests

test-slow: $(VENV)/.dev  ## the tests that take more than ten seconds each
	$(MAKE) test SLOW=slow

# a CUDA build of 4 GB from PyPI: beside the tests it shows that CUDA's kernels link and load with that torch
OTHER = .venv-torch-$(TORCH)
test-torch:  ## the tests with another torch: make test-torch TORCH=2.10.0
	test -n "$(TORCH)" || { echo "make test-torch: name a version, TORCH=2.10.0"; exit 1; }
	$(PYTHON) -m venv $(OTHER)
	sed -s '/^-r/d; s/^torch==.*/torch==$(TORCH)/; s/^setuptools==.*/setuptools>=77/' requirements.txt requirements-dev.txt > $(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OTHER)/requirements.txt
	$(MAKE) test VENV=$(OTHER) -o $(OTHER)/.dev
	EMBEDDINGS_NATIVE=require $(OTHER)/bin/python -m pytest -m slow -k "link_and_load" tests/embeddings/test_native.py

lint: $(VENV)/.dev  ## ruff and clang-format, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*.cu benchmarks/*.cpp tests/*.cpp

format: $(VENV)/.dev  ## rewrite the sources as lint wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/*.cu benchmarks/*.cpp tests/*.cpp

# setuptools packs what it finds in build/, so a source deleted since the last wheel would be in the next one
wheel: $(VENV)/.dev  ## build the wheel of embeddings/ into dist/
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

test-wheel: $(VENV)/.dev  ## install the wheel into an empty environment, build its kernels there and train with them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_packaging.py

torchrec: $(VENV)/.torchrec  ## add torchrec to .venv; VENV=.venv-torchrec leaves .venv as it is

# tests skip where torchrec cannot be imported; here that is an error
test-torchrec: $(VENV)/.torchrec  ## the tests that compare with torchrec
	$(BIN)/python -W ignore -c "import torchrec"
	EMBEDDINGS_NATIVE=require OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m torchrec tests

launchers: $(VENV)/.launchers  ## add hydra's joblib and submitit launchers and its optuna sweeper: docs/sweeps.md

# tests skip where a plugin is not installed; here that is an error
test-launchers: $(VENV)/.launchers  ## the tests that need them
	$(BIN)/python -W ignore -c "import hydra_plugins.hydra_joblib_launcher, hydra_plugins.hydra_submitit_launcher"
	$(BIN)/python -W ignore -c "import hydra_plugins.hydra_optuna_sweeper"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m launchers tests

examples: $(VENV)/.train  ## run every examples/*.py; those named *torchrec* need make torchrec
	@for example in $(EXAMPLES); do \
	  case $$example in *torchrec*) \
	    test -e $(VENV)/.torchrec || { echo "$$example: skipped, make torchrec installs what it needs"; continue; };; \
	  esac; \
	  echo "$$example"; PYTHONPATH=. OMP_WAIT_POLICY=passive $(BIN)/python $$example || exit 1; \
	done

cuda: $(VENV)/.train  ## compile every .cu for sm_80 and sm_90, warnings are errors; needs nvcc, no GPU
	$(BIN)/python -c "from embeddings.native import compile_cuda; raise SystemExit(compile_cuda())"

gpu:  ## on a machine with an NVIDIA GPU: build, CUDA tests, compute-sanitizer, benchmarks
	bash benchmarks/gpu.sh

# FBGEMM and torchrec take part where make torchrec VENV=.venv-torchrec has put them, facebookresearch/dlrm with
# FACEBOOK=FOLDER, a checkout of it. Recorded results are left alone: benchmarks/README.md has the commands for those
BENCH_PYTHON = $(firstword $(wildcard .venv-torchrec/bin/python) $(BIN)/python)
bench: $(VENV)/.dev  ## the short benchmarks of this machine, five minutes; JSON in build/bench
	for question in bandwidth lookup growth grids "step $(if $(FACEBOOK),--facebook $(FACEBOOK))"; do \
	  OUT=build/bench $(BENCH_PYTHON) -m benchmarks.$$question --quick || exit 1; \
	done
	$(BENCH_PYTHON) -m benchmarks.table build/bench

# an hour; results into benchmarks/reliability/results
SOAK = kills flips harm launches disks repeats stall "fuzz --seconds 1200"
soak: $(VENV)/.dev  ## kill, damage, fill up, repeat and fuzz at length: docs/reliability.md
	status=0; for script in $(SOAK); do $(BIN)/python -m benchmarks.reliability.$$script || status=1; done; exit $$status

.PHONY: help setup train test test-slow test-torch lint format wheel test-wheel torchrec test-torchrec launchers test-launchers examples cuda gpu bench soak
