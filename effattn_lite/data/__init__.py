"""What the book reads instead of downloading: recorded results and small arrays of a real model.

NumPy alone. `load("...")` returns the arrays of a file in this folder; `results("...")` the record of
one measured run, as `python -m effattn_lite bench` wrote it.
"""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np

__all__ = ["load", "names", "results"]

_HERE = files("effattn_lite.data")
_CHECKOUT = Path(__file__).resolve().parents[2] / "book" / "_results"


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of `<name>.npz` in the package's data.

    Raises:
        ValueError: no such file; the message lists those there are.
    """
    path = _HERE / f"{name}.npz"
    if not path.is_file():
        raise ValueError(f"no data called {name!r}; there are: {', '.join(_stems(_HERE, '.npz')) or 'none'}")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def results(name: str) -> dict:
    """The recorded run `<name>.json`: device, date, versions, commit, command and rows.

    Raises:
        ValueError: no such record; the message lists those there are.
    """
    path = _results() / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"no recorded result called {name!r}; there are: {', '.join(names())}")
    return json.loads(path.read_text(encoding="utf-8"))


def names() -> list[str]:
    """Names of all recorded results."""
    return _stems(_results(), ".json")


def _results():
    # a wheel carries the records inside the package, a checkout beside the book
    packed = _HERE / "results"
    return packed if packed.is_dir() else _CHECKOUT


def _stems(folder, suffix):
    return sorted(f.name[: -len(suffix)] for f in folder.iterdir() if f.name.endswith(suffix))
