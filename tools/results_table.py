"""The recorded times as a table: the kernel, its floor, and whoever else was timed in the same run."""

import json

from book_files import BOOK, SITE

HEADS = (
    "op",
    "pass",
    "T",
    "kernel, ms",
    "floor, ms",
    "kernel / floor",
    "fastest other",
    "ms",
    "plain torch, ms",
)


def performance() -> str:
    """All records of book/_results, or a sentence that says there are none."""
    records = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted((BOOK / "_results").glob("*.json"))
    ]
    timed = [record for record in records if any("ms" in row for row in record["rows"])]
    other = [record for record in records if record not in timed]
    parts = [_table(record) for record in timed] or ["No kernel has a recorded time yet."]
    if other:
        parts.append("Records of other kinds:\n\n" + "\n".join(f"- {_source(record)}" for record in other))
    return "\n\n".join(parts) + "\n"


def _source(record):
    address = SITE.source(BOOK / "_results" / f"{record['name']}.json")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"[{record['name']}]({address}): {record['device']}, {record['date']}; {versions}"


def _table(record):
    runs = {}
    for row in record["rows"]:
        size = row["shape"]
        options = "".join(f", {key} {value}" for key, value in row.get("options", {}).items())
        at = ", ".join([f"{axis} {size[axis]}" for axis in "BHKD" if axis in size] + [row["dtype"]])
        # a link in every table: one that scrolls must be reachable by keyboard
        file = BOOK.parent / "effattn_lite" / "ops" / f"{row['op']}.py"
        op = f"[{row['op']}]({SITE.source(file)}){options}"
        runs.setdefault((op, row["pass"], size["T"], at), {})[row["impl"]] = row
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    lines += [f"| {' | '.join(_cells(op, which, T, found))} |" for (op, which, T, _), found in runs.items()]
    sizes = "; ".join(dict.fromkeys(at for *_, at in runs))
    return f"{_source(record)}. Sizes: {sizes}.\n\n" + "\n".join(lines)


def _cells(op, which, T, found):
    own, plain = found.get("triton"), found.get("torch")
    peers = {impl: row["ms"] for impl, row in found.items() if impl not in ("triton", "torch")}
    best = min(peers, key=peers.get, default="")
    floor = own and own.get("floor_ms")
    return (
        op, which, f"{T:,}", _ms(own and own["ms"]), _ms(floor), f"{own['ms'] / floor:.1f}" if floor else "",
        best, _ms(peers.get(best)), _ms(plain and plain["ms"]),
    )  # fmt: skip


def _ms(value):
    return f"{value:.3g}" if value else ""
