"""Every page: no error, nothing from outside, formulas set, links alive, accessible, fits a phone."""

from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from built_site import SITE, anchors


def test_page_is_sound(visit, page_path):
    page = visit.open(page_path)
    unset = "m => m.filter(n => !n.querySelector('mjx-container')).map(n => n.innerText)"
    assert page.eval_on_selector_all(".math", unset) == [], "formulas that are not typeset"
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert page.locator("img:not([alt]), img[alt='']").count() == 0, "images without words"
    assert _dead_links(page, visit.address) == []
    visit.check()


# one coloured word of each kind stands for all, and a letter for a formula: axe looks at every element
THIN = """() => {
  const seen = new Set();
  document.querySelectorAll(".highlight pre span").forEach((n) => {
    if (seen.has(n.className)) n.replaceWith(...n.childNodes);
    seen.add(n.className);
  });
  document.querySelectorAll("mjx-container").forEach((n) => n.replaceWith("x"));
}"""
AXE = """only => axe.run({ exclude: ["mjx-container"] }, { resultTypes: ["violations"], ...only })
  .then((done) => done.violations.filter((v) => ["serious", "critical"].includes(v.impact))
  .map((v) => [v.id, v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200) + n.failureSummary)]))"""


def test_page_is_accessible(visit, page_path):
    page = visit.open(page_path)
    page.evaluate(THIN)
    page.add_script_tag(path=_axe())
    page.add_style_tag(content="* { transition: none !important }")
    # a dark page differs from a light one in its colours alone
    rules = {"light": {}, "dark": {"runOnly": {"type": "rule", "values": ["color-contrast"]}}}
    for theme, only in rules.items():
        page.evaluate(
            "theme => Object.assign(document.documentElement.dataset, { theme, mode: theme })", theme
        )
        page.wait_for_timeout(100)
        assert page.evaluate(AXE, only) == [], theme


def test_page_fits_a_phone(visit, page_path):
    visit.page.set_viewport_size({"width": 390, "height": 844})
    page = visit.open(page_path)
    too_wide = page.evaluate(
        "[...document.querySelectorAll('.bd-article *')]"
        ".filter(n => n.getBoundingClientRect().right > innerWidth + 1 &&"
        " !n.closest('pre, div.math, mjx-container, .pst-scrollable-table-container, table, textarea, svg'))"
        ".slice(0, 3).map(n => n.outerHTML.slice(0, 120))"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, too_wide
    assert too_wide == []


def _dead_links(page, address):
    dead = []
    here = frozenset(page.evaluate("[...document.querySelectorAll('[id]')].map(n => n.id)"))
    for link in set(page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")):
        if not link.startswith(address):
            continue
        parts = urlsplit(link)
        target = unquote(parts.path).lstrip("/") or "index.html"
        if not (SITE / target).is_file():
            dead.append(link)
        elif parts.fragment and target.endswith(".html"):
            there = here if link.split("#")[0] == page.url.split("#")[0] else anchors(target)
            if unquote(parts.fragment) not in there:
                dead.append(link)
    return dead


def _axe():
    spec = find_spec("axe_playwright_python")
    if spec is None:
        pytest.skip("axe-playwright-python is not installed")
    return Path(spec.origin).with_name("axe.min.js")
