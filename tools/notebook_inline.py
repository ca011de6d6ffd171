"""Roles, labels, citations and links of MyST, in the Markdown that Colab and GitHub render."""

import os
import re
from functools import cache
from pathlib import Path

from book_files import BOOK, ROOT, SITE
from notebook_labels import Labels

# whichever begins first: a code span may show a role, and a role holds one code span
ROLE_OR_CODE = re.compile(
    r"\{(?P<role>[a-z]+(?::[a-z]+)?)\}(?P<ticks>`+)(?P<text>.+?)(?P=ticks)"
    r"|(?<!`)(?P<code>`+)(?!`).+?(?<!`)(?P=code)(?!`)",
    re.DOTALL,
)
LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\]\[]*)\]\((?P<target>[^)\s]*)\)(?:\{[^}\n]*\})?")
TITLED = re.compile(r"(?P<text>.+?)\s*<(?P<target>[^>]+)>", re.DOTALL)
PYTHON = ("py:func", "py:class", "py:mod", "py:meth", "py:data", "func", "class", "mod", "meth")


@cache
def bibliography():
    """The entries of book/references.bib, by key."""
    from pybtex.database import parse_file

    return parse_file(str(BOOK / "references.bib")).entries


def citation(key: str) -> tuple[str, str, str]:
    """Authors, year and address of a cited work: ("Dao et al.", "2022", "https://...").

    Raises:
        ValueError: book/references.bib has no such key.
    """
    entry = bibliography().get(key)
    if entry is None:
        raise ValueError(f"book/references.bib has no entry {key}")
    last = ["".join(str(part) for part in p.rich_last_names) for p in entry.persons.get("author", [])]
    names = " and ".join(last) if len(last) < 3 else f"{last[0]} et al."
    doi = entry.fields.get("doi")
    address = entry.fields.get("url") or (f"https://doi.org/{doi}" if doi else "")
    return names or entry.fields["title"], entry.fields.get("year", "n.d."), address


def cite(keys: str, *, textual: bool) -> str:
    """`{cite:t}` or `{cite:p}` of one or several keys as author-year links."""
    shown = []
    for names, year, address in (citation(key.strip()) for key in keys.split(",")):
        text = f"{names} ({year})" if textual else f"{names}, {year}"
        shown.append(f"[{text}]({address})" if address else text)
    return ", ".join(shown) if textual else f"({'; '.join(shown)})"


class Inline:
    """Rewrites the running text of one chapter; `labels` says what each label is called there."""

    def __init__(self, path: Path, labels: Labels):
        self.path, self.labels = path, labels

    def rewrite(self, text: str) -> str:
        """Roles and links of a piece of prose; code between backticks stays as it is."""
        kept = []

        def keep(shown):
            kept.append(shown)
            return f"\ue003{len(kept) - 1}\ue003"

        def role_or_code(match):
            return keep(self._role(match["role"], match["text"].strip()) if match["role"] else match.group())

        text = ROLE_OR_CODE.sub(role_or_code, text)
        text = LINK.sub(lambda m: self._link(m["bang"], m["text"], m["target"]), text)
        while "\ue003" in text:  # a link's text may hold a role
            text = re.sub("\ue003(\\d+)\ue003", lambda m: kept[int(m[1])], text)
        return text

    def _role(self, role, text):
        titled = TITLED.fullmatch(text)
        label, target = (titled["text"], titled["target"]) if titled else (None, text)
        if role in ("cite:t", "cite:p", "cite"):
            return cite(text, textual=role == "cite:t")
        if role in ("ref", "numref", "eq", "prf:ref"):
            return self._reference(role, label, target)
        if role == "doc":
            return f"[{label or self._title(target)}]({self.address(target + '.md')})"
        if role in PYTHON:
            return f"`{label or (target.rsplit('.', 1)[-1] if target.startswith('~') else target)}`"
        if role == "math":
            return f"${text}$"
        if role in ("term", "dfn", "kbd", "abbr", "sub", "sup"):
            plain = label or text
            return f"<{role}>{plain}</{role}>" if role in ("kbd", "sub", "sup") else plain
        raise ValueError(f"{self.path}: no rule for the role {{{role}}}`{text}`")

    def _reference(self, role, label, target):
        name = self.labels.get(target)
        if name is None:
            return self._elsewhere(label, target)
        if role == "numref" and label:
            return re.sub(r"%s|\{number\}", self.labels.number(target), label)
        return label or name

    def _elsewhere(self, label, target):
        # a label of another chapter: a method's name, which is a labelled section there
        from effattn_lite.registry import METHODS

        row = METHODS.get(target)
        if row is None:
            raise ValueError(
                f"{self.path}: the label {target!r} is neither in this chapter nor a method's name"
            )
        return f"[{label or row.title}]({SITE.source(BOOK / f'{row.chapter}.ipynb')})"

    def _link(self, bang, text, target):
        if target.startswith("#"):
            return text or self.labels.get(target[1:], target[1:])
        if not target or re.match(r"[a-z]+:", target):
            return f"{bang}[{text or target}]({target})"
        return f"{bang}[{text or self._title(target)}]({self.address(target, raw=bool(bang))})"

    def _title(self, target):
        page = self._resolve(target if target.endswith(".md") else f"{target}.md")
        heading = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        return heading[1].strip() if heading else page.stem

    def address(self, target: str, *, raw: bool = False) -> str:
        """Address in the repository of a file that the chapter names by a relative path."""
        name, _, anchor = target.partition("#")
        page = self._resolve(name)
        if page.suffix == ".md" and page.with_suffix(".ipynb").exists():
            page = page.with_suffix(".ipynb")
        return (SITE.raw if raw else SITE.source)(page) + (f"#{anchor}" if anchor and not raw else "")

    def _resolve(self, target):
        folder = ROOT if target.startswith("/") else self.path.parent
        page = Path(os.path.normpath(folder / target.lstrip("/")))
        if not page.exists():
            raise ValueError(f"{self.path}: links to {target}, which does not exist")
        return page
