"""Every rule by which a chapter's MyST becomes the Markdown of its notebook."""

import pytest
from book_files import BOOK, SITE
from notebook_code import fill_sources, function_source
from notebook_markdown import Rewriter
from write_notebooks import notebook, source_text

CHAPTER = BOOK / "linear" / "a_chapter.md"
FRONT = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""


def rewrite(text):
    return Rewriter(CHAPTER, [text]).rewrite(text)


RULES = {
    "comment": ("a\n% unseen\nb", "a\nb"),
    "target": ("(gla)=\n## Gates", "## Gates"),
    "section reference": ("(gla)=\n## The *gate*\n\nSee {ref}`gla`.", "## The *gate*\n\nSee The gate."),
    "titled reference": ("(gla)=\n## A\n\nSee {ref}`this <gla>`.", "## A\n\nSee this."),
    "code is kept": ("`{ref}` and ``{eq}`x` ``", "`{ref}` and ``{eq}`x` ``"),
    "fence is kept": ("```python\n{ref}`x`\n```", "```python\n{ref}`x`\n```"),
    "inline math": ("{math}`x_t` and $[a](b)$", "$x_t$ and $[a](b)$"),
    "math directive": ("```{math}\n:label: eq-a\na = b\n```\n\n{eq}`eq-a`", "$$\na = b \\tag{1}\n$$\n\n(1)"),
    "dollar label": ("$$\na\n$$ (eq-a)\n\nBy {eq}`eq-a`", "$$\na\n\\tag{1} $$\n\nBy (1)"),
    "note": ("```{note}\nMind it.\n```", "> **Note**\n>\n> Mind it."),
    "colon fence": (":::{tip}\nMind it.\n:::", "> **Tip**\n>\n> Mind it."),
    "admonition": ("```{admonition} Mind\n:class: x\nIt.\n```", "> **Mind**\n>\n> It."),
    "theorem": (
        "```{prf:theorem} Main\n:label: t\nA.\n```\n\n{prf:ref}`t`",
        "> **Theorem** (Main)\n>\n> A.\n\nTheorem (Main)",
    ),
    "dropdown": (
        "```{dropdown} More\nB\n```",
        "<details>\n<summary><b>More</b></summary>\n\nB\n\n</details>",
    ),
    "exercise": (
        "```{exercise} By hand\n:label: ex-1\nDo.\n```\n\n{ref}`ex-1`",
        "### Exercise 1: By hand\n\nDo.\n\nExercise 1",
    ),
    "bibliography": ("A\n\n```{bibliography}\n```", "A"),
    "raw html": ("```{raw} html\n<b>x</b>\n```", "<b>x</b>"),
    "code block": ("```{code-block} c\nx;\n```", "```c\nx;\n```"),
    "list table": ("```{list-table}\n* - a\n  - b\n* - 1\n  - 2\n```", "| a | b |\n| --- | --- |\n| 1 | 2 |"),
    "nested": ("````{note}\n```{math}\nx\n```\n````", "> **Note**\n>\n> $$\n> x\n> $$"),
    "cite in text": ("{cite:t}`dao2023flashattention2`", "[Dao (2023)](https://arxiv.org/abs/2307.08691)"),
    "cite aside": ("{cite:p}`dao2023flashattention2`", "([Dao, 2023](https://arxiv.org/abs/2307.08691))"),
    "python": ("{py:func}`~effattn_lite.ops.retnet`", "`retnet`"),
    "term": ("{term}`state`", "state"),
}


@pytest.mark.parametrize(("source", "expected"), RULES.values(), ids=RULES.keys())
def test_rule(source, expected):
    assert rewrite(source) == expected


def test_figure_gets_an_address_that_colab_can_load():
    text = (
        "```{figure} ../notation.md\n:name: fig-a\n:alt: a map\nThe caption.\n```\n\n{numref}`F. %s <fig-a>`"
    )
    address = f"{SITE.repository}/raw/main/book/notation.md"
    assert rewrite(text) == f"![a map]({address})\n\n*Figure 1.* The caption.\n\nF. 1"


