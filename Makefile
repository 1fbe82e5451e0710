# Two commands for a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = OMP_WAIT_POLICY=passive $(BIN)/python

.PHONY: demo test test-quick test-versions coverage bench-check lint docs wheel cuda cuda-all cross sanitize reliability format stubs clean

$(VENV)/installed: pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '*.cmake' -o -name '*.py')
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt --config-settings=cmake.define.APR_EMULATION=ON ".[dev]"
	if command -v nvcc > /dev/null; then \
	  $(BIN)/pip install -q -c constraints.txt --no-deps nvidia-cutlass nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm; fi
	touch $@

demo: $(VENV)/installed
	cd $(VENV) && OMP_WAIT_POLICY=passive bin/python -m apr info
	cd $(VENV) && OMP_WAIT_POLICY=passive bin/python -m apr run

test: $(VENV)/installed
	$(RUN) -m pytest -n 2

# For work in progress: the core, the oracles on one model, the rules of the house.
test-quick: $(VENV)/installed
	$(RUN) -m pytest --quick

# Every architecture of transformers against its stock self; --update writes the baseline and docs/models.md.
PART = 1/1
coverage: $(VENV)/installed
	$(RUN) tools/coverage --part $(PART)

# Ratios of things timed in turn against bench/ratios.json; wants idle cores, not part of CI.
bench-check: $(VENV)/installed
	$(RUN) bench/check.py

# The border with transformers on the oldest and the newest that pip serves.
test-versions:
	tools/versions.sh

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	$(RUN) tools/stubs.py --check

# Compiles the main CUDA kernels, or all of them, and fails where registers spill or products are serialised; wants
# nvcc, no GPU.
cuda: $(VENV)/installed
	$(BIN)/python tools/cuda.py

cuda-all: $(VENV)/installed
	$(BIN)/python tools/cuda.py --all --record bench/results/cuda-build.md

# Compiles core and CPU kernels for ARM; the compiler is a package of its own.
cross:
	test -d $(VENV)-cross || $(PYTHON) -m venv $(VENV)-cross
	$(VENV)-cross/bin/pip install -q ziglang==0.17.1
	PYTHON=$(VENV)-cross/bin/python tools/cross.sh

# What docs/reliability.md promises, tried at length: a table, with zeros at its end.
reliability: $(VENV)/installed
	$(RUN) tools/reliability.py

# Memory and threads; CI has the first.
CHECKS = memory threads
sanitize: $(VENV)/installed
	PYTHON=$(abspath $(BIN)/python) tools/sanitize.sh $(CHECKS)

# The site of docs/, in site/; pictures of the idea are drawn anew by tools/picture.py.
docs:
	test -d $(VENV)-docs || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install -q mkdocs-material "mkdocstrings[python]" ruff
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build -q --strict

# A manylinux wheel and the sdist, in dist/.
wheel:
	PYTHON=$(PYTHON) tools/wheel.sh

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

stubs: $(VENV)/installed
	$(RUN) tools/stubs.py

clean:
	rm -rf $(VENV) $(VENV)-cross $(VENV)-docs build dist site
