"""The small modules: notation, recorded data, colours; and what importing the package costs."""

import json
import subprocess
import sys

import pytest

from effattn_lite import METHODS, data, notation, plotting
from effattn_lite.registry import FAMILIES, names

LIGHT = """
import sys, time
start = time.perf_counter()
import effattn_lite
spent = time.perf_counter() - start
import effattn_lite.testing, effattn_lite.data, effattn_lite.plotting
print([name for name in ("torch", "triton", "matplotlib") if name in sys.modules], spent)
"""


def test_importing_loads_neither_torch_nor_triton():
    run = subprocess.run([sys.executable, "-c", LIGHT], check=True, capture_output=True, text=True)
    assert run.stdout.startswith("[] "), run.stdout


def test_tensors_are_written_in_known_axes():
    for name, (meaning, shape) in notation.TENSORS.items():
        assert meaning, name
        for axes in (part for part in shape.split("[")[1:]):
            assert set(axes.split("]")[0].split(", ")) <= set(notation.AXES), name


def test_every_family_has_a_colour_of_its_own():
    assert set(plotting.COLORS) == set(FAMILIES)
    assert len(set(plotting.COLORS.values())) == len(FAMILIES)
    assert all(plotting.color(name) for name in METHODS)


def test_style_is_set():
    mpl = pytest.importorskip("matplotlib")
    with mpl.rc_context():
        plotting.style()
        assert mpl.rcParams["figure.figsize"] == [6.8, 3.6]


def test_unknown_data_is_met_with_what_there_is():
    with pytest.raises(ValueError, match="no data called 'nothing'"):
        data.load("nothing")
    with pytest.raises(ValueError, match="no recorded result called 'nothing'"):
        data.results("nothing")


def test_results_are_read(monkeypatch, tmp_path):
    (tmp_path / "retnet.json").write_text(json.dumps({"name": "retnet"}))
    monkeypatch.setattr(data, "_results", lambda: tmp_path)
    assert data.names() == ["retnet"] and data.results("retnet") == {"name": "retnet"}


def test_every_op_is_exported():
    """`effattn_lite.ops.<name>` is the function, also after the module of that name was imported."""
    import importlib

    import effattn_lite.ops

    for name in names("op"):
        importlib.import_module(f"effattn_lite.ops.{name}")
        assert callable(getattr(effattn_lite.ops, name)), name
