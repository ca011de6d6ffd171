"""What is measured for a method: the op and its peers, forward and backward, over lengths; then decoding."""

import importlib

import torch

from effattn_lite.bench.decode import decode_rows
from effattn_lite.bench.fla_peers import FLA
from effattn_lite.bench.memory import peak_mib
from effattn_lite.bench.peers import forget_tuning, peers_of
from effattn_lite.bench.roofline import floor_ms, ideal
from effattn_lite.bench.time_op import backward_of, first_call_s, time_ms
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, to_torch

__all__ = ["forward_of", "rows_of", "shapes", "tensors_of"]

OPTIONS = {
    "softmax_attention": ({}, {"window": 512}),
    "cosformer": ({"max_length": 2**20},),
    "sliding_window": ({"window": 4096},),
    "streaming_llm": ({"sinks": 4, "window": 1024},),
    "block_streaming": ({"sink_blocks": 1, "local_blocks": 8, "block_size": 128},),
}
"""Static arguments of a real use; the first entry of the row's options where a method is not listed."""

SIZES = {"fwp": {"K": 64}, "gsa": {"M": 64}, "abc": {"M": 64}}
"""Sizes on the GPU that differ from those of `shapes`: 2 nu K features of at most 256, slots as published."""

EAGER = 8_192
"""Longest T at which plain torch is timed on the GPU: it keeps what the kernel never writes."""

PEERED = (8_192, 32_768)
"""Values of T at which peers that tune themselves are timed: each costs minutes of compiling and trying."""


def shapes(device, lengths=None):
    """Sizes to run at: one sequence of 16 heads of 128, or of 2048 channels, on the GPU; less on the CPU."""
    gpu = device != "cpu"
    size = dict(B=1, H=16, HKV=16, HV=16, K=128, V=128, D=2048, M=16)
    if not gpu:
        size |= dict(H=2, HKV=2, HV=2, K=32, V=32, D=64, M=8)
    return [size | {"T": T} for T in lengths or ((2_048, 8_192, 32_768, 131_072) if gpu else (128, 512))]


def tensors_of(name, sizes, *, dtype, device, requires_grad=False):
    """Inputs of a run: those of `testing.make_inputs` for T <= 2048, repeated along T beyond that."""
    short = min(sizes["T"], 2_048)
    axes = find(name).inputs
    inputs = to_torch(make_inputs(name, **sizes | {"T": short}), dtype=dtype, device=device)
    times = -(-sizes["T"] // short)
    made = {}
    for tensor, x in inputs.items():
        if "T" in axes[tensor].split():
            x = x.repeat(1, times, *[1] * (x.ndim - 2))[:, : sizes["T"]].contiguous()
        made[tensor] = x.requires_grad_(requires_grad)
    return made


def forward_of(name, inputs, options, *, impl):
    """A call that runs the op and returns o."""
    op = getattr(importlib.import_module(f"effattn_lite.ops.{name}"), name)
    first = (lambda out: out[0]) if find(name).stateful else (lambda out: out)
    return lambda: first(op(**inputs, **options, impl=impl))


def rows_of(name, *, device, dtype, ceiling, lengths=None, peers=True, report=print):
    """All rows of a method: its op, plain torch, the peers, decoding, and the first call in a fresh process.

    The first call, which compiles, is left out where lengths are chosen.

    Args:
        name: a method whose op stands.
        device, dtype: "cuda" or "cpu"; "bfloat16" on the GPU, as a rule.
        ceiling: as `roofline.ceilings` returns it.
        lengths: values of T, instead of those of `shapes`.
        peers: time plain torch and other packages' ops too.
        report: called with every row as it comes.
    """
    rows = []

    def add(found):
        for row in found:
            report(row)
            rows.append(row)

    for options in OPTIONS.get(name, find(name).options[:1]):
        for sizes in shapes(device, lengths):
            sizes |= SIZES.get(name, {}) if device != "cpu" else {}
            for row in _forward_rows(name, sizes, dict(options), device, dtype, ceiling, peers):
                add([row])
        add(decode_rows(name, sizes | {"B": 64}, options, dtype=dtype, device=device, ceiling=ceiling))
    if device != "cpu" and find(name).differentiable and not lengths:
        sizes, options = (
            shapes(device)[0] | SIZES.get(name, {}),
            dict(OPTIONS.get(name, find(name).options)[0]),
        )
        seconds = first_call_s(name, sizes, options, dtype)
        add([_row(name, "triton", options, sizes, dtype, "first call", 1e3 * seconds)])
    return rows


def _row(name, impl, options, sizes, dtype, which, ms, floor=None, peak=None):
    axes = {"B", "T", *" ".join(find(name).inputs.values()).split()}
    shape = {axis: sizes[axis] for axis in "BTHKVDM" if axis in axes}
    return {
        "op": name, "impl": impl, "options": options, "shape": shape, "dtype": dtype, "pass": which,
        "ms": ms, "floor_ms": floor, "peak_mib": peak,
    }  # fmt: skip


def _forward_rows(name, sizes, options, device, dtype, ceiling, peers):
    """Forward and forward + backward of all implementations at one shape."""
    gpu = device != "cpu"
    inputs = tensors_of(name, sizes, dtype=dtype, device=device, requires_grad=find(name).differentiable)
    calls = {"triton": forward_of(name, inputs, options, impl="triton")} if gpu else {}
    if not gpu or (peers and sizes["T"] <= EAGER):
        calls["torch"] = forward_of(name, inputs, options, impl="torch")
    if peers and (sizes["T"] in PEERED or name not in FLA):
        calls |= peers_of(name, inputs, options)
    passes = ("forward", "forward+backward")[: 2 if find(name).differentiable else 1]
    for impl, forward in calls.items():
        for which in passes:
            try:
                if impl.startswith("fla") and which == "forward":
                    forget_tuning()
                ms, peak = _measure(forward, inputs, which, device)
            except (RuntimeError, NotImplementedError) as error:
                # out of memory, or a backend that refuses the shape: an implementation less, no failed run
                print(f"{impl}, T = {sizes['T']}, {which}: {str(error).partition(chr(10))[0]}")
                continue
            need = ideal(name, sizes, options, backward=which != "forward", itemsize=BYTES[dtype])
            yield _row(name, impl, options, sizes, dtype, which, ms, floor_ms(need, ceiling), peak)


BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _measure(forward, inputs, which, device):
    if which == "forward":
        with torch.no_grad():
            return time_ms(forward, device=device), peak_mib(forward, device=device)
    both = backward_of(forward, inputs)
    return time_ms(both, device=device), peak_mib(both, device=device)
