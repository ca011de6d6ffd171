"""How long a call takes: medians, on the GPU by events with a cold cache, on the CPU by the clock."""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

__all__ = ["backward_of", "first_call_s", "time_ms"]


def time_ms(call, *, device, warmup_ms=25.0, measure_ms=100.0):
    """Median time of a call, ms.

    On CUDA each run is timed between two events, with the L2 cache overwritten before it, as Triton's
    `do_bench` does: what a method reads, it reads from memory. On the CPU the clock is read around the call.

    Args:
        call: function of no arguments.
        device: "cuda" or "cpu".
        warmup_ms: time spent before measuring, ms; at least one call.
        measure_ms: time spent measuring, ms; at least three calls on the CPU, one on the GPU.
    """
    if device == "cpu":
        return _clock_ms(call, measure_ms)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=warmup_ms, rep=measure_ms, return_mode="median"))


def _clock_ms(call, measure_ms):
    call()
    times = []
    while len(times) < 3 or sum(times) < measure_ms:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def backward_of(call, inputs):
    """A call that runs `call` and its gradients with respect to all inputs, from a fixed random cotangent."""
    leaves = [x for x in inputs.values() if x.requires_grad]
    cotangent = torch.randn_like(call())
    # a peer may have no gradient for some input
    return lambda: torch.autograd.grad(call(), leaves, cotangent, allow_unused=True)


FIRST = """
import time, torch
from effattn_lite.bench.suite import first_run
start = time.perf_counter()
first_run({name!r}, {sizes!r}, {options!r}, {dtype!r})
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_call_s(name, sizes, options, dtype):
    """Seconds of the first forward, and backward if there is one, in a fresh process with no kernel cached.

    Imports are left out. The machine must have a GPU.
    """
    code = FIRST.format(name=name, sizes=sizes, options=dict(options), dtype=dtype)
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TRITON_CACHE_DIR": cache}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
        )
    return float(run.stdout.split()[-1])
