"""MyST directives as plain Markdown: what a reader of the notebook in Colab or on GitHub sees.

A directive without a rule here is an error, so that no reader meets a raw fence.
"""

import re
from pathlib import Path
from textwrap import dedent

import myst_fences
from book_files import ROOT, SITE
from notebook_inline import Inline
from notebook_labels import MATH_LABEL, TARGET, Labels

ADMONITIONS = (
    "note",
    "tip",
    "hint",
    "important",
    "warning",
    "caution",
    "danger",
    "attention",
    "error",
    "seealso",
)
BOXES = (
    "margin",
    "sidebar",
    "epigraph",
    "card",
    "grid",
    "grid-item",
    "grid-item-card",
    "tab-set",
    "tab-item",
)
SILENT = ("bibliography", "contents", "tableofcontents", "index", "exercise-end")
# where a gated solution begins and ends in a rewritten cell; neither can stand in a chapter
OPEN, CLOSE = "\ue000", "\ue001"


class Rewriter:
    """Rewrites the Markdown cells of one chapter, in order.

    Attributes:
        in_solution: the next cell lies inside a gated solution.
    """

    def __init__(self, path: Path, cells: list[str]):
        self.path, self.in_solution, self._solution = path, False, ""
        self.labels = Labels(cells)
        self._inline = Inline(path, self.labels)

    def rewrite(self, text: str) -> str:
        """One Markdown cell, with every directive, role and label in plain Markdown."""
        body = self._solution + self._blocks(text) if self.in_solution else self._blocks(text)
        # a cell is rendered alone, so a solution that holds code cells is folded piece by piece
        solution = re.compile(rf"{OPEN}(?P<title>[^\n]*)\n(?P<body>[^{OPEN}{CLOSE}]*){CLOSE}?")
        body = solution.sub(lambda m: _details(m["title"], m["body"]) if m["body"].strip() else "", body)
        return re.sub(r"\n{3,}", "\n\n", body.replace(CLOSE, "")).strip()

    def finish(self) -> None:
        """Complain if the last solution was not closed."""
        if self.in_solution:
            raise ValueError(f"{self.path}: the last solution has no {{solution-end}}")

    def _blocks(self, text):
        done, prose = [], []

        def flush():
            done.append(self._prose("\n".join(prose)))
            prose.clear()

        for kind, *part in myst_fences.split(text.splitlines()):
            if kind == "prose":
                if not (TARGET.match(part[0]) or part[0].startswith("% ") or part[0].strip() in ("%", "+++")):
                    prose.append(part[0])
                continue
            flush()
            done.append(part[0] if kind == "verbatim" else self._directive(*part))
        flush()
        return "\n\n".join(block for block in done if block.strip())

    def _prose(self, text):
        text = MATH_LABEL.sub(lambda m: rf"\tag{{{self.labels.number(m['label'])}}} $$", text)
        # formulas are left alone: a role or a link never stands inside one
        pieces = re.split(r"(\$\$.*?\$\$|(?<![\\`$])\$(?!\s)[^$\n]+\$)", text, flags=re.DOTALL)
        marked = "".join(f"\ue002{i}\ue002" if i % 2 else piece for i, piece in enumerate(pieces))
        return re.sub("\ue002(\\d+)\ue002", lambda m: pieces[int(m[1])], self._inline.rewrite(marked)).strip(
            "\n"
        )

    def _directive(self, name, argument, options, body):
        inner = "\n".join(body)
        if name in SILENT:
            return ""
        if name in ADMONITIONS:
            title = name.replace("seealso", "see also").capitalize()
            return self._box(title, f"{argument}\n{inner}")
        if name.startswith("prf:"):
            return self._box(name[4:].capitalize(), inner, f" ({self._prose(argument)})" if argument else "")
        if name in BOXES:
            title = f"**{self._prose(argument)}**\n\n" if argument and name != "grid" else ""
            return title + self._blocks(inner)
        rule = getattr(self, f"_on_{name.replace('-', '_')}", None)
        if rule is None:
            raise ValueError(f"{self.path}: no rule for the directive {{{name}}}")
        return rule(argument, options, inner)

    def _box(self, title, inner, after=""):
        text = f"**{self._prose(title)}**{after}\n\n{self._blocks(inner)}"
        return "\n".join(f"> {line}".rstrip() for line in text.splitlines())

    def _on_admonition(self, argument, options, inner):
        return self._box(argument, inner)

    def _on_exercise(self, argument, options, inner):
        title = f": {self._prose(argument.removeprefix('(').removesuffix(')'))}" if argument else ""
        return f"### {self.labels[options['label']]}{title}\n\n{self._blocks(inner)}".strip()

    _on_exercise_start = _on_exercise

    def _on_solution(self, argument, options, inner):
        return _details(self._solves(argument), self._blocks(inner))

    def _on_solution_start(self, argument, options, inner):
        self.in_solution, self._solution = True, f"{OPEN}{self._solves(argument)}, continued\n"
        return f"{OPEN}{self._solves(argument)}"

    def _on_solution_end(self, argument, options, inner):
        self.in_solution = False
        return CLOSE

    def _solves(self, label):
        if label not in self.labels:
            raise ValueError(f"{self.path}: a solution of {label!r}, which is no exercise of this chapter")
        return f"Solution of {self.labels[label].lower()}"

    def _on_dropdown(self, argument, options, inner):
        return _details(self._prose(argument), self._blocks(inner))

    def _on_math(self, argument, options, inner):
        label = options.get("label")
        tag = rf" \tag{{{self.labels.number(label)}}}" if label else ""
        return f"$$\n{argument}{inner.strip()}{tag}\n$$"

    def _on_figure(self, argument, options, inner):
        name = self.labels.get(options.get("name"))
        caption = f"*{name}.* {self._blocks(inner)}" if name else self._blocks(inner)
        picture = f"![{options.get('alt', '')}]({self._inline.address(argument, raw=True)})"
        return f"{picture}\n\n{caption}".strip()

    def _on_image(self, argument, options, inner):
        return self._on_figure(argument, options, "")

    def _on_literalinclude(self, argument, options, inner):
        path = (self.path.parent / argument).resolve()
        lines = path.read_text(encoding="utf-8").splitlines()
        first = self._line_with(options.get("start-after"), lines, path, 0, default=-1) + 1
        first = self._line_with(options.get("start-at"), lines, path, first, default=first)
        last = self._line_with(options.get("end-before"), lines, path, first, default=len(lines))
        last = self._line_with(options.get("end-at"), lines, path, first, default=last - 1) + 1
        code = dedent("\n".join(lines[first:last])).strip("\n")
        link = f"From [{path.relative_to(ROOT).as_posix()}]({SITE.source(path)}):"
        return f"{link}\n\n```{options.get('language', 'python')}\n{code}\n```"

    def _line_with(self, mark, lines, path, first, default):
        if not mark:
            return default
        found = [i for i in range(first, len(lines)) if mark in lines[i]]
        if not found:
            raise ValueError(f"{self.path}: {path.name} has no line with {mark!r}")
        return found[0]

    def _on_include(self, argument, options, inner):
        path = (self.path.parent / argument).resolve()
        text = path.read_text(encoding="utf-8")
        return Rewriter(path, [text]).rewrite(text)

    def _on_code_block(self, argument, options, inner):
        return f"```{argument}\n{inner}\n```"

    _on_code = _on_code_block

    def _on_raw(self, argument, options, inner):
        return inner if argument == "html" else ""

    def _on_table(self, argument, options, inner):
        title = f"**{self._prose(argument)}**\n\n" if argument else ""
        return title + self._blocks(inner)

    def _on_list_table(self, argument, options, inner):
        rows = []
        for line in inner.splitlines():
            cell = re.match(r"^(?P<row>\* - |  - )(?P<text>.*)$", line)
            if cell and cell["row"] == "* - ":
                rows.append([])
            if cell:
                rows[-1].append(cell["text"])
            elif line.strip():
                rows[-1][-1] += f" {line.strip()}"
        rows.insert(1, ["---"] * len(rows[0]))
        return self._on_table(argument, options, "\n".join(f"| {' | '.join(row)} |" for row in rows))


def _details(summary, body):
    return f"<details>\n<summary><b>{summary}</b></summary>\n\n{body.strip()}\n\n</details>"
