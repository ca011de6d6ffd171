"""The recorded times as a table: the kernel, its floor, and whoever else was timed in the same run.

Below a sparse method's stands the length from which it beats dense attention.
"""

import json

from book_files import BOOK, SITE

from effattn_lite.bench.break_even import break_even

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
        options = _options(row.get("options", {}))
        seen = f", sees {row['share']:.3g} of all pairs" if "share" in row else ""
        at = ", ".join([*_sizes(size), row["dtype"]])
        # a link in every table: one that scrolls must be reachable by keyboard
        file = BOOK.parent / "effattn_lite" / "ops" / f"{row['op']}.py"
        op = f"[{row['op']}]({SITE.source(file)}){options}{seen}"
        runs.setdefault((op, row["pass"], size["T"], at), {})[row["impl"]] = row
    # where the op itself did not run, the others compare with nothing
    runs = {run: found for run, found in runs.items() if {"triton", "torch"} & set(found)}
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    lines += [f"| {' | '.join(_cells(op, which, T, found))} |" for (op, which, T, _), found in runs.items()]
    sizes = "; ".join(dict.fromkeys(at for *_, at in runs))
    table = f"{_source(record)}. Sizes: {sizes}.\n\n" + "\n".join(lines)
    return "\n\n".join([table, *_break_even(record["rows"])])


def _sizes(size):
    """Axes beside T; as many key heads as query heads go without saying."""
    axes = ("B", "H", "HKV", "K", "D") if size.get("HKV") != size.get("H") else ("B", "H", "K", "D")
    return [f"{axis} {size[axis]}" for axis in axes if axis in size]


def _options(options):
    return "".join(f", {key} {value}" for key, value in options.items())


def _break_even(rows):
    """A paragraph on where a sparse method becomes faster than dense attention; none for other methods."""
    told = []
    for found in break_even(rows):
        grid = ", ".join(f"{T:,}" for T in found["grid"])
        start = "at no T" if found["T"] is None else f"from T = {found['T']:,}"
        told.append(f"{found['pass']}{_options(found['options'])}: {start} (measured at {grid})")
    return [f"Faster than the fastest dense attention of the run: {'; '.join(told)}."] if told else []


def _cells(op, which, T, found):
    own, plain = found.get("triton"), found.get("torch")
    floor = (own or plain).get("floor_ms")
    ratio = f"{own['ms'] / floor:.1f}" if own and floor else ""
    peers = {impl: row["ms"] for impl, row in found.items() if impl not in ("triton", "torch")}
    best = min(peers, key=peers.get, default="")
    return (
        op, which, f"{T:,}", _ms(own and own["ms"]), _ms(floor), ratio, best, _ms(peers.get(best)),
        _ms(plain and plain["ms"]),
    )  # fmt: skip


def _ms(value):
    return f"{value:.3g}" if value else ""
