"""Write the notebook beside every chapter, and the package's code into the chapter itself.

    python tools/write_notebooks.py [chapter.md ...]     write what differs
    python tools/write_notebooks.py --check              only say what differs; exit 1 if anything does

The source of a chapter is a MyST notebook, `book/<part>/<chapter>.md`. This tool puts into it the install
cell and, in every cell with a `source:` option, the function of the package that the cell shows; then it
writes `<chapter>.ipynb`: same code cells, prose in the Markdown that Colab and GitHub render, no outputs.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

import nbformat
from book_files import BOOK, ROOT, SITE, chapter_files, read_source_notebook, write_or_compare
from notebook_code import fill_sources
from notebook_markdown import Rewriter

INSTALL = """```{{code-cell}} ipython3
:tags: [remove-cell]
# Colab: install the package where it is missing
import importlib.util

if importlib.util.find_spec("effattn_lite") is None:
    %pip install -q "effattn_lite[notebook] @ git+{repository}"
```
"""
FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
INSTALL_CELL = re.compile(
    r"\s*```\{code-cell\} ipython3\n:tags: \[remove-cell\]\n# Colab:.*?\n```\n", re.DOTALL
)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def source_text(text: str, path: Path) -> str:
    """The chapter's text with the install cell in front and every `source:` cell filled."""
    front = FRONT.match(text)
    if front is None:
        raise ValueError(f"{path}: does not begin with a jupytext header between two lines of ---")
    rest = INSTALL_CELL.sub("", text[front.end() :], count=1)
    install = INSTALL.format(repository=SITE.repository)
    return fill_sources(f"{front.group()}\n{install}\n{rest.lstrip()}", path)


def notebook(text: str, path: Path) -> nbformat.NotebookNode:
    """The notebook of a chapter: its code cells, and its prose as plain Markdown."""
    source = read_source_notebook(text, path)
    rewriter = Rewriter(path, [cell.source for cell in source.cells if cell.cell_type == "markdown"])
    cells = []
    for cell in source.cells:
        if cell.cell_type == "markdown":
            body = rewriter.rewrite(cell.source)
            if body:
                cells.append(nbformat.v4.new_markdown_cell(body))
        else:
            cells.append(nbformat.v4.new_code_cell(cell.source, metadata=_metadata(cell, rewriter)))
    rewriter.finish()
    _set_ids(cells)
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def _metadata(cell, rewriter):
    metadata = dict(cell.metadata)
    if rewriter.in_solution or "hide-input" in metadata.get("tags", []):
        # folded in Jupyter and in Colab; the page folds by tag and by the solution's box
        metadata |= {"jupyter": {"source_hidden": True}, "cellView": "form"}
    return metadata


def _set_ids(cells):
    # from the content, so that an edit changes one id; a repeated content gets its count
    seen = {}
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("chapters", nargs="*", type=Path, help="MyST sources; default: all under book/")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    args = parser.parse_args()
    stale = []
    for path in [p.resolve() for p in args.chapters] or chapter_files():
        text = source_text(path.read_text(encoding="utf-8"), path)
        stale += write_or_compare(path, text, check=args.check)
        book = nbformat.writes(notebook(text, path), indent=1, ensure_ascii=False) + "\n"
        stale += write_or_compare(path.with_suffix(".ipynb"), book, check=args.check)
    if not args.chapters:
        for orphan in sorted(set(BOOK.rglob("*.ipynb")) - {p.with_suffix(".ipynb") for p in chapter_files()}):
            raise SystemExit(f"{orphan.relative_to(ROOT)} has no chapter source beside it: delete it")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
