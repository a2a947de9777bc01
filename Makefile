# make env    .venv with everything; an interrupted one is repaired by the next call
# make demo   a real server and five real stores on this machine, with photos drawn for the purpose
# make test   format, lint, types, layers, tests: what CI runs
# make bench  FedShelf against the limit of this machine and its peers (hours; resumes): docs/how-to/benchmarks.md
# make docs   the documentation as a web site in site/

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.complete
BENCH  ?= pilot chain wire bytes

.PHONY: env demo test bench docs clean

env: $(READY)

# The mark is written last and removed first: whatever broke in between is done again.
$(READY): pyproject.toml
	@rm -f $(READY)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "FedShelf needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(VENV)/bin/python && $(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	@touch $(READY)

demo: $(READY)
	$(VENV)/bin/fedshelf demo

test: $(READY)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check

# A benchmark whose photos are missing (exit code 77) is left out. BENCH_FLAGS are those of pilot, chain and wire.
bench: $(READY)
	@for name in $(BENCH); do \
	  if [ $$name = bytes ]; then flags=; else flags="--peers $(BENCH_FLAGS)"; fi; \
	  $(VENV)/bin/python -m benchmarks $$name --write $$flags || [ $$? -eq 77 ] || exit 1; \
	done
	$(VENV)/bin/python -m benchmarks guard

docs: $(READY)
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) site build demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
