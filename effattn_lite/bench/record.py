"""Recorded results: book/_results/<name>.json, which chapters plot and never retype."""

import datetime
import json
import platform
import subprocess
from pathlib import Path

import effattn_lite

__all__ = ["check", "make", "write"]

FOLDER = Path(__file__).resolve().parents[2] / "book" / "_results"
"""Where records are kept, in a checkout."""

SCHEMA = {
    "name": str, "device": str, "date": str, "versions": dict, "commit": str, "command": str,
    "rows": list,
}  # fmt: skip
ROW = {"op": str, "impl": str, "shape": dict, "dtype": str, "pass": str, "ms": float}
VERSIONS = ("python", "torch", "triton", "effattn_lite")


def make(name, rows, *, device, ceilings, command):
    """A record of one run: what was measured, on what, when, with which versions.

    Args:
        name: of the record.
        rows: list of dicts, see `suite.rows_of`.
        device: "cuda" or "cpu"; the record keeps its full name.
        ceilings: as `roofline.ceilings` returns them.
        command: what to type to measure again.
    """
    return {
        "name": name,
        "device": _device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": _versions(),
        "commit": _commit(),
        "command": command,
        "ceilings": ceilings,
        "rows": rows,
    }


def check(record):
    """Check a record against the schema; further keys are allowed.

    Raises:
        ValueError: a key is missing or has another type; the message names it.
    """
    _check_keys(record, SCHEMA, "record")
    datetime.date.fromisoformat(record["date"])
    _check_keys(record["versions"], {"python": str}, "versions")
    if not record["rows"]:
        raise ValueError("record: rows is empty")
    # what is no time of an op (a task's accuracy, say) has rows of its own shape, and needs no ceilings
    for i, row in enumerate(record["rows"]):
        if "ms" in row:
            _check_keys(record, {"ceilings": dict}, "record")
            _check_keys(record["versions"], dict.fromkeys(VERSIONS, str), "versions")
            _check_keys(row, ROW, f"rows[{i}]")
            if not row["ms"] > 0:
                raise ValueError(f"rows[{i}]: ms is {row['ms']}, expected > 0")


def write(record, folder=FOLDER):
    """Check a record, write it as <name>.json, numbers to four digits, and return the path."""
    check(record)
    path = Path(folder) / f"{record['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(record), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _check_keys(found, schema, where):
    for key, kind in schema.items():
        if key not in found:
            raise ValueError(f"{where}: {key} is missing")
        if not isinstance(found[key], (int, float) if kind is float else kind):
            raise ValueError(f"{where}: {key} is {found[key]!r}, expected {kind.__name__}")


def _rounded(x):
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, (list, tuple)) else x


def _device_name(device):
    if device == "cpu":
        return platform.processor() or platform.machine()
    import torch

    return torch.cuda.get_device_name()


def _versions():
    import torch

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "effattn_lite": effattn_lite.__version__,
    }


def _commit():
    """The commit of the checkout, marked when files differ from it; "" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
