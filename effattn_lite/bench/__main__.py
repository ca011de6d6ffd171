"""Measure several methods in one process: `python -m effattn_lite.bench NAME NAME ... --record`.

What a method's own command does, `python -m effattn_lite bench NAME --record`, for each of them in turn:
torch is loaded and the ceilings are measured once.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from effattn_lite.bench import record, roofline, suite
from effattn_lite.bench.break_even import break_even
from effattn_lite.bench.rows import row_of


def main(arguments=None):
    """Run the command; returns its exit code: the number of methods of which nothing could be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m effattn_lite.bench", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("names", nargs="+", help="methods, or block_sparse_attention")
    parser.add_argument("--record", action="store_true", help="write book/_results/NAME.json")
    parser.add_argument("--length", type=int, action="append", help="a value of T; may be given again")
    parser.add_argument("--dtype", default=None, choices=[*suite.BYTES])
    parser.add_argument("--alone", action="store_true", help="without peers and plain torch")
    parser.add_argument("--jobs", type=int, default=0, help="compile first, so many methods at a time")
    parser.add_argument("--warm", action="store_true", help="only compile")
    known = parser.parse_args(arguments)
    names = [row_of(name).name for name in known.names]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = known.dtype or ("bfloat16" if device == "cuda" else "float32")
    asked = [x for n in known.length or () for x in ("--length", str(n))]
    asked += ["--dtype", dtype] if known.dtype else []
    if known.warm:
        for name in names:
            suite.warm(name, dtype=dtype, device=device, lengths=known.length)
        return 0
    if known.jobs and device == "cuda":
        compile_all(names, asked, known.jobs)
    ceiling = roofline.ceilings(device=device, dtype=dtype)
    print("ceilings: " + ", ".join(f"{what} {value:.3g}" for what, value in ceiling.items()))
    how = dict(device=device, dtype=dtype, ceiling=ceiling, lengths=known.length, peers=not known.alone)
    return sum(measure(name, how, asked, known.record) for name in names)


def compile_all(names, asked, jobs):
    """Run each method once in a process of its own, so that the caches on disk have all kernels."""
    start = time.perf_counter()

    def one(name):
        command = [sys.executable, "-m", "effattn_lite.bench", name, "--warm", *asked]
        return name, subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(jobs) as pool:
        for name, run in pool.map(one, names):
            if run.returncode:
                print(f"{name}: not compiled ahead: {run.stderr.strip().rpartition(chr(10))[2]}")
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)


def measure(name, how, asked, keep):
    """Measure one method, print its rows and its break-even lengths; returns 1 if there is no row."""
    start, rows = time.perf_counter(), []
    command = f"python -m effattn_lite bench {' '.join([name, *asked])} --record"

    def report(row):
        show(row)
        rows.append(row)
        if keep:  # after every row: a run that is cut short keeps what it has
            made = record.make(name, rows, device=how["device"], ceilings=how["ceiling"], command=command)
            record.write(made)

    try:
        suite.rows_of(name, **how, report=report)
    except Exception as error:  # noqa: BLE001 - the other methods are measured all the same
        print(f"{name}: {type(error).__name__}: {error}")
    for found in break_even(rows):
        grid = ", ".join(
            f"{T:,}: {ratio:.2f}x" for T, ratio in zip(found["grid"], found["ratios"], strict=True)
        )
        print(f"{name} {found['options']} {found['pass']}: break-even {found['T']} ({grid})")
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return int(not rows)


def show(row):
    """Print a row."""
    floor = f"floor {row['floor_ms']:9.3f}" if row["floor_ms"] else ""
    peak = f"peak {row['peak_mib']:8.0f} MiB" if row["peak_mib"] is not None else ""
    share = f"sees {row['share']:.1%}" if "share" in row else ""
    options = " ".join(f"{key}={value}" for key, value in row["options"].items())
    print(
        f"{row['op']} {options} T {row['shape']['T']:,} {row['pass']} {row['impl']}: {row['ms']:.3f} ms",
        floor, share, peak, flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
