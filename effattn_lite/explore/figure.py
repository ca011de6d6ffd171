"""The frame of an interactive figure: one module text, shown by a page alone or by a live kernel.

A figure is a JavaScript file `<name>.js` in the anywidget form, `export default { render({ model, el }) }`,
written with the functions of `common.js` and `stage.js`, and a Python class that computes the state it
starts from.
"""

import json
import os
import re
from functools import cache
from html import escape
from importlib.resources import files
from itertools import count

import numpy as np

from effattn_lite.plotting import COLORS

__all__ = ["Explorable", "family_variable"]

_HERE = files("effattn_lite.explore")
_EXPORT = re.compile(r"^export default\b", re.MULTILINE)
_NUMBER = count(1)
_DARK_PAPER = "#14181e"

THEME = {
    "ink": ("#1b1f24", "#e6e9ed"),
    "muted": ("#57606a", "#a3adb8"),
    "line": ("#c6cdd5", "#454d58"),
    "paper": ("#ffffff", _DARK_PAPER),
    "panel": ("#f4f6f8", "#20262e"),
    "accent": ("#0a5c9c", "#6db3f2"),
    "second": ("#a84a0b", "#f0a45d"),
    "right": ("#1a7036", "#56d364"),
    "wrong": ("#b3261e", "#ff8a80"),
}
"""Colour of a part of a figure, on white and on dark; each ink has a contrast of at least 4.5 : 1."""


class Explorable:
    """An interactive figure; the last line of a cell shows it.

    A subclass names its module and describes it, and computes what it shows::

        class Decay(Explorable):
            name, alt = "decay", "Curves of what a head remembers, by its decay."

            def __init__(self, gamma=0.97):
                super().__init__(gamma=gamma, tokens=200)

    In Jupyter and Colab, with anywidget installed, the figure is a widget, so that Python can watch it:
    `figure.widget.observe(print, names="gamma")`. With the environment variable EFFATTN_LITE_STATIC set, or
    without anywidget, it is HTML that needs no server and no network.

    Attributes:
        name: stem of the JavaScript file in this folder.
        alt: what the figure shows, in words.
    """

    name = ""
    alt = ""

    def __init__(self, **state):
        self._state = {key: _plain(key, value) for key, value in state.items()}
        self._widget = None

    @property
    def state(self) -> dict:
        """What the figure shows at this moment: name -> JSON value."""
        if self._widget is None:
            return dict(self._state)
        return {key: getattr(self._widget, key) for key in self._state}

    @property
    def widget(self):
        """The figure as an anywidget, made at the first call.

        Raises:
            ImportError: anywidget is not installed.
        """
        if self._widget is None:
            self._widget = _widget_class(type(self), tuple(self._state))(**self._state)
        return self._widget

    def html(self) -> str:
        """The figure as HTML that stands alone: its state, its style and its module are inline."""
        mark = f"figure-{self.name}-{next(_NUMBER)}"
        state = json.dumps(self.state, separators=(",", ":")).replace("<", r"\u003c")
        script = f"{_module(self.name)}\ndrawFigure({json.dumps(mark)}, explorable);"
        script = script.replace("</script", r"<\/script")
        # the words stay where no script runs: on GitHub, in a notebook that is not trusted
        return (
            f'<div class="explorable" id="{mark}" role="group" aria-label="{escape(self.alt)}">\n'
            f"<style>{style_sheet()}</style>\n"
            f'<script type="application/json">{state}</script>\n'
            f'<div class="explorable-body"><p class="explorable-alt">{escape(self.alt)}</p>\n'
            '<p class="explorable-alt">This figure is interactive and needs JavaScript; '
            "in a notebook, run its cell.</p></div>\n"
            f'<script type="module">\n{script}\n</script>\n</div>'
        )

    def page(self) -> str:
        """A whole HTML page with this figure alone, to look at it or to hand it on."""
        return (
            '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
            f"<title>{escape(self.name)}</title>\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">'
            f"<style>body {{ margin: 16px }}</style></head>\n<body>\n{self.html()}\n</body>\n</html>\n"
        )

    def _repr_mimebundle_(self, include=None, exclude=None):
        bundle = {"text/plain": repr(self), "text/html": self.html()}
        if not _live():
            return bundle
        view = self.widget._repr_mimebundle_()
        # Colab finds its widget manager in the metadata
        view, metadata = view if isinstance(view, tuple) else (view, {})
        bundle = {**view, **bundle}
        return (bundle, metadata) if metadata else bundle

    def __repr__(self):
        return f"{type(self).__name__}: {self.alt}"


