# make demo | test | prove | gpu | fuzz | hunt | patterns | lint | wheel | clean. Needs python3 (3.10 or newer), make and a C++ compiler (Inductor uses it).
#
# PYTHON   the interpreter to build on. A torch that it already has and that this package supports is
#          used as it is, for example on a GPU machine; otherwise $(TORCH) is installed.
# TORCH    what pip installs then. On Linux pip's default torch brings CUDA's libraries along (several
#          GB); on a machine without a GPU name PyTorch's CPU index:
#          make test TORCH='torch==2.13.0 --index-url <the CPU index from pytorch.org>'
# VENV     the virtual environment, made when missing.
# FUZZ_SECONDS how long the native code runs on random problems under sanitizers.
# HUNT_ARGS    for example HUNT_ARGS='--samples 20000 --seed 0 --wild'.
# PATTERNS_ARGS for example PATTERNS_ARGS='--problems 1000 --seed 7'.
# PYTEST_ARGS  replaces "-n auto", for example PYTEST_ARGS='-k wan -x'.
#
# Without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder of wheels> make test

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?= -n auto
FUZZ_SECONDS ?= 20
HUNT_ARGS ?=
PATTERNS_ARGS ?=

# timm requires torchvision, which nothing here uses and which can replace the installed torch; the
# rest of what it needs comes with transformers. Hence --no-deps, and no extra in pyproject.toml.
TIMM := timm==1.0.31

# CuTe's headers, which tests compare the CUDA kernels' layouts with, and are skipped without. The
# package's Python half requires cuda-python, scipy and others, which nothing here uses.
CUTLASS := nvidia-cutlass==4.2.0.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
NATIVE := CMakeLists.txt $(shell find csrc -type f)
CXX_FOUND := $(shell command -v $(CXX) || command -v c++ || command -v g++ || command -v clang++)

.DELETE_ON_ERROR:
.PHONY: demo test prove gpu fuzz hunt patterns lint wheel clean compiler

demo: $(VENV)/.demo compiler
	$(BIN)/python examples/demo.py

# One thread a worker: pytest runs as many workers as there are cores.
test: $(VENV)/.test compiler
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# The CUDA kernels' PTX, executed on the CPU: many problems, and every mutant. Needs nvcc.
prove: $(VENV)/.test compiler
	GNA_PROVE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ptx $(PYTEST_ARGS)

# On a GPU machine: what the kernels compute, then how fast; the figures go to benchmarks/results.
gpu: $(VENV)/.test compiler
	$(BIN)/gna doctor
	$(BIN)/python -m pytest -n 4 tests/kernels tests/providers tests/backend/test_gpu_models.py
	$(BIN)/python -m benchmarks kernels

fuzz: $(VENV)/.dev compiler
	$(BIN)/python -m cmake -S . -B build/fuzz -DGNA_PYTHON=OFF -DGNA_FUZZ=ON -DGNA_SANITIZE=address,undefined
	$(BIN)/python -m cmake --build build/fuzz --parallel 2
	build/fuzz/csrc/cpu/gna_fuzz $(FUZZ_SECONDS)

# Random models of known token order, judged until interrupted.
hunt: $(VENV)/.test compiler
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/support/token_programs.py $(HUNT_ARGS)

# 100 000 random attention patterns on the portable provider, half an hour on one core; on the CPU
# kernel with PATTERNS_ARGS='--provider cpu'.
patterns: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/support/pattern_problems.py $(PATTERNS_ARGS)

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python .ci/lint_imports.py

# For this Python and any supported torch, into dist/: 0.6 MB. GNA_CUDA=1 puts the CUDA kernels inside,
# too: 1.4 MB (nvcc 13.0); building them needs nvcc and no GPU.
wheel: $(VENV)/.test compiler
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

compiler:
	@test -n "$(CXX_FOUND)" || { echo "No C++ compiler found. Install one (g++ or clang++), or set CXX." >&2; exit 1; }

# The stamps: nothing is installed again unless pyproject.toml or the native code changed.
$(VENV)/.demo: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.test: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps "$(TIMM)"
	$(PIP) --no-deps "$(CUTLASS)" || echo "Without $(CUTLASS): tests/kernels/test_cute.py will be skipped." >&2
	@touch $@

# mypy reads what the tests import, so it needs their packages too.
$(VENV)/.dev: pyproject.toml $(NATIVE) $(VENV)/.test
	$(PIP) --editable ".[test,dev]"
	@touch $@

# A torch in a virtual environment that PYTHON itself is in is out of --system-site-packages' sight:
# a .pth file shows it.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10; set PYTHON=<a newer python3>." >&2; exit 1; }
	@set -e; \
	site=$$($(PYTHON) .ci/supported_torch.py); \
	test -z "$$site" || echo "Using the torch in $$site"; \
	test -x $(BIN)/python || $(PYTHON) -m venv $${site:+--system-site-packages} $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv." >&2; \
	  exit 1; }; \
	if test -n "$$site"; then \
	  packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  echo "$$site" > "$$packages/system-torch.pth"; \
	else \
	  $(PIP) $(TORCH); \
	fi
	@touch $@
