"""Decoding: one token for each of many sequences, as called and replayed from a CUDA graph."""

import importlib

import torch

from effattn_lite.bench.time_op import time_ms
from effattn_lite.registry import find
from effattn_lite.testing import flat, make_inputs, to_torch

__all__ = ["decode_rows", "replayed_ms"]


def decode_rows(name, sizes, options, *, dtype, device, ceiling):
    """Rows of a stateful op's `step`, updated in place; none for other methods.

    The floor is the state's bytes, read and written once in float32, over the copy bandwidth.

    Args:
        sizes: B is the number of sequences; T is not used.
        ceiling: as `roofline.ceilings` returns it.
    """
    row = find(name)
    if not row.stateful:
        return []
    step = importlib.import_module(f"effattn_lite.ops.{name}").step
    tensors = to_torch(make_inputs(name, state=True, **sizes | {"T": 1}), dtype=dtype, device=device)
    state = tensors.pop("initial_state")
    token = {n: x[:, 0].contiguous() if "T" in row.inputs[n].split() else x for n, x in tensors.items()}

    def call():
        return step(**token, state=state, out_state=state, **options)

    base = {"op": name, "options": dict(options), "shape": sizes | {"T": 1}, "dtype": dtype, "pass": "step"}
    base |= {
        "floor_ms": 2 * sum(x.nbytes for x in flat(state)) / ceiling["copy_tb_s"] / 1e9,
        "peak_mib": None,
    }
    impl = "triton" if device != "cpu" else "torch"
    with torch.no_grad():
        rows = [base | {"impl": impl, "ms": time_ms(call, device=device)}]
        if device != "cpu":
            rows.append(base | {"impl": f"{impl}, CUDA graph", "ms": replayed_ms(call, device)})
    return rows


def replayed_ms(call, device):
    """Median time of a call replayed as a CUDA graph, ms.

    Args:
        call: function of no arguments that never waits for the device.
        device: "cuda".
    """
    # capture needs a warm call on a side stream
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_ms(graph.replay, device=device)
