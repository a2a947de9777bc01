# make env    .venv with everything; an interrupted one is repaired by the next call
#             (make env CPU=1: with torch's builds for machines without a GPU, some gigabytes smaller)
# make demo   a real server and five real stores on this machine, with photos drawn for the purpose
# make test   format, lint, types, layers, tests: what CI runs
# make test-low   the tests with the oldest versions of what FedShelf stands on
# make bench  FedShelf against the limit of this machine and its peers (hours; resumes): docs/how-to/benchmarks.md
# make edge-wheel   the distribution for tills, without PyTorch: dist/fedshelf_edge-*.whl
# make browser-runtime   ONNX Runtime for browsers, for `edge serve --in-browser` (needs npm)
# make docs   the documentation as a web site in site/

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.complete
PIP    := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BENCH  ?= pilot chain wire bytes

.PHONY: env demo test test-low bench docs edge-wheel browser-runtime clean

env: $(READY)

# The mark is written last and removed first: whatever broke in between is done again.
$(READY): pyproject.toml constraints.txt
	@rm -f $(READY)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "FedShelf needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(VENV)/bin/python && $(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(if $(CPU),$(PIP) uv && $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --torch-backend cpu -c constraints.txt torch torchvision)
	$(PIP) --editable '.[all]'
	@touch $(READY)

demo: $(READY)
	$(VENV)/bin/fedshelf demo

test: $(READY)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check

test-low:
	scripts/check-low

# A benchmark whose photos are missing (exit code 77) is left out. BENCH_FLAGS are those of pilot, chain and wire.
bench: $(READY)
	@for name in $(BENCH); do \
	  if [ $$name = bytes ]; then flags=; else flags="--peers $(BENCH_FLAGS)"; fi; \
	  $(VENV)/bin/python -m benchmarks $$name --write $$flags || [ $$? -eq 77 ] || exit 1; \
	done
	$(VENV)/bin/python -m benchmarks guard

docs: $(READY)
	$(VENV)/bin/mkdocs build --strict

browser-runtime:
	scripts/get-browser-runtime

# With the model in the browser, if `make browser-runtime` was run.
edge-wheel: $(READY)
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist packaging/edge

clean:
	rm -rf $(VENV) .venv-low site build demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
