"""The registry: one row a method, one row a chapter, read by laws, bench, tables and pages.

It is data, never dispatch: an op chooses its implementation itself.
"""

from pathlib import Path

from effattn_lite.registry.chapters import CHAPTERS as _CHAPTERS
from effattn_lite.registry.linear import LINEAR
from effattn_lite.registry.models import MODELS
from effattn_lite.registry.row import FAMILIES, ROOMS, Chapter, Method
from effattn_lite.registry.sparse import SPARSE

__all__ = ["CHAPTERS", "FAMILIES", "METHODS", "ROOMS", "Chapter", "Method", "find", "names", "room_file"]

METHODS = {row.name: row for row in (*LINEAR, *SPARSE, *MODELS)}
"""Every method, by name, in the order of the survey."""

CHAPTERS = {row.path: row for row in _CHAPTERS}
"""Every planned chapter, by path, in reading order."""

PACKAGE = Path(__file__).resolve().parent.parent


def find(name: str) -> Method:
    """The row of a method, by its name or one of its aliases.

    Raises:
        ValueError: no row has that name; the message lists near ones.
    """
    for row in METHODS.values():
        if name == row.name or name in row.aliases:
            return row
    from difflib import get_close_matches

    near = get_close_matches(name, METHODS, n=3) or list(METHODS)[:3]
    raise ValueError(f"no method is called {name!r}; near names: {', '.join(near)}")


def room_file(row: Method, room: str) -> Path | None:
    """The file that is a method's room, or None while it does not exist.

    A kernel lives under its engine's name, since one engine serves many methods.
    """
    if room == "kernel":
        # the op's own room must stand as well: an engine alone computes no method
        file = PACKAGE / "kernels" / f"{row.engine}.py" if row.engine and room_file(row, "op") else None
    else:
        folder = {"reference": "reference", "op": "ops", "layer": "layers", "model": "models"}[room]
        file = PACKAGE / folder / f"{row.name}.py"
    return file if file is not None and file.exists() else None


def names(room: str) -> list[str]:
    """Names of the methods whose room exists, in registry order."""
    return [name for name, row in METHODS.items() if room in row.rooms and room_file(row, room)]
