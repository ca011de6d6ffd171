"""Write the tables of the book and of the README from the registry and the recorded results.

    python tools/write_tables.py            write what differs
    python tools/write_tables.py --check    only say what differs; exit 1 if anything does

Written are `book/_generated/` (notation, coverage, recorded results, the package's rooms, one header box a
chapter), the picture `book/_static/methods.svg`, and what stands in README.md between the lines
`<!-- name: begin -->` and `<!-- name: end -->`.
"""

import argparse
import re
import sys
from pathlib import Path

from book_files import BOOK, ROOT, SITE, write_or_compare
from coverage_table import coverage, summary
from draw_map import method_map
from header_box import header
from results_table import performance

from effattn_lite import CHAPTERS, notation
from effattn_lite.registry import names

COMMAND = "% Written by `python tools/write_tables.py`: edit the registry, not this file.\n\n"
GENERATED = BOOK / "_generated"


def notation_tables() -> str:
    """The letters of the book, from effattn_lite/notation.py."""
    axes = [f"| `{letter}` | {meaning} |" for letter, meaning in notation.AXES.items()]
    tensors = [f"| `{name}` | {meaning} | `{shape}` |" for name, (meaning, shape) in notation.TENSORS.items()]
    symbols = [f"| ${symbol}$ | {meaning} |" for symbol, meaning in notation.SYMBOLS.items()]
    return "\n".join(
        ["## Sizes", "", "| letter | counts |", "|---|---|", *axes, ""]
        + ["## Tensors", "", "| name | what it is | shape |", "|---|---|---|", *tensors, ""]
        + ["## Symbols of formulas", "", "| symbol | meaning |", "|---|---|", *symbols, ""]
    )


def api() -> str:
    """The part of the package's page that lists every op, layer and reference that stands."""
    parts = []
    rooms = {"Ops": ("op", "ops"), "Layers": ("layer", "layers"), "References": ("reference", "reference")}
    for title, (room, folder) in rooms.items():
        modules = [f".. automodule:: effattn_lite.{folder}.{name}\n   :members:\n" for name in names(room)]
        if modules:
            joined = "\n".join(modules)
            parts.append(f"## {title}\n\n```{{eval-rst}}\n{joined}```\n")
    return "\n".join(parts)


def headers() -> dict[Path, str]:
    """The header box of every chapter that has a source."""
    rows = [row for row in CHAPTERS.values() if (BOOK / f"{row.path}.md").exists()]
    return {GENERATED / "headers" / f"{row.path.replace('/', '-')}.md": COMMAND + header(row) for row in rows}


def tables() -> dict[Path, str]:
    """Every other generated file, and README.md with fresh tables between its markers."""
    written = {
        "notation": notation_tables(),
        "coverage": f"{summary()}\n\n{coverage(book=True)}\n",
        "performance": performance(),
        "api": api(),
    }
    pages = {GENERATED / f"{name}.md": COMMAND + text for name, text in written.items()}
    return pages | {BOOK / "_static" / "methods.svg": method_map()} | readme()


def readme() -> dict[Path, str]:
    """README.md with fresh tables between its markers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folder = SITE.repository.rsplit("/", 1)[-1]
    parts = {
        "clone": f"```bash\ngit clone {SITE.repository}\ncd {folder}\nmake book\n```",
        "coverage": f"{summary()}\n\n{coverage(book=False)}",
        "performance": performance(),
    }
    for name, part in parts.items():
        fresh = part.replace(f"{SITE.blob}/", "").strip()
        pattern = re.compile(rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, fresh=fresh: f"{m[1]}\n{fresh}\n\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"README.md has {count} places for the {name}, expected 1")
    return {ROOT / "README.md": text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    parser.add_argument("--headers", action="store_true", help="only the chapters' header boxes")
    args = parser.parse_args()
    stale = []
    for path, text in (headers() if args.headers else headers() | tables()).items():
        stale += write_or_compare(path, text, check=args.check)
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
