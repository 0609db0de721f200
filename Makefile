# Everything runs in .venv, which the first target that needs it creates: Python 3.11+ and make are all it takes.
.PHONY: demo test lint bench clean
.DEFAULT_GOAL := test
# The two test workers and the processes that tests start share compiled modules.
unexport PYTHONDONTWRITEBYTECODE

PY := .venv/bin/python
STAMP := .venv/.complete

# pip before 25.1 knows no dependency groups, and a Python 3.11 brings an older one.
PIP := pip==26.3
# torch comes first, by its exact version and alone: left to the resolver it may drag in gigabytes of GPU libraries.
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

$(STAMP): pyproject.toml constraints.txt
	@python=; for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "no Python 3.11 or newer found on PATH" >&2; exit 1; fi; \
	if ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then $$python -m venv --clear .venv; fi
	$(PY) -m pip install --quiet --disable-pip-version-check '$(PIP)'
	$(PY) -m pip install --quiet -c constraints.txt '$(TORCH)'
	PIP_CONSTRAINT=constraints.txt $(PY) -m pip install --quiet -c constraints.txt -e '.[all]' --group dev
	@touch $@

demo: $(STAMP)
	$(PY) -m qwen35_moe demo

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m mypy

# worksteal: the workers take a half each, so that what the tests of a file share is made once.
# --complete: a run that left out, skipped or expected to fail any test is red.
test: lint
	$(PY) -m pytest --complete -n 2 --dist worksteal

# The others need a checkpoint, a GPU or gigabytes of disk; each says so in its first lines.
bench: $(STAMP)
	$(PY) -m benchmarks.mxfp4_decode

clean:
	find benchmarks docs notebooks qwen35_moe tests weights -name __pycache__ -exec rm -rf {} +
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
