# make demo    distil a student on real images, print a table, draw a picture
# make test    everything that CI checks but the linters;  make lint: the linters
# make test-fast    what an edit is likely to break, in about a minute
# make harden    20,000 random cases, 10,000 steps of every loss
# make docs    the documentation, into site/
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# tests with the same xdist_group share a worker, all others go to whichever is free
PARALLEL := $(PYTEST) -n 2 --dist loadgroup

.PHONY: demo test test-fast harden environments properties resources sanitizers mutants faults killed lint docs bench wheel clean

demo: .venv/installed
	$(BIN)/kdkernels demo --overwrite

# the Triton kernels run through Triton's interpreter, which has to be chosen before they are imported; the CUDA kernels
# on a CPU (tests/cuda_on_cpu), in place of the native ones, once as they are and once with every access checked.
# Interpreted, one of the two half precisions will do; opcheck and torch.compile see no difference between the last two
OPS := $(addprefix tests/ops/test_,softmax_kl.py divergences.py gram.py energy.py angular_margin.py correlation.py \
  guards.py) tests/test_golden.py

test: .venv/installed
	$(PARALLEL)
	TRITON_INTERPRET=1 $(PARALLEL) $(OPS) tests/ops/test_triton.py -k "not torch.float16"
	KDKERNELS_TEST_CUDA=plain $(PARALLEL) $(OPS) tests/test_losses.py
	KDKERNELS_TEST_CUDA=checked $(PARALLEL) $(OPS) -k "not compiled and not opcheck and not many_columns"

test-fast: .venv/installed
	$(PARALLEL) tests/ops $(addprefix tests/test_,golden.py losses.py errors.py edges.py map_losses.py) \
	  -k "not compil and not opcheck and not float16"

# the search for faults; what it found so far is in docs/hardening.md
harden: environments properties resources sanitizers mutants faults

# 20,000 random cases against the definitions
DEFINITIONS := $(wildcard tests/properties/test_*_properties.py)
properties: .venv/installed
	KDKERNELS_PROPERTIES=52 $(PARALLEL) tests/properties --hypothesis-seed=16
	KDKERNELS_TEST_CUDA=plain KDKERNELS_PROPERTIES=20 $(PARALLEL) $(DEFINITIONS) --hypothesis-seed=17
	TRITON_INTERPRET=1 KDKERNELS_PROPERTIES=12 $(PARALLEL) $(DEFINITIONS) --hypothesis-seed=18

# without Triton, without a compiler, and with another torch or Python: make environments ELSEWHERE=/path/to/its/python
EVERYWHERE := tests/ops $(wildcard tests/test_*loss*.py) $(addprefix tests/test_,golden.py edges.py modules.py mlkd.py)
environments: .venv/installed
	PYTHONPATH=tests $(PARALLEL) -p no_triton $(EVERYWHERE)
	KDKERNELS_JIT=0 $(PARALLEL) $(EVERYWHERE)
	$(if $(ELSEWHERE),PYTHONPATH=. $(ELSEWHERE) -m pytest $(EVERYWHERE) tests/test_recompilation.py)

# 10,000 steps of every loss, and the memory of one large one
resources: .venv/installed
	KDKERNELS_STEPS=10000 $(PARALLEL) tests/test_resources.py

# the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
sanitizers: .venv/installed
	$(BIN)/python tests/sanitizers

# small changes to ops, losses and csrc, which the tests must notice; another sample: MUTANTS="--count 50 --seed 1 gram"
mutants: .venv/installed
	PYTHONPATH=tests $(BIN)/python -m mutants $(MUTANTS)

# each seeded fault must be caught by the checks; some five minutes the first time
faults: .venv/installed
	PYTHONPATH=tests $(BIN)/python -m cuda_on_cpu.faults

# trainings killed at ten counted moments and ten random times for each of four methods; four minutes
killed: .venv/installed
	$(BIN)/python tests/training/killed.py $$(mktemp -d) 10

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/zensical build --strict --clean

# every case into benchmarks/results/; with pytest-benchmark instead: pytest benchmarks -k "kd and 256"
bench: .venv/installed
	$(BIN)/python -m benchmarks.report

# the sources, and one wheel with the native kernels inside, for every torch from 2.11 on and every Python from 3.10 on
wheel: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[release]'
	$(BIN)/python -m build -q --sdist --no-isolation
	KDKERNELS_BUILD_NATIVE=1 $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .
	$(BIN)/twine check --strict dist/*

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .cache build dist runs site *.egg-info
