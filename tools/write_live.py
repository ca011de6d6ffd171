"""Write what the page's own Python loads: `python tools/write_live.py`, before the book is built.

`book/_static/live/` gets effattn_lite.zip, the part of the package that needs NumPy alone, and arrays/, the
data files that a cell fetches when it asks for them. The zip is the same for the same sources.
"""

import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "book" / "_static" / "live"
HEAVY = "kernels ops layers models tasks bench train.py keeper.py run.py __main__.py".split()
SUFFIXES = (".py", ".js", ".css", ".json")
LARGEST = 200_000


def main(out=OUT):
    out.mkdir(parents=True, exist_ok=True)
    files = packed_files()
    with zipfile.ZipFile(out / "effattn_lite.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for inside, path in files.items():
            # a fixed date keeps the archive equal from build to build
            archive.writestr(zipfile.ZipInfo(inside), path.read_bytes(), zipfile.ZIP_DEFLATED)
    arrays = out / "arrays"
    shutil.rmtree(arrays, ignore_errors=True)
    arrays.mkdir()
    for path in sorted((ROOT / "effattn_lite" / "data").glob("*.npz")):
        shutil.copy(path, arrays)
    size = (out / "effattn_lite.zip").stat().st_size
    print(f"{out}: {len(files)} files, {size / 1000:.0f} kB")


def packed_files() -> dict[str, Path]:
    """Name in the archive -> file, in order."""
    package, files = ROOT / "effattn_lite", {}
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package).parts
        if path.suffix in SUFFIXES and inside[0] not in HEAVY and "__pycache__" not in inside:
            files[path.relative_to(ROOT).as_posix()] = path
    for path in sorted((ROOT / "book" / "_results").glob("*.json")):
        if path.stat().st_size <= LARGEST:
            files[f"effattn_lite/data/results/{path.name}"] = path
    return files


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
