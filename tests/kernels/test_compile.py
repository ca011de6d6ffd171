"""Every kernel compiles for every GPU generation that the book speaks of, and fits its shared memory.

No GPU is needed: Triton and the bundled ptxas compile for a target by name. It happens in a process of its
own, since the other tests have Triton's interpreter on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from effattn_lite import registry

pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability -> KiB of shared memory that a block may have (CUDA C++ Programming Guide)."""

LOCAL = 512
"""Bytes of local memory a thread: past a handful of spilled registers the tiles are too large."""

SCRIPT = Path(__file__).with_name("compile_engine.py")
ENGINES = sorted({registry.find(name).engine for name in registry.names("kernel")})
# Turing, Ampere, Hopper and consumer Blackwell, a few variants each
RUNS = [pytest.param(e, c, ["quick"], id=f"{e}-sm_{c}") for c in (75, 80, 90, 120) for e in ENGINES]
if os.environ.get("EFFATTN_EVERY_VARIANT"):
    # seven generations and every tile take two cores more than an hour: the weekly run asks for them
    RUNS += [pytest.param(e, c, [], id=f"{e}-sm_{c}-all") for c in KIB for e in ENGINES]


@pytest.mark.parametrize("engine, capability, quick", RUNS)
def test_compiles_and_fits(engine, capability, quick):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SCRIPT, engine, str(capability), *quick], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows, f"{engine}: variants() gives nothing for sm_{capability}"
    for row in rows:
        assert row["shared"] <= KIB[capability] * 1024, row
    if "local" not in rows[0]:
        pytest.skip("compiled and fits; registers not read, since this triton bundles no cuobjdump")
    if capability >= 80:
        # on Turing products are plain FMAs, whose operands live in registers
        assert all(row["local"] <= LOCAL for row in rows), [row for row in rows if row["local"] > LOCAL]
