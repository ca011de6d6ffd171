"""Where the book's files are, what `_config.yml` says about them, and how a generated one is written."""

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"


@dataclass(frozen=True)
class Site:
    """What the tools need of `_config.yml`, which alone holds the project's address."""

    config: Path = ROOT / "_config.yml"

    @cached_property
    def settings(self) -> dict:
        """Everything that the file says."""
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    @property
    def repository(self) -> str:
        """Address of the repository, without a slash at its end."""
        return self.settings["repository"]["url"].rstrip("/")

    def source(self, path: Path) -> str:
        """Address of a file's page in the repository."""
        return f"{self.blob}/{_relative(path)}"

    @property
    def blob(self) -> str:
        """Address of the top folder of the repository's files."""
        return f"{self.repository}/blob/{self._branch}"

    def raw(self, path: Path) -> str:
        """Address of a file's bytes in the repository: what an image link needs."""
        return f"{self.repository}/raw/{self._branch}/{_relative(path)}"

    @property
    def _branch(self):
        return self.settings["repository"]["branch"]


SITE = Site()


def _relative(path):
    return path.resolve().relative_to(ROOT).as_posix()


def chapter_files() -> list[Path]:
    """Sources of all chapters: the MyST notebooks under book/."""
    pages = (p for p in sorted(BOOK.rglob("*.md")) if not p.relative_to(BOOK).parts[0].startswith("_"))
    return [p for p in pages if "format_name: myst" in p.read_text(encoding="utf-8")[:400]]


def published() -> set[str]:
    """Paths under book/ of the pages that `_toc.yml` lists, without suffix."""
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    return set(re.findall(r"^\s*- file: book/(.+?)(?:\.md)?\s*$", toc, re.MULTILINE))


def read_source_notebook(text: str, path: Path):
    """A MyST notebook's cells, read by the parser and with the extensions that build the page."""
    from myst_nb.core.read import read_myst_markdown_notebook
    from myst_parser.config.main import MdParserConfig

    config = MdParserConfig(enable_extensions=set(SITE.settings["parse"]["myst_enable_extensions"]))
    return read_myst_markdown_notebook(text, config=config, path=path)


def write_or_compare(path: Path, text: str, *, check: bool) -> list[Path]:
    """Write `text` where the file differs; with `check` only show how. Returns [path] if it differed."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if old == text:
        return []
    name = _relative(path)
    if check:
        diff = difflib.unified_diff(
            old.splitlines(), text.splitlines(), name, f"{name} (fresh)", lineterm="", n=1
        )
        print(f"{name} is stale: run `make notebooks tables`", *list(diff)[:20], sep="\n")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {name}")
    return [path]
