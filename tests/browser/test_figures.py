"""Every interactive figure answers to the mouse and to the keyboard, and says what it shows."""

import pytest

from effattn_lite import explore
from effattn_lite.explore import DecayClocks

CONTROLS = "input, select, button, [role=slider][tabindex], [role=button][tabindex]"
# what a figure shows, without its controls
SHOWN = (
    "figure => [...figure.querySelectorAll('svg, .explorable-readout, canvas')]"
    ".map(n => n.tagName === 'CANVAS' ? n.toDataURL() : n.outerHTML).join()"
)
NAME = "n => `${n.type ?? n.tagName} ${n.ariaLabel || n.closest('label')?.innerText || n.textContent}`"


# what anywidget does with a module: render into an element, tell of changes, clean up in the end
AS_WIDGET = """async ([text, state]) => {
  const module = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  const { default: widget } = await import(module);
  const heard = new Set(), el = document.body.appendChild(document.createElement("div"));
  const model = {
    get: (key) => state[key],
    set(key, value) { state[key] = value; heard.forEach((f) => f()); },
    save_changes() {},
    on: (event, f) => heard.add(f), off: (event, f) => heard.delete(f),
  };
  const cleanup = await widget.render({ model, el });
  const drawn = el.querySelectorAll("svg *, .explorable-readout").length;
  cleanup();
  return { drawn, styled: el.classList.contains("explorable"), left: el.childNodes.length + heard.size };
}"""


@pytest.mark.parametrize("name", explore.__all__)
def test_figure_is_a_widget(browser, name):
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    figure, page = getattr(explore, name)(), browser.new_page()
    done = page.evaluate(AS_WIDGET, [figure.widget._esm, figure.state])
    page.close()
    assert done["drawn"] > 5 and done["styled"] and done["left"] == 0, done


def test_python_sets_a_value_between_the_steps_of_a_slider(browser):
    page = browser.new_page()
    page.set_content(DecayClocks(age=100).page().replace('"age":100', '"age":50'))
    slider = page.locator("input[type=range]").first
    assert slider.get_attribute("aria-valuetext") == "50" and int(slider.input_value()) > 20
    page.close()


# a notebook's front end listens at the document: A inserts a cell, the arrows move between cells
HEARD = """() => {
  window.heard = [];
  document.addEventListener("keydown", event => heard.push(event.key));
}"""


@pytest.mark.parametrize("name", explore.__all__)
def test_notebook_does_not_hear_the_keys_of_a_figure(browser, name):
    page = browser.new_page()
    page.set_content(getattr(explore, name)().page())
    page.evaluate(HEARD)
    for node in page.locator(".explorable").locator(CONTROLS).all():
        if node.is_enabled():
            node.press("ArrowDown")
            node.press("a")
    assert page.evaluate("heard") == []
    page.locator(".explorable").locator(CONTROLS).first.press("Escape")
    assert page.evaluate("heard") == ["Escape"]
    page.close()


@pytest.mark.parametrize("name", explore.__all__)
def test_figure_works_in_a_sandbox(browser, name):
    """Colab shows HTML in a frame of no origin: no storage, no cookies, no parent."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_content("<!doctype html>")
    page.evaluate(
        "html => document.body.append(Object.assign(document.createElement('iframe'),"
        "{ sandbox: 'allow-scripts', srcdoc: html, width: 720, height: 900 }))",
        getattr(explore, name)().html(),
    )
    figure = page.frame_locator("iframe").locator(".explorable[data-drawn]")
    assert _answers(page, figure, figure.locator(CONTROLS).first)
    assert errors == []
    page.close()


def test_figure_without_scripts_is_its_words(browser):
    page = browser.new_page(java_script_enabled=False)
    figure = DecayClocks()
    page.set_content(figure.page())
    words = page.locator("body").inner_text()
    page.close()
    assert figure.alt in words and "needs JavaScript" in words and len(words) < len(figure.alt) + 120


@pytest.mark.parametrize("base, linked", [("../", False), ("https://book.example/", True)])
def test_map_outside_the_book_links_only_whole_addresses(browser, base, linked):
    page = browser.new_page()
    page.set_content(explore.MethodMap(base=base, chapters=["linear/fixed_decay"]).page())
    links = page.locator(".explorable a[href]")
    assert (links.count() > 0) == linked
    assert not linked or links.first.get_attribute("target") == "_blank"
    page.close()


@pytest.mark.having('class="explorable"')
def test_figure_answers(visit, page_path):
    page = visit.open(page_path)
    alone = page.evaluate(
        "path => fetch(path).then(r => r.text()).then(t => [...new DOMParser()"
        ".parseFromString(t, 'text/html')"
        ".querySelectorAll('.explorable[id]')].map(n => n.outerHTML))",
        f"/{page_path}",
    )
    silent = []
    for figure in page.locator(".explorable[id]").all():
        assert figure.get_attribute("data-drawn") == "", "the figure did not draw"
        assert figure.get_attribute("aria-label")
        assert figure.locator("[aria-live], [role=status]").count(), "no read-out in words"
        silent.append(_silent(page, figure))
    visit.check()
    # a control may have nothing to do where others were left: then it is tried in a fresh figure
    for html, kept in zip(alone, silent, strict=True):
        assert [name for i, name in kept.items() if not _answers_alone(page, html, i)] == []


def _silent(page, figure):
    """Number -> name of the controls that change nothing, each tried after those before it."""
    nodes = figure.locator(CONTROLS).all()
    assert nodes, "a figure without controls"
    usable = [(i, node) for i, node in enumerate(nodes) if node.is_visible() and node.is_enabled()]
    return {i: node.evaluate(NAME) for i, node in usable if not _answers(page, figure, node)}


def _answers_alone(page, html, i):
    """The same in a figure by itself: as it starts, else with all its sliders at their ends."""
    page.set_content(html)
    figure = page.locator(".explorable[id]")
    control = figure.locator(CONTROLS).nth(i)
    if _answers(page, figure, control):
        return True
    for slider in figure.locator("input[type=range]").all():
        slider.press("End")
    return _answers(page, figure, control)


def _answers(page, figure, node):
    """Whether using a control, by keyboard and for sliders also by mouse, changes what the figure shows."""
    kind = node.evaluate("n => n.matches('input') ? n.type : n.tagName.toLowerCase()")
    ways = [KEYS.get(kind, _arrows)(node)]
    if kind == "range":
        ways.append(_press_along(node))
    return all(any(_changes(page, figure, act) for act in way) for way in ways)


def _changes(page, figure, act):
    before = figure.evaluate(SHOWN)
    act()
    for _ in range(8):
        if figure.evaluate(SHOWN) != before:
            return True
        page.wait_for_timeout(30)
    return False


def _arrows(node):
    return [lambda key=key: node.press(key) for key in ("ArrowRight", "ArrowLeft", "ArrowUp", "End", "Home")]


def _press_along(node):
    box = node.bounding_box()
    return [
        lambda share=share: node.click(position={"x": box["width"] * share, "y": box["height"] / 2})
        for share in (0.25, 0.75)
    ]


KEYS = {
    "checkbox": lambda node: [lambda: node.press("Space")] * 2,
    "select": lambda node: [lambda: node.press("ArrowDown"), lambda: node.press("ArrowUp")],
    "button": lambda node: [lambda: node.is_enabled() and node.press("Enter")] * 2,
    "search": lambda node: [lambda: node.press_sequentially("mamba")],
}
