# `make help` lists everything. One virtual environment, .venv, holds all that the book and its tests need.
PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
STAMP := .venv/.installed
SITE := _build/html
WORKERS ?= 2
.DEFAULT_GOAL := help
.PHONY: help book test serve page notebooks tables static site lint laws executed check bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"the book needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

book: $(STAMP)  ## build the site: write, execute each notebook once, build with every warning an error
	@$(MAKE) --no-print-directory tables notebooks executed site
	@echo "the book: file://$(CURDIR)/$(SITE)/index.html"

executed: $(STAMP)
	$(PY) tools/execute_notebooks.py --workers $(WORKERS)

static: $(STAMP)
	@test ! -f tools/write_live.py || $(PY) tools/write_live.py

site: static
	@# a page that warned must be read again, or the next build would pass
	$(BIN)/jupyter-book build . -W -n --keep-going || { rm -rf _build/.doctrees; exit 1; }

test: lint  ## everything: lint, layout, fresh files, laws, notebooks, Colab rehearsal, browser
	@test ! -f tools/check_layout.py || $(PY) tools/check_layout.py
	$(PY) tools/write_tables.py --check
	$(PY) tools/write_notebooks.py --check
	$(PY) -m pytest -n $(WORKERS) --dist worksteal --ignore tests/browser
	@$(MAKE) --no-print-directory executed site
	@test ! -d tests/browser || $(PY) -m pytest tests/browser

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

laws: $(STAMP)  ## the laws alone
	$(PY) -m pytest -n $(WORKERS) tests/laws

page: $(STAMP)  ## build one chapter alone: make page NAME=linear/fixed_decay
	$(PY) tools/preview_page.py $(NAME)

notebooks: $(STAMP)  ## write the .ipynb beside every chapter, and the shown code into the chapters
	$(PY) tools/write_notebooks.py

tables: $(STAMP)  ## write coverage, notation, results and header boxes
	$(PY) tools/write_tables.py

check: $(STAMP)  ## one method's tests: make check NAME=retnet
	$(PY) -m effattn_lite check $(NAME)

bench: $(STAMP)  ## measure one method and record it in book/_results: make bench NAME=retnet
	$(PY) -m effattn_lite bench $(NAME) --record

serve: book  ## build, then serve on http://localhost:8000
	$(PY) -m http.server --bind 127.0.0.1 --directory $(SITE) 8000

clean:  ## remove what was built; .venv stays
	rm -rf _build book/_static/live .pytest_cache .ruff_cache
