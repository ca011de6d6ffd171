"""What each label of a chapter is called where it is referred to: "(2)", "Figure 1", "Exercise 3"."""

import re

import myst_fences

TARGET = re.compile(r"^\((?P<label>[^()\s]+)\)=\s*$")
MATH_LABEL = re.compile(r"\$\$ *\((?P<label>[\w:.-]+)\) *$", re.MULTILINE)
VERBATIM = ("math", "code", "code-block", "raw", "literalinclude")


class Labels(dict):
    """Label -> name, counted over the Markdown cells of a chapter."""

    def __init__(self, cells: list[str]):
        super().__init__()
        self._counts = {}
        for cell in cells:
            self._collect(cell.splitlines())

    def number(self, label: str) -> str:
        """The bare number of an equation or figure."""
        return self[label].strip("()").rsplit(" ", 1)[-1]

    def _collect(self, lines):
        pending = None
        for kind, *part in myst_fences.split(lines):
            if kind == "directive":
                self._directive(*part)
            elif kind == "prose" and (target := TARGET.match(part[0])):
                pending = target["label"]
                self[pending] = pending
            elif kind == "prose":
                if pending and part[0].startswith("#"):
                    self[pending], pending = re.sub(r"[*`]", "", part[0].lstrip("# ")), None
                for match in MATH_LABEL.finditer(part[0]):
                    self[match["label"]] = f"({self._next('equation')})"

    def _directive(self, name, argument, options, body):
        label = options.get("label") or options.get("name")
        if label and name == "math":
            self[label] = f"({self._next('equation')})"
        elif label and name == "figure":
            self[label] = f"Figure {self._next('figure')}"
        elif name in ("exercise", "exercise-start"):
            self[label] = f"Exercise {self._next('exercise')}"
        elif label and name.startswith("prf:"):
            self[label] = name[4:].capitalize() + (f" ({argument})" if argument else "")
        elif label:
            self[label] = argument or label
        if name not in VERBATIM:
            self._collect(body)

    def _next(self, kind):
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind]
