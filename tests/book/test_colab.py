"""Run notebooks as Colab would: an empty folder, no package, only what Colab has installed.

The environment offers numpy, torch, triton, matplotlib and ipywidgets, but neither the package nor
anywidget; the notebook's own first cell installs them, from a clone of this checkout instead of the address.
One notebook a part; with EFFATTN_LITE_REHEARSE=all in the environment, every one.
"""

import json
import os
import re
import shutil
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import nbformat
import pytest
from book_files import ROOT, SITE, chapter_files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

OFFERED = ("numpy", "torch", "triton", "matplotlib", "ipywidgets", "ipykernel")
MISSING = ("effattn-lite", "anywidget")
GIT = ("git", "-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("git") is None, reason="git is missing")]


def rehearsed():
    """The first chapter of each part, or all of them."""
    chapters = [path.with_suffix(".ipynb") for path in chapter_files()]
    if os.environ.get("EFFATTN_LITE_REHEARSE") == "all":
        return chapters
    return list({path.parent: path for path in reversed(chapters)}.values())[::-1]


def needed(names):
    """Installed distributions that `names` need, themselves included."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or name in MISSING:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform, or an optional extra
        waiting += [
            re.match(r"[\w.-]+", need)[0] for need in found[name].requires or () if "extra ==" not in need
        ]
    return found.values()


def environment(folder):
    """A virtual environment whose path has links to the offered distributions. Returns its Python."""
    venv.create(folder / "venv", with_pip=True)
    offered = folder / "offered"
    offered.mkdir()
    for dist in needed(OFFERED):
        tops = {file.parts[0] for file in dist.files if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = offered / top
            if not link.exists():
                link.symlink_to(dist.locate_file(top))
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # a folder of its own on the path: pip counts it as installed, and leaves it alone
    (packages / "offered.pth").write_text(f"{offered}\n")
    return folder / "venv" / "bin" / "python"


def clone_of_the_checkout(folder):
    """A git repository that holds the files of this checkout as they are. Returns its address."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    clone = folder / "clone"
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "rehearsal"]):
        subprocess.run([*GIT, *command], cwd=clone, check=True)
    # a requirement by address must name a host
    return f"file://localhost{clone.as_posix()}"


@pytest.mark.parametrize("path", rehearsed(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_notebook_runs_as_in_colab(path, tmp_path, monkeypatch):
    python = environment(tmp_path)
    alone = subprocess.run([python, "-c", "import effattn_lite"], cwd=tmp_path, capture_output=True)
    assert alone.returncode, "the environment already has the package: this would rehearse nothing"
    notebook = nbformat.read(path, 4)
    install = notebook.cells[0]
    assert SITE.repository in install.source
    install.source = install.source.replace(SITE.repository, clone_of_the_checkout(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("PYTHONPATH", "EFFATTN_LITE_STATIC"):
        monkeypatch.delenv(name, raising=False)
    kernel(python, tmp_path, monkeypatch)
    try:
        NotebookClient(notebook, timeout=300, kernel_name="rehearsal").execute(cwd=str(empty))
    except CellExecutionError as error:
        told = "".join(output.get("text", "") for output in install.outputs)
        pytest.fail(f"{error}\nthe install cell said:\n{told}", pytrace=False)
    where = "import effattn_lite, anywidget; print(effattn_lite.__file__)"
    told = subprocess.run([python, "-c", where], cwd=empty, capture_output=True, text=True, check=True)
    assert Path(told.stdout.strip()).is_relative_to(tmp_path / "venv")


def kernel(python, folder, monkeypatch):
    """A kernel specification that starts the rehearsal's Python."""
    spec = folder / "jupyter" / "kernels" / "rehearsal"
    spec.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "rehearsal", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
