"""What others offer for the same task, timed in the same run: torch's attention, fla's ops if installed."""

import gc
import importlib.util

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from effattn_lite.bench.fla_peers import FLA

__all__ = ["forget_tuning", "peers_of"]


def peers_of(name, inputs, options):
    """Other implementations: label -> a call without arguments that returns o.

    Each label says where the peer computes something else than the op does.
    """
    if not next(iter(inputs.values())).is_cuda:
        return {}
    if name in FLA:
        return dict([FLA[name](**inputs)]) if importlib.util.find_spec("fla") else {}
    if options.get("sink_logits") is not None or name not in (
        "softmax_attention",
        "sliding_window",
        "streaming_llm",
        "block_streaming",
    ):
        return {}
    return _softmax_peers(name, options, **inputs)


def _softmax_peers(name, options, q, k, v):
    causal = options.get("causal", True)
    heads = [x.transpose(1, 2) for x in (q, k, v)]  # [B, H, T, K], as torch has them

    def sdpa(backend):
        def call():
            with sdpa_kernel(backend):
                o = F.scaled_dot_product_attention(
                    *heads, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]
                )
            return o.transpose(1, 2)

        return call

    def window(tokens):
        def call():
            # FlashAttention-2 inside torch, [B, T, H, K]; the window counts tokens on the left of the query
            return torch.ops.aten._flash_attention_forward(
                q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False,
                window_size_left=tokens - 1, window_size_right=0,
            )[0]  # fmt: skip

        return call

    full = name == "softmax_attention" and options.get("window") is None
    extra = "" if full else ", all earlier tokens"
    peers = {
        f"SDPA FlashAttention-2{extra}": sdpa(SDPBackend.FLASH_ATTENTION),
        f"SDPA cuDNN{extra}": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    tokens = options.get("window") or options.get("local_blocks", 0) * options.get("block_size", 0)
    if tokens:
        sinks = options.get("sinks") or options.get("sink_blocks")
        peers["FlashAttention-2 window" + (", without sinks" if sinks else "")] = window(tokens)
    return peers


def forget_tuning():
    """Empty the caches of all of Triton's autotuners: a peer tunes itself again for the shape that follows.

    Their keys leave out T, so that a first short call would fix a poor configuration for the long ones.
    """
    from triton.runtime.autotuner import Autotuner

    for found in gc.get_objects():
        # the type, not isinstance: that would wake lazy proxies
        if type(found) is Autotuner or type(found).__mro__[1:2] == (Autotuner,):
            found.cache.clear()
