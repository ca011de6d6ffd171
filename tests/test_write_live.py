"""The package that the page's own Python loads: small, the same each time, in need of NumPy alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "write_live.py"
BLOCK = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'matplotlib', 'anywidget', 'IPython')))"
)
if not TOOL.exists():
    pytest.skip("an installed package has no tools", allow_module_level=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    first, second = (tmp_path_factory.mktemp("live") for _ in range(2))
    for folder in (first, second):
        subprocess.run([sys.executable, TOOL, folder], check=True, capture_output=True)
    file = first / "effattn_lite.zip"
    assert file.read_bytes() == (second / file.name).read_bytes(), "the archive differs from run to run"
    return file


def test_it_is_small_and_has_no_kernels(archive):
    names = zipfile.ZipFile(archive).namelist()
    assert archive.stat().st_size < 1_000_000
    assert not [name for name in names if "/ops/" in name or "/kernels/" in name or name.endswith(".npz")]
    assert "effattn_lite/explore/common.js" in names and "effattn_lite/registry/row.py" in names


def test_every_module_imports_with_numpy_alone(archive, tmp_path):
    zipfile.ZipFile(archive).extractall(tmp_path)
    modules = sorted(
        path.relative_to(tmp_path).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in tmp_path.rglob("*.py")
    )
    code = f"{BLOCK}; sys.path.insert(0, {str(tmp_path)!r})\nimport importlib\n"
    code += (
        f"for m in {modules}: importlib.import_module(m)\nimport effattn_lite; print(effattn_lite.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
