# make demo, make test: each does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions are those of constraints.txt, or with TORCH=2.11.0 that torch and what it requires.
CONSTRAINTS := $(if $(TORCH),build/torch-$(TORCH).txt,constraints.txt)
# What an editable install depends on; Python files are used where they lie.
BUILD_FILES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f -not -name '*.pyc')
# Models of others that are compared with, installed without their dependencies.
BARE := tests/model/torchscale.txt tests/integrations/third_party.txt
# File by file, in the order of the files: the few long ones do not end up as the last.
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder
# Kernels that are compiled and kernels that are interpreted do not go together in one process.
PTX := TRITON_INTERPRET=0 $(BIN)/python -m pytest -n auto --dist worksteal tests/ptx

# Releases of Triton that kernels are compiled with, too; their versions: tests/kernels/triton_releases.
TAG := $(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -c \
	'import sys; print(sys.implementation.cache_tag)')
TRITONS := $(patsubst %,build/triton/$(TAG)/%/.unpacked,oldest newest)

# Results of make bench: JSON files of pytest-benchmark, with a page and pictures of each.
BENCH ?= .benchmarks

.PHONY: install demo test-fast test test-ptx test-all bench docs tritons lint clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed-test tritons

demo: $(VENV)/.installed-demo
	$(BIN)/python -m vlmo demo

# The inner loop, a minute or so: what needs no other process, no compiler, no training, and no
# kernel in an interpreter or an emulator.
test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m 'not heavy and not slow' -q $(PYTEST_ARGS)

# Before a commit, ten minutes or less: all but what takes long and says little more.
test: lint tritons
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

# After changing Triton kernels, five minutes: their PTX in an emulator, in one dtype and on one GPU
# generation for each case.
test-ptx: $(VENV)/.installed-test
	$(PTX) -m 'not slow'

# After changing kernels, their tile tables or the packaging.
test-all: lint tritons
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	$(PTX)

# BENCH_ARGS are options of pytest: -k to select, --minutes, --scale smoke.
bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q benchmarks --benchmark-enable --benchmark-autosave \
		--benchmark-storage=$(BENCH) $(BENCH_ARGS); \
	status=$$?; $(BIN)/python benchmarks/report.py $(BENCH) && exit $$status

tritons: $(TRITONS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p vlmo
	$(BIN)/mypy tests csrc
	$(BIN)/mypy benchmarks

# The site in build/site; a warning is an error.
docs: $(VENV)/.installed-test
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BUILD_FILES) $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[demo]'
	touch $@

$(VENV)/.installed-test: $(BUILD_FILES) $(CONSTRAINTS) $(BARE) | $(BIN)/python
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[demo,test,docs]'
	$(BIN)/python -m pip install -q --no-deps $(BARE:%=-r %)
	touch $(VENV)/.installed-demo $@

build/torch-%.txt: constraints.txt
	mkdir -p build
	sed -E '/^(torch|triton|setuptools|nvidia-cuda-.*)==/d' $< > $@
	echo torch==$* >> $@

# Unpacked, not installed: the environment keeps its own.
build/triton/$(TAG)/%/.unpacked: tests/kernels/triton_releases/%.txt | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --only-binary=:all: --target $(@D) -r $<
	touch $@
