"""The floor of a call: the least time that its bytes and its products take on this machine.

Both ceilings are measured in the run that uses them: a data sheet's numbers are not reached.
"""

import numpy as np
import torch

from effattn_lite.bench.rows import row_of
from effattn_lite.bench.time_op import time_ms
from effattn_lite.testing import WIDE

__all__ = ["ceilings", "floor_ms", "ideal", "pairs"]


def ceilings(*, device, dtype):
    """Measured copy bandwidth, TB/s, and product rate in a dtype, TFLOP/s.

    On the GPU the copy moves 2 GiB in all and the product is 8192 cubed; 64 MiB and 512 cubed on the CPU.
    """
    gpu = device != "cpu"
    n, size = (8192, 2**30) if gpu else (512, 2**25)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = time_ms(lambda: target.copy_(source), device=device)
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    product = time_ms(lambda: a @ b, device=device)
    return {"copy_tb_s": 2 * size / copy / 1e9, "product_tflop_s": 2 * n**3 / product / 1e9}


def ideal(name, sizes, options, *, seen=None, backward=False, itemsize=2):
    """Bytes and FLOPs that no implementation of a method can do without.

    Bytes: every input read once and o written once; a backward reads and writes that much twice more. FLOPs:
    products alone. A carried state takes 4 an entry and token (write 2, read 2), its backward twice as much
    more; softmax takes 2 (K + V) a pair of tokens that see each other, its backward 2.5 times as much more.

    Args:
        name, sizes, options: what was run.
        seen: pairs of all heads and batch rows, counted; default: those of the pattern that `pairs` knows.
            What a selection computes to find them is no part of the ideal.
        backward: forward and backward.
        itemsize: bytes of a number.
    """
    row = row_of(name)
    tokens = sizes["B"] * sizes["T"]
    moved = 0
    for tensor, axes in row.inputs.items():
        if tensor == "q_global":  # read in the rows of a few tokens
            continue
        # gates are float32 whatever the dtype
        moved += (4 if tensor in WIDE else itemsize) * int(np.prod([sizes[a] for a in axes.split()]))
    letters = set(" ".join(row.inputs.values()).split())
    heads = sizes["HV" if "HV" in letters else "H"]
    outputs = heads * sizes["V"] if "V" in letters else sizes["D"]
    moved += itemsize * tokens * outputs
    if row.stateful:
        state = sum(int(np.prod([sizes[a] for a in axes.split()[1:]])) for axes in row.states)
        flops, more = 4 * tokens * state, 2.0
    else:
        if seen is None:
            seen = sizes["B"] * sizes["H"] * pairs(sizes["T"], **options)
        flops, more = 2 * seen * (sizes["K"] + sizes["V"]), 2.5
    return {"bytes": moved * (3 if backward else 1), "flops": flops * (1 + more if backward else 1)}


def pairs(T, *, causal=True, window=None, sinks=0, sink_blocks=0, local_blocks=None, block_size=1, **_):
    """Pairs (query, key) of a sequence that a pattern lets see each other.

    Causal, with a window of tokens and the first `sinks`, or with local and first blocks. Without
    `causal` all pairs.
    """
    if not causal:
        return T * T
    t = np.arange(T)
    first = np.zeros(T, np.int64)
    if window is not None:
        first = np.maximum(0, t - window + 1)
    if local_blocks is not None:
        first = np.maximum(0, t // block_size - local_blocks + 1) * block_size
    return int((t - first + 1 + np.minimum(first, sinks + sink_blocks * block_size)).sum())


def floor_ms(need, ceiling):
    """The larger of the two times, ms: bytes over bandwidth, FLOPs over the product rate."""
    return max(need["bytes"] / ceiling["copy_tb_s"], need["flops"] / ceiling["product_tflop_s"]) / 1e9
