# Everything a change must pass, and what is too long for every change. `make check` needs `pip install -e '.[test,docs,dev]'`.
PYTHON ?= python

.PHONY: check lint types imports test docs cog bench-smoke bench slow fuzz format

check: lint types imports test docs bench-smoke

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

imports:
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

test:
	$(PYTHON) -m pytest -q --cov --cov-report=term --cov-fail-under=90

docs:
	$(PYTHON) -m cogapp --check docs/cli.md docs/engines.md docs/errors.md docs/findings.md docs/methods.md
	$(PYTHON) -m sphinx -W -q -b html docs docs/_build/html

cog:
	$(PYTHON) -m cogapp -r docs/cli.md docs/engines.md docs/errors.md docs/findings.md docs/methods.md

bench-smoke:
	$(PYTHON) benchmarks/merge.py --smoke
	$(PYTHON) benchmarks/algebra.py --smoke
	$(PYTHON) benchmarks/convert.py --smoke

bench:
	$(PYTHON) benchmarks/merge.py
	$(PYTHON) benchmarks/startup.py
	$(PYTHON) benchmarks/algebra.py --peers
	$(PYTHON) benchmarks/convert.py

slow:
	$(PYTHON) -m pytest -q -m slow

fuzz:
	$(PYTHON) attacks/fuzz_header.py

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
