"""Sphinx extension: "Cost:" and "Source:" of a docstring become fields, as "Args:" and "Returns:" do."""

import re

FIELD = re.compile(r"^(?P<name>Cost|Source|Notation): (?P<text>.*)$")


def rewrite(lines: list[str]) -> list[str]:
    """The lines of a docstring, each paragraph that begins with a field's name as a field."""
    out, inside = [], False
    for line in lines:
        field = FIELD.match(line)
        if field:
            out += [] if inside or not out or not out[-1] else [""]
            out.append(f":{field['name']}: {field['text']}")
            inside = True
        elif inside and line.strip():
            out.append(f"    {line.strip()}")
        else:
            inside = False
            out.append(line)
    return out


def process(app, what, name, obj, options, lines):
    """Handler of autodoc-process-docstring."""
    lines[:] = rewrite(lines)


def setup(app):
    """Called by Sphinx; runs before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"version": "1", "parallel_read_safe": True}
