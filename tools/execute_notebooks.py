"""Execute each chapter's notebook once, as a test, and hand the outputs to the book's build.

    python tools/execute_notebooks.py [chapter.md ...]    execute what is stale; default: every chapter
    python tools/execute_notebooks.py --force             execute all again
    python tools/execute_notebooks.py --record            also write book/_results/notebook_times.json

nbmake runs every notebook in an empty folder. The outputs go into the jupyter-cache that `jupyter-book
build` reads, so the build itself executes nothing. A notebook is stale when its code cells, the package,
the recorded results or the pins have changed since.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from book_files import BOOK, ROOT, chapter_files, read_source_notebook
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn

CACHE = ROOT / "_build" / ".jupyter_cache"
DOCTREES = ROOT / "_build" / ".doctrees"
TIMES = BOOK / "_results" / "notebook_times.json"
STAMPS = ROOT / "_build" / "executed"
READ_BY_NOTEBOOKS = ("effattn_lite/**/*.py", "effattn_lite/**/*.js", "effattn_lite/**/*.npz",
                     "book/_results/*.json", "requirements.txt")  # fmt: skip


def surroundings() -> str:
    """Digest of all that a notebook reads beside its own cells."""
    digest = hashlib.sha256(sys.version.encode())
    files = {file for pattern in READ_BY_NOTEBOOKS for file in ROOT.glob(pattern)} - {TIMES}
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


def stamp(chapter: Path, around: str) -> tuple[Path, str]:
    """The stamp file of a chapter, and what it holds when the chapter's outputs are fresh."""
    source = read_source_notebook(chapter.read_text(encoding="utf-8"), chapter)
    # the digest by which the build looks its outputs up: code cells, their metadata, the kernel
    _, digest = get_cache(CACHE).create_hashed_notebook(source)
    return STAMPS / _name(chapter).replace("/", "-"), f"{digest} {around}"


def _name(chapter):
    return chapter.relative_to(BOOK).with_suffix("").as_posix()


def execute(chapters: list[Path], folder: Path, workers: int) -> dict[Path, Path]:
    """Run nbmake on copies, each in a folder of its own. Returns chapter -> executed copy."""
    copies = {}
    for chapter in chapters:
        copies[chapter] = folder / chapter.parent.name / chapter.stem / f"{chapter.stem}.ipynb"
        copies[chapter].parent.mkdir(parents=True)
        shutil.copy(chapter.with_suffix(".ipynb"), copies[chapter])
    pytest = f"-m pytest --nbmake --overwrite --nbmake-timeout=120 -q -rfE -p no:cacheprovider -n{workers}"
    command = [sys.executable, *pytest.split(), f"--rootdir={folder}", "-c", os.devnull, str(folder)]
    threads = {"OMP_NUM_THREADS": "1"} if workers > 1 else {}
    subprocess.run(command, env={**os.environ, **threads, "EFFATTN_LITE_STATIC": "1"}, check=False)
    return copies


def outputs(copy: Path) -> list[nbformat.NotebookNode] | None:
    """The executed code cells, or None where one failed or was not reached."""
    cells = [cell for cell in nbformat.read(copy, 4).cells if cell.cell_type == "code"]
    failed = any(o.output_type == "error" for cell in cells for o in cell.outputs)
    return None if failed or not all(cell.execution_count for cell in cells) else cells


def hand_over(chapter: Path, cells: list) -> float:
    """Put a chapter's outputs into the cache under its .md source. Returns the seconds it ran."""
    source = read_source_notebook(chapter.read_text(encoding="utf-8"), chapter)
    done = [cell for cell in source.cells if cell.cell_type == "code"]
    for cell, executed in zip(done, cells, strict=True):
        cell.outputs, cell.execution_count = executed.outputs, executed.execution_count
    seconds = sum(_seconds(cell.metadata.get("execution", {})) for cell in cells)
    bundle = CacheBundleIn(source, str(chapter), data={"execution_seconds": seconds})
    get_cache(CACHE).cache_notebook_bundle(bundle, overwrite=True)
    # the build reads a page again when its doctree is gone; an unchanged .md would keep the old outputs
    (DOCTREES / chapter.relative_to(ROOT).with_suffix(".doctree")).unlink(missing_ok=True)
    return seconds


def _seconds(times):
    ends = [datetime.datetime.fromisoformat(t.replace("Z", "+00:00")) for t in times.values()]
    return (max(ends) - min(ends)).total_seconds() if ends else 0.0


def record(seconds: dict[str, float]) -> None:
    """Write the run times that the header boxes quote."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    told = {
        "name": "notebook_times",
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()},
        "commit": commit,
        "command": "python tools/execute_notebooks.py --force --record",
        "rows": [{"chapter": name, "seconds": round(s, 1)} for name, s in sorted(seconds.items())],
    }
    TIMES.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("chapters", nargs="*", type=Path)
    parser.add_argument("--force", action="store_true", help="execute fresh notebooks too")
    parser.add_argument("--record", action="store_true", help="write book/_results/notebook_times.json")
    parser.add_argument("--workers", type=int, default=2, help="notebooks that run at a time (default 2)")
    args = parser.parse_args()
    around = surroundings()
    chapters = [path.resolve() for path in args.chapters] or chapter_files()
    stamps = {chapter: stamp(chapter, around) for chapter in chapters}
    stale = [
        c for c, (file, text) in stamps.items() if args.force or not file.exists() or file.read_text() != text
    ]
    print(f"{len(chapters) - len(stale)} notebooks are fresh, {len(stale)} to execute", flush=True)
    failed, seconds = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for chapter, copy in (execute(stale, Path(folder), args.workers) if stale else {}).items():
            cells = outputs(copy)
            if cells is None:
                failed.append(chapter)
                continue
            name = _name(chapter)
            seconds[name] = hand_over(chapter, cells)
            stamps[chapter][0].parent.mkdir(parents=True, exist_ok=True)
            stamps[chapter][0].write_text(stamps[chapter][1])
            print(f"{name}: {seconds[name]:.1f} s")
    if args.record:
        record(seconds)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
