"""Draw every method by family and year, from the registry and the bibliography, as the README's picture."""

from html import escape

from notebook_inline import citation

from effattn_lite import METHODS
from effattn_lite.plotting import COLORS
from effattn_lite.registry import room_file

FIRST, CELL, LABEL, LINE, HEAD = 2020, 132, 118, 15, 52
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.head{font-weight:600}.note{fill:#666}"
    ".planned{fill:#6f6f6f}.built{font-weight:600}"
)


def method_map() -> str:
    """The picture as SVG: a line a family, a column a year, a filled dot where the reference stands."""
    table, years = {}, set()
    for row in METHODS.values():
        year = max(FIRST, int(citation(row.cite[0])[1]))
        years.add(year)
        table.setdefault(row.family, {}).setdefault(year, []).append(row)
    columns = {year: LABEL + i * CELL for i, year in enumerate(sorted(years))}
    drawn, y = [], HEAD
    for family, cells in table.items():
        height = LINE * max(map(len, cells.values())) + 8
        drawn.append(f'<path d="M8 {y - 4}H{LABEL + CELL * len(columns)}" stroke="#e3e3e3"/>')
        drawn.append(
            f'<text x="8" y="{y + LINE - 3}" class="head" style="fill:{COLORS[family]}">{family}</text>'
        )
        for year, rows in cells.items():
            drawn += [_method(row, columns[year], y + LINE * i + 8) for i, row in enumerate(rows)]
        y += height
    heads = [f'<text x="{x}" y="38" class="head">{_head(year)}</text>' for year, x in columns.items()]
    width = LABEL + CELL * len(columns) + 8
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 8}" role="img">',
            "<!-- Written by `python tools/write_tables.py`: edit the registry, not this file. -->",
            f"<title>{len(METHODS)} methods and models of the book, by family and year</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{y + 8}" rx="8" fill="#fff"/>',
            '<text x="8" y="18" class="note">filled: in this version; open: planned</text>',
            *heads,
            *drawn,
            "</svg>\n",
        ]
    )


def _head(year):
    return f"to {year}" if year == FIRST else str(year)


def _method(row, x, y):
    built = any(room_file(row, room) for room in row.rooms)
    color = COLORS[row.family]
    dot = f'<circle cx="{x + 4}" cy="{y}" r="3.5" fill="{color if built else "none"}" stroke="{color}"/>'
    kind = "built" if built else "planned"
    return f'{dot}<text x="{x + 12}" y="{y + 4}" class="{kind}">{escape(row.name)}</text>'
