"""What is measured for a method: the op and its peers, forward and backward, over lengths; then decoding."""

import importlib

import torch

from effattn_lite.bench.arguments import arguments_of
from effattn_lite.bench.cached import FEATURES, cached_rows, cached_shapes, decoded
from effattn_lite.bench.decode import decode_rows
from effattn_lite.bench.memory import peak_mib
from effattn_lite.bench.peers import forget_tuning, peers_of
from effattn_lite.bench.roofline import floor_ms, ideal
from effattn_lite.bench.rows import BLOCK_SPARSE, has_kernel, row_of
from effattn_lite.bench.seen import seen_of, tally
from effattn_lite.bench.time_op import backward_of, first_call_s, time_ms
from effattn_lite.bench.topics import add_topics
from effattn_lite.ops.cache import KVCache
from effattn_lite.testing import make_inputs, to_torch

__all__ = ["first_run", "forward_of", "options_of", "rows_of", "shapes", "tensors_of", "warm"]

OPTIONS = {
    "softmax_attention": ({}, {"window": 512}),
    "cosformer": ({"max_length": 2**20},),
    "sliding_window": ({"window": 4096},),
    "streaming_llm": ({"sinks": 4, "window": 1024},),
    "block_streaming": ({"sink_blocks": 1, "local_blocks": 8, "block_size": 128},),
}
"""Static arguments of a real use; the first entry of the row's options where a method is not listed."""

SPARSE_OPTIONS = {
    "block_sparse_attention": ({"block_size": 128, "share": 0.125},),
    "sparse_transformer": (
        {"pattern": "strided", "stride": 128},
        {"pattern": "fixed", "stride": 128, "summary": 8},
    ),
    "longnet": ({},),
    "logsparse": ({},),
    "minference": ({"columns": 1000, "diagonals": 6096},),
    "flexprefill": ({"gamma": 0.9, "block_size": 128},),
    "xattention": ({"threshold": 0.9, "stride": 8, "block_size": 128},),
    "spargeattn": ({"query_block_size": 128, "block_size": 64, "threshold": 0.98},),
    "quest": ({"budget": 2048, "page_size": 16},),
    "double_sparsity": ({"r": 16, "budget": 2048},),
    "resa": ({"ratio": 0.1, "page_size": 16},),
    "moba": ({"block_size": 2048, "top_k": 3}, {"block_size": 128, "top_k": 8}),
    "nsa": ({"block_size": 64, "top_n": 16, "window": 512},),
    "infllm_v2": ({"block_size": 64, "top_k": 64, "local_blocks": 32},),
    "bigbird": ({"block_size": 64, "random_blocks": 3},),
    "longformer": ({"window": 512, "global_tokens": (0,)},),
}
"""The same on the GPU alone: at lengths for the CPU nothing would be left out."""

SIZES = {
    "fwp": {"K": 64},
    "gsa": {"M": 64},
    "abc": {"M": 64},
    "nsa": {"H": 64, "HKV": 4},
    "infllm_v2": {"H": 64, "HKV": 4},
}
"""Sizes on the GPU that differ from those of `shapes`: 2 nu K features of at most 256, slots and groups of
heads as published."""

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


def options_of(name, device):
    """Sets of static arguments to run with."""
    own = SPARSE_OPTIONS.get(name) if device != "cpu" else None
    return [dict(options) for options in own or OPTIONS.get(name, row_of(name).options[:1])]


