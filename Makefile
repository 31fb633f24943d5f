# `make study` and `make test` need python3 >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install install-plan install-locked lock study test test-slow lint clean

help:
	@echo "make study      run the tiny study (base, reasoning, safety arms) and write its report"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make lint       check style and types"
	@echo "make install    build the environment in .venv, the tests' tools included"
	@echo "make install-plan      what jaxtax plan compiles with, in .venv-plan (350 MB to download)"
	@echo "make lock       write requirements/ anew from pyproject.toml"
	@echo "make install-locked    .venv without the tests' tools, every file checked against requirements/; EXTRA=cuda for GPUs"
	@echo "make clean      remove .venv and caches; results in runs/ stay"

# The core alone runs a study; the test extra is large (torch), so it waits until a test asks for it.
.venv/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxtax needs Python 3.11 or later; found $$($(PYTHON) --version 2>&1)." \
	         "Say which one to use: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || sh launch/install_venv.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.test: .venv/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

install: .venv/.test

# Compilers for GPUs and TPUs, for hosts that have neither. Apart from .venv, where JAX would look for a GPU at
# every start; without NVIDIA's libraries, which take gigabytes and are not needed to compile.
install-plan: .venv/.core
	rm -rf .venv-plan
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-plan \
	  $$($(BIN)/python -m jaxtax.plan.packages)

# The exact versions and files of requirements/, and nothing else; the index is not trusted with either.
# EXTRA=cuda brings JAX for NVIDIA's GPUs.
install-locked:
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || sh launch/install_venv.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
	  -r requirements/py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])')$(if $(EXTRA),-$(EXTRA)).txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .

# What pyproject.toml resolves to today, with the hash of every file; setuptools builds jaxtax itself.
lock: .venv/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	for minor in 11 12; do \
	  for extra in '' cuda; do \
	    echo 'setuptools>=77' | $(BIN)/uv pip compile pyproject.toml - --quiet --python-version 3.$$minor \
	      --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url --no-annotate --upgrade \
	      $${extra:+--extra $$extra --constraint requirements/py3$$minor.txt} --custom-compile-command 'make lock' \
	      --output-file requirements/py3$$minor$${extra:+-$$extra}.txt || exit 1; \
	  done; \
	done

study: .venv/.core
	$(BIN)/jaxtax study configs/tiny/study.yaml

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=12

test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-plan .pytest_cache .ruff_cache build dist jaxtax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
