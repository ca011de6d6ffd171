"""Runs the live cells of a page: one namespace, output as it is made, tracebacks of the reader's lines."""

import io
import linecache
import os
import sys
import traceback
import warnings

from pyodide.code import eval_code

NAMESPACE = {"__name__": "__main__"}
_emit = None


class Stream(io.TextIOBase):
    """What is printed goes to the page at once."""

    def write(self, words):
        """Send words; returns their number."""
        if words:
            _emit({"type": "stream", "words": str(words)})
        return len(words)


def start(arrays, emit):
    """Take the address of the data files and the function that shows an output; called once."""
    global _emit
    _emit = emit
    sys.stdout = sys.stderr = Stream()
    os.environ["MPLBACKEND"] = "agg"
    os.environ["EFFATTN_LITE_STATIC"] = "1"
    warnings.filterwarnings("ignore", message=".*non-interactive.*")
    NAMESPACE["display"] = display
    _fetch_arrays(arrays)


def run(code, name):
    """Run one cell; whether it ended without an exception."""
    linecache.cache[name] = (len(code), None, [line + "\n" for line in code.split("\n")], name)
    try:
        value = eval_code(code, globals=NAMESPACE, filename=name)
        _show_plots()
        if value is not None and not _is_artist(value):
            show(value)
        return True
    except BaseException as error:
        _emit({"type": "error", "words": _short(error)})
        return False
    finally:
        _close_plots()


def plots():
    """Set the book's style; called when Matplotlib has come after the first cell."""
    from effattn_lite import plotting

    plotting.style()


def display(*values):
    """What a notebook calls by this name."""
    for value in values:
        show(value)


def show(value):
    """Show a value as a notebook does: HTML where it has some, else its repr."""
    bundle = value._repr_mimebundle_() if hasattr(value, "_repr_mimebundle_") else {}
    html = bundle.get("text/html") or (value._repr_html_() if hasattr(value, "_repr_html_") else None)
    _emit({"type": "html", "html": html} if html else {"type": "value", "words": repr(value)})


def _is_artist(value):
    # the lines that a plotting call returns are of no use below the plot
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(type(item).__module__.startswith("matplotlib") for item in items)


def _show_plots():
    plt = sys.modules.get("matplotlib.pyplot")
    for number in plt.get_fignums() if plt else ():
        picture = io.StringIO()
        plt.figure(number).savefig(picture, format="svg")
        _emit({"type": "image", "words": picture.getvalue()})


def _close_plots():
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def _short(error):
    """The traceback without the frames of libraries."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith("<cell")]
    head = ["Traceback, your lines only:\n", *traceback.format_list(frames)] if frames else []
    return "".join([*head, *traceback.format_exception_only(error)]).rstrip()


def _fetch_arrays(base):
    """Let `data.load` fetch a file from the site when it is first asked for."""
    from js import XMLHttpRequest

    from effattn_lite import data

    load = data.load

    def load_or_fetch(name):
        path = data._HERE / f"{name}.npz"
        if not path.is_file():
            request = XMLHttpRequest.new()
            request.open("GET", f"{base}{name}.npz", False)
            request.responseType = "arraybuffer"
            request.send()
            if request.status == 200:
                path.write_bytes(request.response.to_py().tobytes())
        return load(name)

    data.load = load_or_fetch
