"""Interactive figures: what they put into a page, into a notebook, and how Python watches them."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from effattn_lite import METHODS, explore
from effattn_lite.explore.figure import THEME, Explorable, contrast, family_variable, style_sheet
from effattn_lite.plotting import COLORS


class Small(Explorable):
    """A figure with the module of another, to try states on."""

    name, alt = "method_map", 'Says "<b>" & more.'


@pytest.fixture
def static(monkeypatch):
    monkeypatch.setenv("EFFATTN_LITE_STATIC", "1")


@pytest.fixture
def live(monkeypatch):
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    monkeypatch.delenv("EFFATTN_LITE_STATIC", raising=False)


@pytest.mark.parametrize("name", explore.__all__)
def test_every_figure_stands_alone(name, static):
    figure = getattr(explore, name)()
    bundle = figure._repr_mimebundle_()
    html = bundle["text/html"]
    assert set(bundle) == {"text/plain", "text/html"}
    assert len(figure.alt) > 20 and figure.alt.endswith("."), "alt is a sentence"
    assert set(re.findall(r"https?://[^\s\"'`]+", html)) <= {"http://www.w3.org/2000/svg"}, "needs a network"
    assert not re.search(r"^\s*(import|export)\b", html, re.MULTILINE)
    assert not re.search(r"(fill|stroke): *[\"']?#[0-9a-f]{3}", html), "a literal colour: dark pages need two"
    assert len(html) < 160_000


@pytest.mark.parametrize("name", explore.__all__)
def test_every_figure_is_a_widget_too(name, live):
    figure = getattr(explore, name)()
    assert "application/vnd.jupyter.widget-view+json" in figure._repr_mimebundle_()
    assert figure.widget._esm.count("export default") == 1
    assert figure.state == json.loads(json.dumps(figure.state))


def test_python_watches_a_live_figure(live):
    figure, seen = Small(gamma=0.5, age=3), []
    figure.widget.observe(lambda change: seen.append(change.new), names="gamma")
    figure.widget.gamma = 0.25
    assert seen == [0.25] and figure.state == {"gamma": 0.25, "age": 3}
    assert '"gamma":0.25' in figure.html()


def test_colab_gets_the_metadata_of_its_widget_manager(live, monkeypatch):
    figure, kind = Small(age=3), "application/vnd.jupyter.widget-view+json"
    view = ({kind: {"model_id": "1"}}, {kind: {"colab": {}}})
    monkeypatch.setattr(type(figure.widget), "_repr_mimebundle_", lambda self: view)
    bundle, metadata = figure._repr_mimebundle_()
    assert set(bundle) == {kind, "text/html", "text/plain"} and metadata == view[1]


def test_a_widget_without_anywidget_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    figure = Small(never_used_before=1)
    assert set(figure._repr_mimebundle_()) == {"text/plain", "text/html"}
    with pytest.raises(ImportError, match="pip install anywidget"):
        _ = figure.widget


def test_state_is_json_and_cannot_end_its_script():
    figure = Small(a=np.arange(3), b=np.float32(0.5), c=[(1, 2)], d={"x": None}, e="</script><b>")
    assert figure.state == {"a": [0, 1, 2], "b": 0.5, "c": [[1, 2]], "d": {"x": None}, "e": "</script><b>"}
    html = figure.html()
    assert html.count("</script>") == 2
    assert json.loads(re.search(r'json">(.*?)</script>', html).group(1)) == figure.state
    assert "Says &quot;&lt;b&gt;&quot; &amp; more." in html


@pytest.mark.parametrize(
    "value, error", [(np.nan, ValueError), ([np.inf], ValueError), (object(), TypeError)]
)
def test_state_that_json_cannot_hold_is_refused(value, error):
    with pytest.raises(error, match="state 'a' holds"):
        Small(a=value)


def test_two_figures_of_a_page_have_two_ids():
    first, second = (re.search(r'id="([^"]+)"', Small().html()).group(1) for _ in range(2))
    assert first != second


def test_colours_stand_out():
    def rgb(color):
        return [int(color[i : i + 2], 16) for i in (1, 3, 5)]

    for theme in (0, 1):
        for part in ("ink", "muted", "accent", "second", "right", "wrong"):
            for ground in ("paper", "panel"):
                assert contrast(rgb(THEME[part][theme]), rgb(THEME[ground][theme])) >= 4.5, (
                    part,
                    ground,
                    theme,
                )
    for family in COLORS:
        light, *dark = re.findall(rf"{family_variable(family)}:(#[0-9a-f]{{6}})", style_sheet())
        assert contrast(rgb(light), rgb(THEME["paper"][0])) >= 3
        assert len(dark) == 2 and contrast(rgb(dark[0]), rgb(THEME["paper"][1])) >= 4.5
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)


def test_importing_figures_loads_numpy_alone():
    code = (
        "import sys, effattn_lite.explore as e; [getattr(e, n) for n in e.__all__];"
        "print([m for m in ('torch', 'triton', 'matplotlib', 'anywidget', 'IPython') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_method_map_links_what_there_is_to_read():
    state = explore.MethodMap(base="../", chapters=["linear/gates"]).state
    assert [m["name"] for m in state["methods"]] == list(METHODS)
    pages = {m["name"]: m["page"] for m in state["methods"] if m["page"]}
    assert pages["hgrn2"] == "../linear/gates.html#hgrn2"
    assert set(pages) == {name for name, row in METHODS.items() if row.chapter == "linear/gates"}


def test_unknown_figures_are_named_with_those_there_are():
    with pytest.raises(AttributeError, match="MethodMap"):
        _ = explore.NoSuchFigure
