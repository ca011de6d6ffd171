"""Split MyST text into prose, code fences and directives."""

import re
from collections.abc import Iterator

import yaml

DIRECTIVE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|:{3,})\{(?P<name>[a-zA-Z:_-]+)\} *(?P<argument>.*)$")
CODE = re.compile(r"^ *(?P<marks>`{3,}|~{3,})(?!.*`)")


def split(lines: list[str]) -> Iterator[tuple]:
    """The parts of a text, in order.

    Yields ("prose", line), ("verbatim", fence) or ("directive", name, argument, options, body), where body
    is a list of lines that may hold directives in turn.

    Raises:
        ValueError: a fence is not closed.
    """
    i = 0
    while i < len(lines):
        fence = DIRECTIVE.match(lines[i]) or CODE.match(lines[i])
        if not fence:
            yield "prose", lines[i]
            i += 1
            continue
        end = _closing(lines, i, fence["marks"])
        if fence.re is CODE:
            yield "verbatim", "\n".join(lines[i : end + 1])
        else:
            body = [line.removeprefix(fence["indent"]) for line in lines[i + 1 : end]]
            yield "directive", fence["name"], fence["argument"].strip(), *_options(body)
        i = end + 1


def _closing(lines, start, marks):
    closing = re.compile(rf"^ *{re.escape(marks[0])}{{{len(marks)},}} *$")
    for i in range(start + 1, len(lines)):
        if closing.match(lines[i]):
            return i
    raise ValueError(f"this fence is not closed: {lines[start]}")


def _options(body):
    if body and body[0].strip() == "---":
        end = next(i for i, line in enumerate(body) if i and line.strip() == "---")
        return yaml.safe_load("\n".join(body[1:end])) or {}, body[end + 1 :]
    options = {}
    while body and (match := re.match(r"^:([\w-]+):\s*(.*)$", body[0])):
        options[match[1]] = match[2].strip().strip('"')
        body = body[1:]
    return options, body