def family_variable(family: str) -> str:
    """The CSS variable that holds a family's colour: "delta rule" -> "--family-delta-rule"."""
    return "--family-" + re.sub(r"[^a-z0-9]+", "-", family)


@cache
def style_sheet() -> str:
    """The style of all figures: the theme and the families' colours, light and dark, then common.css."""
    light = {f"--figure-{part}": pair[0] for part, pair in THEME.items()}
    light |= {family_variable(family): color for family, color in COLORS.items()}
    dark = {f"--figure-{part}": pair[1] for part, pair in THEME.items()}
    dark |= {family_variable(family): _lighten(color) for family, color in COLORS.items()}
    light, dark = (";".join(f"{k}:{v}" for k, v in colors.items()) for colors in (light, dark))
    # a page that names its theme (this book, Jupyter, Colab) is believed, else the reader's system is
    named = ":is(html[data-theme=dark],html[theme=dark],body[data-jp-theme-light=false])"
    unnamed = "html:not([data-theme],[theme]) body:not([data-jp-theme-light])"
    return (
        f".explorable{{color-scheme:light;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{{unnamed} .explorable{{color-scheme:dark;{dark}}}}}\n"
        f"{named} .explorable{{color-scheme:dark;{dark}}}\n{_text('common.css')}"
    )


@cache
def _text(file):
    path = _HERE / file
    if not path.is_file():
        raise ValueError(f"a figure needs the file effattn_lite/explore/{file}, which does not exist")
    return path.read_text(encoding="utf-8")


@cache
def _module(name):
    text = _text(f"{name}.js")
    if len(_EXPORT.findall(text)) != 1:
        raise ValueError(
            f"effattn_lite/explore/{name}.js must have one line that starts with 'export default'"
        )
    return f"{_text('common.js')}\n{_text('stage.js')}\n{_EXPORT.sub('const explorable =', text)}"


@cache
def _widget_class(figure, keys):
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ImportError(
            "figure.widget needs anywidget: `pip install anywidget`, reload the notebook's page, run the cell"
        ) from error

    esm = f"{_module(figure.name)}\nexport default asWidget(explorable, {json.dumps(figure.alt)});\n"
    traits = {key: traitlets.Any().tag(sync=True) for key in keys}
    return type(
        f"{figure.__name__}Widget", (anywidget.AnyWidget,), {"_esm": esm, "_css": style_sheet(), **traits}
    )


def _live():
    if os.environ.get("EFFATTN_LITE_STATIC"):
        return False
    try:
        import anywidget  # noqa: F401
    except ImportError:
        return False
    return True


def _plain(key, value):
    """The value as JSON has it: arrays become lists; what JSON cannot hold is refused."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(key, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(key, v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        raise ValueError(f"state {key!r} holds {value}, which JSON cannot; use None or a large number")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"state {key!r} holds a {type(value).__name__}, expected numbers, strings, lists or arrays"
    )


def _lighten(color):
    """The colour mixed with white until it stands out from the dark paper by 4.6 : 1."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)
    for share in np.linspace(0, 0.8, 81):
        mixed = rgb + (255 - rgb) * share
        if contrast(mixed, [int(_DARK_PAPER[i : i + 2], 16) for i in (1, 3, 5)]) >= 4.6:
            break
    return "#" + "".join(f"{round(x):02x}" for x in mixed)


def contrast(a, b) -> float:
    """Contrast ratio of two sRGB colours with channels 0 to 255, between 1 and 21 (WCAG 2.2)."""

    def luminance(rgb):
        x = np.asarray(rgb, float) / 255
        x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        return x @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(a), luminance(b)))
    return float((high + 0.05) / (low + 0.05))