def tensors_of(name, sizes, *, dtype, device, requires_grad=False):
    """Inputs of a run: those of `testing.make_inputs` for T <= 2048, repeated along T beyond that.

    What selects gets queries and keys with topics in them, see `topics`.
    """
    short, row = min(sizes["T"], 2_048), row_of(name)
    drawn = "softmax_attention" if row is BLOCK_SPARSE else name
    inputs = to_torch(make_inputs(drawn, **sizes | {"T": short}), dtype=dtype, device=device)
    times = -(-sizes["T"] // short)
    made = {}
    for tensor, x in inputs.items():
        if "T" in row.inputs[tensor].split():
            x = x.repeat(1, times, *[1] * (x.ndim - 2))[:, : sizes["T"]].contiguous()
        made[tensor] = x
    if row.family == "selected blocks":
        add_topics(made["q"], made["k"])
    return {tensor: x.requires_grad_(requires_grad) for tensor, x in made.items()}


def forward_of(name, inputs, options, *, impl):
    """A call that runs the op and returns o."""
    op = getattr(importlib.import_module(f"effattn_lite.ops.{name}"), name)
    first = (lambda out: out[0]) if row_of(name).stateful else (lambda out: out)
    arguments = arguments_of(inputs, options)
    return lambda: first(op(**arguments, impl=impl))


def rows_of(name, *, device, dtype, ceiling, lengths=None, peers=True, report=print):
    """All rows of a method: its op, plain torch, the peers, decoding, and the first call in a fresh process.

    The first call, which compiles, is left out where lengths are chosen. A method that reads a cache has rows
    of decoding alone, T being the cached tokens.

    Args:
        name: a method whose op stands, or "block_sparse_attention".
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

    for options in options_of(name, device):
        for sizes in _sizes(name, device, lengths):
            run = _cached_rows if name in FEATURES else _forward_rows
            add(run(name, sizes, options, device, dtype, ceiling, peers))
        if row_of(name).stateful:
            more = sizes | {"B": 64}
            add(decode_rows(name, more, options, dtype=dtype, device=device, ceiling=ceiling))
    if device != "cpu" and has_kernel(name) and not lengths:
        sizes, options = _sizes(name, device, None)[0], options_of(name, device)[0]
        seconds = first_call_s(name, sizes, options, dtype)
        add([_row(name, "triton", options, sizes, dtype, "first call", 1e3 * seconds)])
    return rows


def first_run(name, sizes, options, dtype, device="cuda"):
    """Run a method's op once: forward and backward, if there is one, or one decoded token."""
    row, impl = row_of(name), "triton" if device != "cpu" else "torch"
    inputs = tensors_of(name, sizes, dtype=dtype, device=device, requires_grad=row.differentiable)
    if name in FEATURES:
        return decoded(name, *_cached(inputs, options), impl=impl)()
    forward = forward_of(name, inputs, options, impl=impl)
    return backward_of(forward, inputs)() if row.differentiable else forward()


def warm(name, *, dtype, device, lengths=None):
    """Run every implementation of a method once: then all it compiles is in the caches on disk."""
    for options in options_of(name, device):
        for sizes in _sizes(name, device, lengths):
            if name in FEATURES:
                first_run(name, sizes, options, dtype, device)
                continue
            inputs, calls, _ = _calls(name, sizes, options, device, dtype, True)
            for impl, forward in calls.items():
                # what tunes itself would do so on a GPU that others use
                if not impl.startswith("fla") and (impl != "torch" or device == "cpu"):
                    _tried(impl, sizes, "compiling", lambda f=forward, i=inputs: _once(f, i))


def _once(forward, inputs):
    with torch.no_grad():  # compiled apart from what keeps tensors for a gradient
        forward()
    if _leaves(inputs):
        backward_of(forward, inputs)()


def _sizes(name, device, lengths):
    if name in FEATURES:
        return cached_shapes(device, lengths)
    more = SIZES.get(name, {}) if device != "cpu" else {}
    return [sizes | more for sizes in shapes(device, lengths)]


def _leaves(inputs):
    return [x for x in inputs.values() if x.requires_grad]


def _row(name, impl, options, sizes, dtype, which, ms, floor=None, peak=None):
    axes = {"B", "T", *" ".join(row_of(name).inputs.values()).split()}
    # as many key heads as query heads go without saying
    axes -= {"HKV"} if sizes["HKV"] == sizes["H"] else set()
    shape = {axis: sizes[axis] for axis in ("B", "T", "H", "HKV", "K", "V", "D", "M") if axis in axes}
    return {
        "op": name, "impl": impl, "options": options, "shape": shape, "dtype": dtype, "pass": which,
        "ms": ms, "floor_ms": floor, "peak_mib": peak,
    }  # fmt: skip


def _cached(inputs, options):
    """The newest token's queries, the cache, and static arguments of a decode method."""
    arguments = arguments_of(inputs, options)
    q, k, v = (arguments.pop(tensor) for tensor in "qkv")
    return q[:, -1].contiguous(), KVCache(k, v), arguments


def _cached_rows(name, sizes, options, device, dtype, ceiling, peers):
    """Decoding of one token at one length of the cache."""
    run = _cached(tensors_of(name, sizes, dtype=dtype, device=device), options)
    base = _row(name, "", options, sizes, dtype, "decode", 0.0)
    yield from cached_rows(name, *run, base, device=device, ceiling=ceiling, peers=peers)


def _calls(name, sizes, options, device, dtype, peers):
    """Inputs, implementations by label, and how many pairs a sparse method sees, in all and as a share."""
    gpu, row = device != "cpu", row_of(name)
    inputs = tensors_of(name, sizes, dtype=dtype, device=device, requires_grad=row.differentiable)
    kernel = gpu and has_kernel(name)
    calls = {"triton": forward_of(name, inputs, options, impl="triton")} if kernel else {}
    if not kernel or (peers and sizes["T"] <= EAGER):
        calls["torch"] = forward_of(name, inputs, options, impl="torch")
    seen = seen_of(name, arguments_of(inputs, options))
    counts, found = None, {}
    if seen is not None:
        counts, T = tally(seen, inputs["q"]), sizes["T"]
        every = sizes["B"] * sizes["H"] * (T * (T + 1) // 2 if seen.causal else T * T)
        pairs = int(counts.sum()) + seen.more
        found = {"pairs": pairs, "share": pairs / every}
    if peers:
        calls |= {
            impl: call for impl, call in peers_of(name, inputs, options, seen, counts).items()
            if not impl.startswith("fla") or sizes["T"] in PEERED
        }  # fmt: skip
    return inputs, calls, found


def _forward_rows(name, sizes, options, device, dtype, ceiling, peers):
    """Forward and forward + backward of all implementations at one shape."""
    inputs, calls, found = _calls(name, sizes, options, device, dtype, peers)
    how = dict(seen=found.get("pairs"), itemsize=BYTES[dtype])
    for impl, forward in calls.items():
        for which in ("forward", "forward+backward")[: 2 if _leaves(inputs) else 1]:
            if impl.startswith("fla") and which == "forward":
                forget_tuning()
            measured = _tried(impl, sizes, which, lambda f=forward, w=which: _measure(f, inputs, w, device))
            if measured is not None:
                floor = floor_ms(ideal(name, sizes, options, backward=which != "forward", **how), ceiling)
                row = _row(name, impl, options, sizes, dtype, which, measured[0], floor, measured[1])
                yield row | {key: x for key, x in found.items() if key == "share"}


def _tried(impl, sizes, which, run):
    """What run() returns; None where it fails and may: an implementation less, no failed run."""
    # a backend that refuses the shape, no memory; other packages raise what they like
    may = (RuntimeError, NotImplementedError) if impl in ("triton", "torch") else Exception
    try:
        return run()
    except may as error:
        print(f"{impl}, T = {sizes['T']}, {which}: {str(error).partition(chr(10))[0]}")
        return None


BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _measure(forward, inputs, which, device):
    if which == "forward":
        with torch.no_grad():
            return time_ms(forward, device=device), peak_mib(forward, device=device)
    both = backward_of(forward, inputs)
    return time_ms(both, device=device), peak_mib(both, device=device)
