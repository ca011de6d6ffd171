"""What others offer for the same task, timed in the same run: torch's attention, fla's ops if installed."""

import gc
import importlib.util

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from effattn_lite.bench.fla_peers import FLA
from effattn_lite.bench.flex import flex_call
from effattn_lite.bench.rows import row_of
from effattn_lite.bench.sparse_peers import SPARSE

__all__ = ["forget_tuning", "peers_of"]


def peers_of(name, inputs, options, seen=None, counts=None):
    """Other implementations: label -> a call without arguments that returns o.

    Each label says where the peer computes something else than the op does.

    Args:
        name: a method.
        inputs: its tensors.
        options: its static arguments.
        seen: what the call sees, of a sparse method that `seen.seen_of` knows.
        counts: its pairs, as `seen.tally` returns them.
    """
    if not next(iter(inputs.values())).is_cuda:
        return {}
    if name in FLA:
        return dict([FLA[name](**inputs)]) if importlib.util.find_spec("fla") else {}
    q, k, v = (inputs.get(name) for name in "qkv")
    if seen is not None:
        peers = _dense_peers(q, k, v, causal=seen.causal, exact=False)
        if not seen.more:
            given = ", mask given" if row_of(name).family == "selected blocks" else ""
            peers[f"FlexAttention{FLEX.get(name, given)}"] = flex_call(q, k, v, seen, counts)
        if name == "longformer" and options.get("dilation", 1) == 1:
            half = options["window"] // 2
            peers["FlashAttention-2 window, without global tokens"] = _window(q, k, v, half, half)
        if name in SPARSE and importlib.util.find_spec("fla"):
            peers |= dict([SPARSE[name](options, **inputs)])
        return peers
    if options.get("sink_logits") is not None or name not in (
        "softmax_attention",
        "sliding_window",
        "streaming_llm",
        "block_streaming",
    ):
        return {}
    return _softmax_peers(name, options, **inputs)


FLEX = {
    "longnet": ", pairs of several patterns once",
    "longformer": ", global tokens without own projections",
}
"""Method -> what FlexAttention with its mask computes otherwise."""


def _softmax_peers(name, options, q, k, v):
    full = name == "softmax_attention" and options.get("window") is None
    peers = _dense_peers(q, k, v, causal=options.get("causal", True), exact=full)
    tokens = options.get("window") or options.get("local_blocks", 0) * options.get("block_size", 0)
    if tokens:
        sinks = options.get("sinks") or options.get("sink_blocks")
        label = "FlashAttention-2 window" + (", without sinks" if sinks else "")
        peers[label] = _window(q, k, v, tokens - 1, 0)
    return peers


def _dense_peers(q, k, v, *, causal, exact):
    """torch's attention to all tokens; the label says so unless that is what the op computes."""
    heads = [x.transpose(1, 2) for x in (q, k, v)]  # [B, H, T, K], as torch has them
    grouped = q.shape[2] != k.shape[2]
    extra = "" if exact else ", all earlier tokens" if causal else ", all tokens"

    def sdpa(backend):
        def call():
            with sdpa_kernel(backend):
                o = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=grouped)
            return o.transpose(1, 2)

        return call

    return {
        f"SDPA FlashAttention-2{extra}": sdpa(SDPBackend.FLASH_ATTENTION),
        f"SDPA cuDNN{extra}": sdpa(SDPBackend.CUDNN_ATTENTION),
    }


def _window(q, k, v, left, right):
    """FlashAttention-2 inside torch, [B, T, H, K]; `left` and `right` tokens beside the query's own."""

    def call():
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, right == 0, False,
            window_size_left=left, window_size_right=right,
        )[0]  # fmt: skip

    return call


def forget_tuning():
    """Empty the caches of all of Triton's autotuners: a peer tunes itself again for the shape that follows.

    Their keys leave out T, so that a first short call would fix a poor configuration for the long ones.
    """
    from triton.runtime.autotuner import Autotuner

    for found in gc.get_objects():
        # the type, not isinstance: that would wake lazy proxies
        if type(found) is Autotuner or type(found).__mro__[1:2] == (Autotuner,):
            found.cache.clear()
