"""The files of the built site, a server for them, and a visit to one page."""

import os
import re
from functools import cache
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(os.environ.get("EFFATTN_SITE", ROOT / "_build" / "html"))
PYODIDE = Path(os.environ.get("EFFATTN_PYODIDE", ROOT.parent / "shared" / "pyodide"))
# sphinx-thebe declares it in two of its scripts; nothing depends on it
KNOWN = re.compile(r"Identifier 'THEBE_JS_URL' has already been declared")


def pages() -> list[str]:
    """Paths of all pages with content, relative to the site."""
    generated = {"index.html", "search.html", "genindex.html", "py-modindex.html", "prf-prf.html"}
    found = (p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
    return sorted(page for page in found if page not in generated and not page.startswith("_static/"))


def pages_with(mark: str) -> list[str]:
    """Those whose source has a piece of text."""
    return [page for page in pages() if mark in source(page)]


@cache
def source(page: str) -> str:
    """The HTML of a page."""
    return (SITE / page).read_text(encoding="utf-8")


@cache
def anchors(page: str) -> frozenset[str]:
    """All ids of a page."""
    return frozenset(re.findall(r'\sid="([^"]+)"', source(page)))


class Files(SimpleHTTPRequestHandler):
    """Files of the site; below /pyodide/ those of a Pyodide release."""

    def translate_path(self, path):
        if path.startswith("/pyodide/"):
            return str(PYODIDE / Path(path.split("?")[0]).name)
        return super().translate_path(path)

    def log_message(self, *args):
        pass


class Visit:
    """One open page, with what went wrong on it."""

    def __init__(self, page, address):
        self.page, self.address, self.errors, self.outside = page, address, [], []
        page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route(re.compile(rf"^(?!{address}|data:|blob:)"), self._refuse)

    def _refuse(self, route):
        self.outside.append(route.request.url)
        route.abort()

    def open(self, path):
        """Go to a page of the site and wait until its formulas stand."""
        self.page.goto(f"{self.address}/{path}")
        # not a promise that is awaited in the page: MathJax makes `startup` only when it has loaded
        self.page.wait_for_function(
            "!document.querySelector('.math') || globalThis.MathJax?.startup?.promise !== undefined"
        )
        self.page.evaluate("globalThis.MathJax?.startup?.promise")
        return self.page

    def check(self):
        """Nothing failed and nothing was asked for outside of the site."""
        assert self.outside == []
        assert [error for error in self.errors if not KNOWN.search(error)] == []
