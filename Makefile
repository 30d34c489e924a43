# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# Both build the virtual environment .venv first; nothing outside this directory is changed,
# except that `make test` installs Debian packages when it runs as root.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# workers of `make test`: two more than processors, for about half of what tests do is waiting
JOBS   ?= $(shell n=$$(nproc); echo $$((n < 6 ? n + 2 : 8)))

PREFIX ?= /usr
# for packages: make install DESTDIR=/tmp/root PIP_FLAGS='--no-deps --no-build-isolation'
DESTDIR   ?=
PIP_FLAGS ?=

.PHONY: demo test check bench soak fuzz attributes install uninstall clean

demo: $(VENV)/.demo
	$(BIN)/python doc/demo/demo.py

test: $(VENV)/.test
	test/debian-packages
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder test

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/lint-imports

bench: $(VENV)/.test
	test/debian-packages
	$(BIN)/python -m bench

soak: $(VENV)/.test
	test/debian-packages
	$(BIN)/python -m pytest -m soak --timeout 3600 test

fuzz: $(VENV)/.test
	$(BIN)/python -m test.fuzz.run --inputs 1000000

attributes: $(VENV)/.test
	$(BIN)/python -m doc.attributes
	$(BIN)/python -m doc.reference

install uninstall: | $(BIN)/python
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PIP_FLAGS='$(PIP_FLAGS)' PYTHON='$(BIN)/python' ./install.sh $@

clean:
	rm -rf $(VENV) build *.egg-info

# One stamp per set of packages: a changed pyproject.toml installs again.
$(VENV)/.demo $(VENV)/.test $(VENV)/.check: $(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { test/debian-packages python3-venv && $(PYTHON) -m venv $(VENV); }
