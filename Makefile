# Everything a fresh machine needs: python3.11+ with venv, and this file.
#   make demo    a real cluster on a local Ray, answers, and what the hand-over cost
#   make test    what CI runs             make check   style, types, house rules
#   make test-long   everything, what make test samples too     make mutants   bugs that no test sees
#   make install   what a server needs     make dist   wheel and sdist     make docs   the site
# On a machine without a GPU, point pip at PyTorch's CPU index first (its installation page has the URL):
#   make demo TORCH_PIP_ARGS="--index-url URL"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch alone comes without a hash of ours, as its build is yours to choose; to pin your own:
#   make demo TORCH="--require-hashes --no-deps --requirement torch.txt"
TORCH ?= torch==2.13.0
PYTEST := $(BIN)/python -m pytest
PACKAGES := core process transport prefix_index engine kv_transfer kv_storage worker prefill_worker \
	decode_worker router cluster simulation client baton bench cli
PROTOS := $(wildcard protos/baton/v1/*.proto protos/baton/internal/v1/*.proto)

.PHONY: setup install dist docs demo test test-processes test-rest test-virtual test-fast test-long \
	mutants coverage check check-style check-types check-types-of-tests protos reference sbom format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --requirement constraints.txt --requirement constraints-dev.txt
	$(BIN)/pip install --quiet $(TORCH) $(TORCH_PIP_ARGS)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# A serving node: the same pins without the tools for development, and a copy of the code, not a link.
install:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --requirement constraints.txt
	$(BIN)/pip install --quiet $(TORCH) $(TORCH_PIP_ARGS)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation .

# The wheel is made from the sdist, so both are complete or neither is.
DIST ?= dist
dist: setup
	rm -rf $(DIST)
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('$(DIST)')"
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(DIST) $(DIST)/baton_serve-*.tar.gz

# The site, in site/; a warning is an error. Its tools have a folder of their own.
DOCS_VENV ?= .venv-docs
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/.ready: docs/requirements.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --require-hashes --requirement docs/requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m cli.demo

# Three runs at once: real processes, which wait more than they compute; the rest, which takes what
# they leave; and virtual time, which takes what is left then, as nothing in it waits for a clock.
# Each may fail; all are heard to the end. Of the slowest tests (`sampled`) each runs every other or
# third day.
test: setup
	$(MAKE) --jobs=3 --keep-going --output-sync=target test-processes test-rest test-virtual

test-processes: setup
	$(PYTEST) --sampled tests/faults; failed=$$?; $(PYTEST) --sampled tests/e2e && exit $$failed

test-rest: setup
	nice -n 5 $(PYTEST) --sampled tests/attacks tests/component tests/contract tests/planted tests/repository \
		tests/unit

test-virtual: setup
	nice -n 10 $(PYTEST) --sampled tests/simulation

# While one works: no cluster, no rank processes, a few seeds of the simulation. Each kind
# of fault alone takes four trials, and there are over forty.
FAST := tests/repository tests/contract tests/unit tests/simulation
SLOW := 500_seeds or shrunk
test-fast: setup
	$(PYTEST) $(FAST) -k "not ($(SLOW) or each_fault_alone or rank_process)"

# Everything that `make test` only samples: hours of kills, hangs, planted bugs, matrices and a
# soak; figures go to benchmarks/results/faults_*.json
test-long: setup
	LONG=1 $(PYTEST) -v tests/attacks tests/repository tests/contract tests/unit tests/simulation \
		tests/component tests/planted
	LONG=1 $(PYTEST) -v tests/faults
	LONG=1 $(PYTEST) -v tests/e2e
	$(BIN)/baton simulate faults --first-seed 1000 --seeds 20000 -o json \
		> benchmarks/results/simulate_faults.json

# Are the tests good? Small random bugs of the heart, and which nobody notices (about an hour).
MUTANTS ?= --save
mutants: setup
	PYTHONPATH=.:tests $(BIN)/python -m mutants $(MUTANTS)

# Of the whole product, its child processes too, by what `make test-fast` runs, rank processes and
# each fault alone; all tests reach more. Below `fail_under` of pyproject.toml it fails. Tracing costs
# about twice the time of the tests alone.
coverage: setup
	$(PYTEST) $(FAST) -k "not ($(SLOW))" --cov --cov-report=term:skip-covered

# May run side by side (`make --jobs=2 check`), as in CI: each has files and caches of its own.
check: check-style check-types check-types-of-tests

check-style: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

check-types: setup
	$(BIN)/mypy $(PACKAGES) $(wildcard examples/*.py)

check-types-of-tests: setup
	$(BIN)/mypy --config-file tests/mypy.ini tests benchmarks tools

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: setup
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

reference: setup
	$(BIN)/python -m cli.reference

# What a server installs, as CycloneDX JSON.
sbom: setup
	$(BIN)/python -m cli.sbom > sbom.cdx.json

clean:
	rm -rf $(VENV) $(DOCS_VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