def test_links_to_pages_point_into_the_repository():
    address = f"{SITE.repository}/blob/main/book/notation.md"
    assert rewrite("[letters](../notation.md)") == f"[letters]({address})"
    assert rewrite("{doc}`/book/notation`") == f"[Notation]({address})"


def test_a_method_of_another_chapter_is_found_by_its_name():
    assert rewrite("{ref}`gla`").startswith(f"[Gated Linear Attention]({SITE.repository}")


def test_literalinclude_shows_the_code_and_links_the_file():
    text = (
        "```{literalinclude} ../../effattn_lite/notation.py\n:start-after: AXES = {\n:end-before: packed\n```"
    )
    shown = rewrite(text)
    assert f"({SITE.repository}/blob/main/effattn_lite/notation.py)" in shown
    assert '```python\n"B": "batch' in shown
    text = '```{literalinclude} ../../effattn_lite/notation.py\n:start-at: "AXES = {"\n:end-at: packed\n```'
    shown = rewrite(text)
    assert "```python\nAXES = {" in shown and shown.rstrip("`\n").splitlines()[-1].startswith(
        '    "N": "packed'
    )


def test_gated_solution_is_folded_piece_by_piece():
    cells = [
        "```{exercise-start}\n:label: ex-1\n```\nDo.\n```{exercise-end}\n```\n\n"
        "```{solution-start} ex-1\n:class: dropdown\n```\nFirst.",
        "Then.\n\n```{solution-end}\n```\n\nAfter.",
    ]
    rewriter = Rewriter(CHAPTER, cells)
    first = rewriter.rewrite(cells[0])
    assert rewriter.in_solution
    assert first.endswith(
        "<details>\n<summary><b>Solution of exercise 1</b></summary>\n\nFirst.\n\n</details>"
    )
    last = rewriter.rewrite(cells[1])
    assert last.startswith("<details>\n<summary><b>Solution of exercise 1, continued</b></summary>\n\nThen.")
    assert last.endswith("</details>\n\nAfter.")
    rewriter.finish()


def test_open_solution_is_an_error():
    cells = ["```{exercise} x\n:label: ex-1\n```\n\n```{solution-start} ex-1\n```\nFirst."]
    rewriter = Rewriter(CHAPTER, cells)
    rewriter.rewrite(cells[0])
    with pytest.raises(ValueError, match="solution-end"):
        rewriter.finish()


@pytest.mark.parametrize(
    "text",
    [
        "```{unheard-of}\n```",
        "{unheard}`of`",
        "{ref}`nowhere`",
        "{cite:t}`nobody2001`",
        "[a](../nowhere.md)",
        "```{note}\nopen",
    ],
)
def test_what_has_no_rule_is_an_error(text):
    with pytest.raises(ValueError):
        rewrite(text)


def test_shown_code_is_the_package_function_without_docstring():
    text = "```{code-cell} ipython3\n---\nsource: effattn_lite.data:names as all_names\n---\n...\n```\n"
    filled = fill_sources(text, CHAPTER)
    assert "---\ndef all_names() -> list[str]:\n    return _stems(_results(), " in filled
    assert fill_sources(filled, CHAPTER) == filled


def test_shown_function_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="it has .*load"):
        function_source(BOOK.parent / "effattn_lite" / "data" / "__init__.py", "nothing")


def test_install_cell_comes_first_and_once():
    text = f"{FRONT}\n# A title\n\n```{{code-cell}} ipython3\nx = 1\n```\n"
    once = source_text(text, CHAPTER)
    assert source_text(once, CHAPTER) == once
    cells = notebook(once, CHAPTER).cells
    assert [cell.cell_type for cell in cells] == ["code", "markdown", "code"]
    assert SITE.repository in cells[0].source
    assert cells[0].metadata["tags"] == ["remove-cell"]


def test_cell_ids_are_deterministic_and_differ():
    text = source_text(f"{FRONT}\n# A\n" + "\n```{code-cell} ipython3\nx = 1\n```\n" * 2, CHAPTER)
    first, second = (notebook(text, CHAPTER).cells for _ in range(2))
    assert [cell.id for cell in first] == [cell.id for cell in second]
    assert len({cell.id for cell in first}) == len(first)
