"""The layout check finds what it is there to find."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "check_layout.py"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("check_layout", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "effattn_lite")
    return module


@pytest.mark.parametrize(
    "file, text, finding",
    [
        ("kernels/decay.py", "from effattn_lite.layers import retnet", "kernels imports layers"),
        ("kernels/decay.py", "def _f():\n    import effattn_lite.testing", "oracle must be independent"),
        ("ops/retnet.py", "from effattn_lite import reference", "oracle must be independent"),
        ("ops/rwkv5.py", "from effattn_lite.ops import retnet", "imports its sibling retnet"),
        ("ops/rwkv5.py", "from effattn_lite.ops.retnet import retnet", "imports its sibling retnet"),
        ("reference/retnet.py", "def f():\n    '''Say.'''\n    import torch", "imports numpy alone"),
        ("reference/rwkv5.py", "from effattn_lite.reference import retnet", "imports numpy alone"),
        ("plotting.py", "import matplotlib", "where only NumPy may be"),
        ("ops/retnet.py", "def retnet(q): return q", "no docstring"),
        ("layers/retnet.py", "class R:\n    def step(self): return 1", "no docstring"),
        ("ops/retnet.py", "def _long():\n" + "    x = 1\n" * 60, "has 60 lines, at most 50"),
        ("ops/retnet.py", "x = 1\n" * 301, "301 lines, at most 300"),
        ("ops/utils.py", "", "a name of its own"),
        ("helpers/retnet.py", "", "no room of the package"),
    ],
)
def test_a_wrong_file_is_found(tool, file, text, finding):
    path = tool.PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = list(tool.check_file(path))
    assert len(found) == 1 and finding in found[0] and file in found[0]


@pytest.mark.parametrize(
    "file, text",
    [
        ("ops/retnet.py", "def retnet(q):\n    '''Say.'''\n    from effattn_lite.kernels import decay"),
        ("ops/rwkv5.py", "from effattn_lite.ops.engines.decay import decay"),
        ("kernels/decay.py", "@triton.jit\ndef _long():\n" + "    x = 1\n" * 100),
        ("plotting.py", "def _f():\n    import matplotlib"),
    ],
)
def test_a_right_file_is_not(tool, file, text):
    path = tool.PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert not list(tool.check_file(path))


def test_an_unregistered_file_and_a_missing_limit_are_found(tool):
    for file in ("reference/novelty.py", "reference/rwkv5.py", "kernels/novelty.py", "ops/engines/decay.py"):
        path = tool.PACKAGE / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert [line.split(":")[0] for line in tool.check_names()] == [
        "effattn_lite/reference/novelty.py",
        "effattn_lite/kernels/novelty.py",
    ]
    assert "no test_reduces_to_lightning_attention" in next(iter(tool.check_limits()))


def test_this_tree_has_no_findings(capsys):
    spec = importlib.util.spec_from_file_location("check_layout", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() == 0, capsys.readouterr().out
