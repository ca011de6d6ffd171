"""Put a function of the package, as it stands there, into the cell of a chapter that shows it."""

import ast
import re
from pathlib import Path

import yaml
from book_files import ROOT

CELL = re.compile(
    r"^```\{code-cell\}[^\n]*\n---\n(?P<options>.*?)^---\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
SOURCE = re.compile(r"(?P<module>[\w.]+):(?P<name>\w+)(?:\s+as\s+(?P<alias>\w+))?")


def fill_sources(text: str, path: Path) -> str:
    """Every cell with a `source:` option gets the functions that the option names."""
    renames = {}

    def fill(cell):
        named = yaml.safe_load(cell["options"]).get("source")
        if not named:
            return cell.group()
        shown = [_shown(entry, renames, path) for entry in ([named] if isinstance(named, str) else named)]
        start, end = (edge - cell.start() for edge in cell.span("body"))
        return cell.group()[:start] + "\n\n\n".join(shown) + "\n" + cell.group()[end:]

    return CELL.sub(fill, text)


def _shown(entry, renames, path):
    match = SOURCE.fullmatch(entry.strip())
    if match is None:
        raise ValueError(f"{path}: source {entry!r} is not `module:function` or `module:function as name`")
    module, name, alias = match["module"], match["name"], match["alias"]
    code = function_source(_module_file(module), name)
    if alias:
        renames[module, name] = alias
    # a sibling that was renamed earlier on the page is called by its new name
    for (home, old), new in renames.items():
        if home == module:
            code = re.sub(rf"(?<![\w.]){old}(?=\()", new, code)
    return code


def _module_file(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def function_source(file: Path, name: str) -> str:
    """A top-level function or constant of a file, without the docstring.

    Raises:
        ValueError: the file has no such name; the message lists those it has.
    """
    text = file.read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        for target in getattr(node, "targets", [node]):
            found[getattr(target, "id", getattr(target, "name", None))] = node
    node = found.get(name)
    if node is None:
        raise ValueError(f"{file.relative_to(ROOT)} has no {name}; it has {', '.join(filter(None, found))}")
    keep = lines[node.lineno - 1 : node.end_lineno]
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
        doc = node.body[0]
        del keep[doc.lineno - node.lineno : doc.end_lineno - node.lineno + 1]
    return "\n".join(keep)
