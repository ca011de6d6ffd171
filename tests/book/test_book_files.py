"""What every file of the book must be, whoever wrote it."""

import json
import re

import nbformat
import pytest
from book_files import BOOK, ROOT, SITE, chapter_files, published, read_source_notebook
from execute_notebooks import outputs
from notebook_inline import bibliography
from write_tables import headers

from effattn_lite import CHAPTERS, METHODS
from effattn_lite.bench import record

CHAPTER_FILES = [path for path in chapter_files() if path.parent != BOOK]
NOTEBOOKS = [path.with_suffix(".ipynb") for path in chapter_files()]
RESULTS = sorted((BOOK / "_results").glob("*.json"))
SECTIONS = [
    "The question", "The idea", "Derivation", "From scratch in NumPy", "Check", "The kernel",
    "What it costs", "Experiment", "Takeaways", "Exercises", "References",
]  # fmt: skip


def name(path):
    return path.relative_to(BOOK).as_posix()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_page_of_the_toc_exists_and_every_chapter_is_in_it():
    assert [page for page in published() if not (BOOK / f"{page}.md").exists()] == []
    assert {name(path.with_suffix("")) for path in chapter_files()} <= published() | {"index"}


def test_every_chapter_has_a_registry_row_and_a_header_box():
    for path in CHAPTER_FILES:
        row = CHAPTERS[name(path.with_suffix(""))]
        text = path.read_text(encoding="utf-8")
        assert f"# {row.title}\n" in text
        assert f"_generated/headers/{row.path.replace('/', '-')}.md" in text
    assert len(headers()) == len(CHAPTER_FILES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_clean_and_equals_its_source(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert SITE.repository in notebook.cells[0].source
    source_path = path.with_suffix(".md")
    source = read_source_notebook(source_path.read_text(encoding="utf-8"), source_path)
    assert [cell.source for cell in code_cells(notebook)] == [cell.source for cell in code_cells(source)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_has_no_myst_left(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.DOTALL)
            assert not re.search(r"\{[a-z:]+\}`|^:::|^\([\w-]+\)=$", prose, re.MULTILINE), cell.source


@pytest.mark.parametrize("path", CHAPTER_FILES, ids=name)
def test_chapter_obeys_the_size_of_cells_and_the_order_of_sections(path):
    text = path.read_text(encoding="utf-8")
    cells = code_cells(read_source_notebook(text, path))
    assert cells[1].source.splitlines() == [
        "import numpy as np",
        "from effattn_lite import plotting",
        "plotting.style()",
        "rng = np.random.default_rng(0)",
    ]
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= (40 if "source" in cell.metadata else 25), cell.source
    top = [title for title in re.findall(r"^## (.+)$", text, re.MULTILINE) if title in SECTIONS]
    assert top == sorted(top, key=SECTIONS.index)
    assert {"The question", "Takeaways", "Exercises", "References"} <= set(top)


@pytest.mark.parametrize("path", CHAPTER_FILES, ids=name)
def test_chapter_loads_nothing_and_touches_no_path(path):
    for cell in code_cells(read_source_notebook(path.read_text(encoding="utf-8"), path))[1:]:
        assert not re.search(r"urlopen|requests\.|wget|curl |sys\.path|https?://|\.\./", cell.source), (
            cell.source
        )


@pytest.mark.parametrize("path", CHAPTER_FILES, ids=name)
def test_every_plot_says_in_words_what_it_shows(path):
    for cell in code_cells(read_source_notebook(path.read_text(encoding="utf-8"), path)):
        if re.search(r"plt\.|\.subplots\(", cell.source) and "hide-input" in cell.metadata.get("tags", []):
            assert cell.metadata.get("mystnb", {}).get("image", {}).get("alt"), cell.source


@pytest.mark.parametrize("path", RESULTS, ids=name)
def test_recorded_result_fits_its_schema(path):
    told = json.loads(path.read_text(encoding="utf-8"))
    record.check(told)
    assert told["name"] == path.stem


def test_every_cited_work_is_in_the_bibliography_and_no_other():
    sources = [*BOOK.glob("*.md"), *BOOK.glob("[!_]*/*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    cited = {
        key.strip() for keys in re.findall(r"\{cite(?::\w)?\}`([^`]+)`", text) for key in keys.split(",")
    }
    cited |= {key for row in METHODS.values() for key in row.cite}
    assert set(bibliography()) == cited


def test_the_address_of_the_repository_stands_in_one_place():
    written = {path.with_suffix(".md") for path in NOTEBOOKS} | {ROOT / "README.md", SITE.config}
    tools, package, pages = (
        ROOT.glob("tools/*.py"),
        ROOT.glob("effattn_lite/**/*.py"),
        BOOK.glob("[!_]*/*.md"),
    )
    for path in {*ROOT.glob("*.[a-z]*"), *tools, *package, *pages} - written:
        assert path.is_dir() or SITE.repository not in path.read_text(encoding="utf-8"), path


def test_a_failed_or_unfinished_notebook_is_not_handed_over(tmp_path):
    good = nbformat.v4.new_code_cell("1", execution_count=1)
    error = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    bad = nbformat.v4.new_code_cell("1", execution_count=1, outputs=[error])
    for cells, expected in (
        ([good], True),
        ([good, bad], False),
        ([good, nbformat.v4.new_code_cell("2")], False),
    ):
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
        assert (outputs(tmp_path / "a.ipynb") is not None) is expected
