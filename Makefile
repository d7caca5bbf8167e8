# Everything happens in .venv, with the versions of constraints.txt. `make help` lists what there is.

# The first Python that is new enough and can make an environment.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt

C_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help build demo test test-all bench lint format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

build: .venv/.built  ## environment in .venv, with the package compiled and installed in it (editable)

demo: build  ## pre-train a small BERT on the documentation of this machine's Python: runs/demo/
	$(BIN)/python -m stackbert_kernels.demo --out runs/demo

test: build  ## the whole test suite
	$(BIN)/python -m pytest -q

test-all: build  ## that, and every planted fault of the CUDA kernels
	$(BIN)/python -m pytest -q --all-mutants

bench: build  ## every op and the training step beside PyTorch and what else is installed, on this machine
	$(BIN)/python -m benchmarks --minutes 3
	$(BIN)/python -m benchmarks train_step

lint: .venv/.linters  ## formatting and lint, without changing anything
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)

format: .venv/.linters  ## format everything and fix what can be fixed
	$(BIN)/ruff format -q .
	$(BIN)/ruff check -q --fix .
	$(BIN)/clang-format -i $(C_SOURCES)

clean:  ## remove .venv and everything built; runs/ stays
	rm -rf .venv build dist *.egg-info stackbert_kernels/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

.venv/.linters: constraints.txt
	@test -n "$(PYTHON)" || { echo "make: wanted Python 3.11 or newer with its venv module, found none; name one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) ruff clang-format
	@touch $@

.venv/.built: .venv/.linters pyproject.toml setup.py CMakeLists.txt $(C_SOURCES)
	$(PIP) $$(sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',"')
	$(PIP) --no-build-isolation --editable '.[all]'
	@$(BIN)/python -c "from stackbert_kernels import _C; info = _C.build_info(); print('built by', info['compiler'], \
		'with CUDA ' + info['cuda'] + ' for ' + ' '.join(info['cuda_archs']) if info['cuda'] else 'without CUDA: ' + info['why_no_cuda'])"
	@touch $@
