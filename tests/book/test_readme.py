"""The front door: its code runs, its links lead somewhere, and it is short."""

import re

import pytest
from book_files import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
WRITTEN = re.sub(r"<!-- (\w+): begin.*?<!-- \1: end -->", "", README, flags=re.DOTALL)


def test_the_ten_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", WRITTEN, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([1, 16, 8, 64]) torch.Size([1, 8, 64, 64])\n"
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files_of_the_checkout(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)\s]+)", text):
        assert (ROOT / target).exists(), target


def test_the_tree_names_folders_that_exist():
    tree = re.search(r"## The tree.*?```\n(.*?)```", WRITTEN, re.DOTALL)[1]
    folder = ROOT
    for indent, name in re.findall(r"^( *)(\w+)/", tree, re.MULTILINE):
        path = (folder if indent else ROOT) / name
        folder = folder if indent else path
        assert path.is_dir(), path


def test_it_is_short_without_its_tables():
    assert len(WRITTEN.splitlines()) < 150
