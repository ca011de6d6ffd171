"""The map of all methods of the registry, each a link to the chapter that derives it."""

from effattn_lite.explore.figure import Explorable
from effattn_lite.registry import METHODS, PACKAGE, ROOMS, room_file

_TOC = PACKAGE.parent / "_toc.yml"


class MethodMap(Explorable):
    """All methods by family, with their rooms; lines join a method to its exact limits.

    Args:
        base: what stands before a chapter's path in a link: "" from the book's front page, "../" from a
            chapter, an address from elsewhere.
        chapters: paths of the chapters that exist, "linear/gates"; default those of the table of contents.
    """

    name = "method_map"
    alt = f"Map of {len(METHODS)} methods by family; each is a link to its chapter."

    def __init__(self, base="", chapters=None):
        toc = _TOC.read_text(encoding="utf-8") if _TOC.is_file() else ""
        methods = []
        for row in METHODS.values():
            there = f"book/{row.chapter}.md" in toc if chapters is None else row.chapter in chapters
            page = f"{base}{row.chapter}.html#{row.name.replace('_', '-')}"
            methods.append(
                {
                    "name": row.name,
                    "title": row.title,
                    "family": row.family,
                    "survey": row.survey,
                    "rooms": [[r, room_file(row, r) is not None] for r in ROOMS if r in row.rooms],
                    "page": page if there else None,
                    "limits": [list(limit) for limit in row.reduces_to.items()],
                    "aliases": " ".join(row.aliases),
                }
            )
        super().__init__(methods=methods, shown="", find="", lines=True)
