# Every target sets up .venv first; it needs Python 3.11 or newer, and uses uv where there is one.
# uv does not read pip's variable for a folder of local wheels, so hand it on.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
UV := $(shell command -v uv 2>/dev/null)
VENV = $(if $(UV),uv venv -q --no-python-downloads --python $(PYTHON) .venv,$(PYTHON) -m venv .venv)
INSTALL = $(if $(UV),uv pip install -q --python .venv/bin/python,.venv/bin/python -m pip install -q)

.PHONY: setup demo test lint bench architectures exports clean

setup: .venv/.ready

demo: setup
	.venv/bin/efficientai-mlx-toolkit compress demo

test: setup
	.venv/bin/pytest

lint: setup
	.venv/bin/ruff check .

bench: setup
	.venv/bin/python -P -m mlx_compress.benchmarks.lean

architectures: setup
	PYTHONPATH=tests .venv/bin/python -P -c "import mlx_compress, zoo_checks; zoo_checks.main()"

exports: setup
	PYTHONPATH=tests .venv/bin/python -P -c "import mlx_compress, zoo_page; zoo_page.main()"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/.ready: pyproject.toml constraints.txt
	@test -x .venv/bin/python || test -n "$(PYTHON)" || { \
		echo "Python 3.11 or newer was not found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x .venv/bin/python || $(VENV) || { rm -rf .venv; exit 1; }
	@echo "Installing into .venv; the first time takes a minute or two."
	$(INSTALL) -c constraints.txt -e '.[test]'
	@touch $@
