# `make demo` and `make test` need only Python 3.10 or newer with venv.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Pinned; by uv where it is there, which takes a fraction of pip's time and looks for wheels where pip does.
UV := $(shell command -v uv)
INSTALL := PIP_CONSTRAINT=constraints.txt $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet
DEMO_INSTALL := $(if $(UV),$(if $(PIP_FIND_LINKS),UV_FIND_LINKS='$(PIP_FIND_LINKS)') $(UV) pip install --quiet --python $(VENV)/bin/python --constraint constraints.txt,$(INSTALL))
# Processes of one thread, each with a file at a time; three, for they wait for files and for what they start. Without
# byte code each of the hundreds of commands that they start would compile the library anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: setup test lint docs dist torture demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[test,lint]'
	touch $@

test: setup
	$(PYTEST)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The documentation site, in build/site; warnings are errors. Needs Python 3.11 or newer.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(INSTALL) --editable '.[docs]'
	touch $@

# The wheel and the source archive in dist/, with what the package index would complain of.
dist: $(VENV)/.dist
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*

$(VENV)/.dist: $(STAMP)
	$(INSTALL) --editable '.[dist]'
	touch $@

# Every attack at its full count, and all tests, also those that take minutes or repeat: about an hour on two cores.
torture: setup
	$(VENV)/bin/python -m attacks
	$(PYTEST) -m '' --hypothesis-profile torture

# What the tests need has all that the demo needs, which by itself is about half of it.
demo: $(if $(wildcard $(STAMP)),$(STAMP),$(VENV)/.demo)
	$(VENV)/bin/acemerge demo

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(DEMO_INSTALL) --editable '.[demo]'
	touch $@

clean:
	rm -rf $(VENV) acemerge-demo build/site dist
