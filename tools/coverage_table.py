"""The coverage table: one row a method, one cell a room, hollow where nothing exists yet."""

import json
import re
import subprocess
import sys
from functools import cache

from book_files import BOOK, ROOT, SITE, published
from notebook_inline import cite

from effattn_lite import CHAPTERS, METHODS
from effattn_lite.registry import room_file

COLUMNS = ("reference", "op", "forward", "backward", "layer", "model", "tests", "bench")
HEADS = ("method", "family", "paper", "chapter", "reference forms", "torch op", "Triton forward",
         "Triton backward", "layer", "model", "tests", "recorded bench")  # fmt: skip
ROOM_COLUMNS = {"reference": "reference", "op": "op", "kernel": "forward", "layer": "layer", "model": "model"}
KINDS = {"forward": "kernel", "backward": "kernel"}


def coverage(*, book: bool) -> str:
    """The whole table; in the book, papers are citations and chapters are pages."""
    rows = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for row in METHODS.values():
        paper = f"{{cite:t}}`{row.cite[0]}`" if book else cite(row.cite[0], textual=True)
        cells = [
            row.title,
            row.family,
            paper,
            _chapter(row, book),
            *(_cell(row, column) for column in COLUMNS),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def summary() -> str:
    """One sentence that counts the filled cells."""
    counts = {}
    for kind, column in ROOM_COLUMNS.items():
        promised = [row for row in METHODS.values() if kind in row.rooms]
        counts[kind] = f"{sum(_is_filled(row, column) for row in promised)} of {len(promised)}"
    written = sum(path in published() for path in CHAPTERS)
    rooms = ", ".join(f"{counts[kind]} {kind}s" for kind in ROOM_COLUMNS)
    return (
        f"{len(METHODS)} methods and models, {len(CHAPTERS)} chapters. "
        f"Written so far: {written} of {len(CHAPTERS)} chapters, {rooms}. "
        "● exists and its laws run in the tests; "
        "○ planned, with the reason as its tooltip; – not planned."
    )


def _chapter(row, book):
    title = CHAPTERS[row.chapter].title
    if row.chapter not in published():
        return _hollow(f"{title}: not written yet")
    if book:
        return f"{{doc}}`read </book/{row.chapter}>`"
    return f'[read](book/{row.chapter}.ipynb "{title}")'


def _cell(row, column):
    room = KINDS.get(column, column)
    if column in ("tests", "bench"):
        file = ROOT / "tests" / "methods" / f"test_{row.name}.py" if column == "tests" else _record(row.name)
        if file and file.exists():
            return _full(row, column, file)
        return _hollow("no test of its own yet" if column == "tests" else "no recorded run yet")
    if room not in row.rooms:
        return f'<span title="not planned: no {room} is promised for it">–</span>'
    if column == "backward" and not row.differentiable:
        return '<span title="not planned: its selection is not differentiable">–</span>'
    if _is_filled(row, column):
        return _full(row, column, room_file(row, room), row.forms if column == "reference" else ())
    return _hollow(
        "not written yet" if room_file(row, room) is None else "written; no law test runs on it yet"
    )


def _is_filled(row, column):
    return room_file(row, KINDS.get(column, column)) is not None and (row.name, column) in laws()


def _full(row, column, file, parts=()):
    forms = f": {', '.join(parts)}" if parts else ""
    return f'[●]({SITE.source(file)} "{column} of {row.title}{forms}")'


def _hollow(reason):
    return f'<span title="{reason}">○</span>'


def _record(name):
    for file in sorted((BOOK / "_results").glob("*.json")):
        if any(
            name in (row.get("op"), row.get("method"))
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
        ):
            return file
    return None


@cache
def laws() -> frozenset[tuple[str, str]]:
    """(method, column) of every law test that pytest collects, on whatever device."""
    paths = ("tests/laws", "tests/models/test_laws.py")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"the laws cannot be collected:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    found = set()
    for folder, file, test, case in re.findall(
        r"^tests/(laws|models)/test_(\w+)\.py::(\w+)\[([^\]]+)\]$", run.stdout, re.MULTILINE
    ):
        name = max((n for n in METHODS if re.match(rf"{n}(?![a-z0-9_])", case)), key=len, default=None)
        column = {"kernel": "backward" if re.search("grad|backward", test) else "forward"}.get(file, file)
        column = "model" if folder == "models" else column
        found.add((name, column))
    return frozenset(found)
