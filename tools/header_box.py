"""The box under a chapter's title: methods, papers, rooms, what to read first, how long it runs."""

import json

from book_files import BOOK, SITE, published

from effattn_lite import CHAPTERS, METHODS
from effattn_lite.registry import room_file

SURVEY = "[the survey](https://arxiv.org/abs/2507.19595)"


def header(chapter) -> str:
    """The header box of one chapter, as MyST that also reads well in a notebook."""
    lines = [":::{admonition} Before you start", ":class: chapter-header", ""]
    methods = [row for row in METHODS.values() if row.chapter == chapter.path]
    if methods:
        lines += ["| method | paper | code |", "|---|---|---|"]
        lines += [f"| {row.title} | {_paper(row)} | {_rooms(row)} |" for row in methods]
        lines.append("")
    lines += [f"- **{name}:** {text}" for name, text in _facts(chapter) if text]
    return "\n".join([*lines, ":::", ""])


def _paper(row):
    return f"{{cite:t}}`{row.cite[0]}`"


def _rooms(row):
    shown = []
    for room in row.rooms:
        file = room_file(row, room)
        shown.append(f"[{room}]({SITE.source(file)})" if file else f"{room} ○")
    return " · ".join(shown)


def _facts(chapter):
    yield "Read first", ", ".join(_page(path) for path in chapter.needs)
    plural = "s" if "," in chapter.survey else ""
    yield (
        "In the survey",
        f"section{plural} {chapter.survey} of {SURVEY}" if chapter.survey[:1].isdigit() else "",
    )
    yield "Runs on", chapter.device + _time(chapter)


def _page(path):
    title = CHAPTERS[path].title
    return f"{{doc}}`{title} </book/{path}>`" if path in published() else f"*{title}* (not written yet)"


def _time(chapter):
    record = BOOK / "_results" / "notebook_times.json"
    if not record.exists():
        return ""
    told = json.loads(record.read_text(encoding="utf-8"))
    seconds = {row["chapter"]: row["seconds"] for row in told["rows"]}.get(chapter.path)
    return f", in about {seconds:.0f} s ({told['device']}, {told['date']})" if seconds else ""
