"""Decoding with a cache that grows: one token of one sequence reads what it selects of many cached ones."""

import importlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from effattn_lite.bench.decode import replayed_ms
from effattn_lite.bench.memory import peak_mib
from effattn_lite.bench.time_op import time_ms
from effattn_lite.ops.engines import decode

__all__ = ["FEATURES", "cached_rows", "cached_shapes", "decoded", "reads"]

FEATURES = {
    "quest": lambda T, K, options: T // options.get("page_size", 16) * 2 * K,
    "resa": lambda T, K, options: T // options.get("page_size", 16) * 2 * K,
    "double_sparsity": lambda T, K, options: T * torch.as_tensor(options["channels"]).shape[-1],
}
"""Method -> numbers a key head that the selection itself reads of T cached tokens."""


def cached_shapes(device, lengths=None):
    """Sizes to run at, T the cached tokens: 32 query and 8 key heads of 128 on the GPU; less on the CPU."""
    gpu = device != "cpu"
    size = dict(B=1, H=32, HKV=8, K=128, V=128) if gpu else dict(B=1, H=4, HKV=2, K=32, V=32)
    return [size | {"T": T} for T in lengths or ((32_768, 131_072, 1_048_576) if gpu else (128, 512))]


def reads(name, q, cache, options):
    """Bytes that one token must read and write: what selects, the chosen keys and values, q and o.

    The keys and values that the query heads of a key head choose are counted once.

    Args:
        name: a method of FEATURES.
        q: the token's queries, [B, H, K].
        cache: `KVCache` of T tokens.
        options: static arguments of the op.
    """
    (B, T, HKV, K), V, size = cache.k.shape, cache.v.shape[3], q.element_size()
    chosen = importlib.import_module(f"effattn_lite.ops.{name}").select(q[:, None], cache.k, **options)
    page = options.get("page_size", 16) if name != "double_sparsity" else 1
    # [B, 1, HS, n] -> [B, HKV, HS / HKV n]: the sets of a key head's query heads together
    chosen = chosen[:, 0].unflatten(1, (HKV, -1)).flatten(2).long()
    j = (chosen[..., None] * page + torch.arange(page, device=q.device)).flatten(2)
    seen = torch.zeros((B, HKV, T + 1), dtype=torch.bool, device=q.device)
    seen.scatter_(2, j.where((j >= 0) & (j < T), T), True)
    tokens = int(seen[..., :T].sum())
    numbers = tokens * (K + V) + B * HKV * FEATURES[name](T, K, options) + q.numel() * (1 + V / K)
    return int(numbers * size)


def decoded(name, q, cache, arguments, *, impl):
    """A call that decodes one token, q [B, H, K], and returns o."""
    op = getattr(importlib.import_module(f"effattn_lite.ops.{name}"), name)
    return lambda: op(q, cache, **arguments, impl=impl)


def cached_rows(name, q, cache, arguments, base, *, device, ceiling, peers=True):
    """Rows of one length: the op as called and replayed, and attention to the whole cache.

    The floor is the bytes of `reads` over the copy bandwidth; of dense attention, those of the whole cache.

    Args:
        name: a method of FEATURES.
        q: the newest token's queries, [B, H, K].
        cache: `KVCache` of T tokens.
        arguments: static arguments of the op.
        base: keys that all rows share.
        peers: dense attention too.
    """
    gpu = device != "cpu"
    floor = reads(name, q, cache, arguments) / ceiling["copy_tb_s"] / 1e9
    whole = (2 * q.nbytes + cache.k.nbytes + cache.v.nbytes) / ceiling["copy_tb_s"] / 1e9
    own = "triton" if gpu else "torch"
    calls = {own: decoded(name, q, cache, arguments, impl=own)}
    for impl, call in (calls | (_dense(q, cache) if peers and gpu else {})).items():
        row = base | {"pass": "decode", "floor_ms": whole if impl != own else floor}
        try:
            yield row | {
                "impl": impl,
                "ms": time_ms(call, device=device),
                "peak_mib": peak_mib(call, device=device),
            }
            if impl == own and gpu:
                yield row | {"impl": f"{own}, CUDA graph", "ms": replayed_ms(call, device), "peak_mib": None}
        except RuntimeError as error:
            # a call that waits for the device cannot be captured: a row less, no failed run
            print(f"{impl}, T = {len(cache)}, decode: {str(error).partition(chr(10))[0]}")


def _dense(q, cache):
    """Attention of one token to all tokens: torch's kernels, and this package's."""
    grouped = q.shape[1] != cache.k.shape[2]
    heads = q[:, :, None], cache.k.transpose(1, 2), cache.v.transpose(1, 2)

    def sdpa(backend):
        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads, enable_gqa=grouped)

        return call

    def own():
        return decode.attend(q[:, None], cache.k, cache.v, None, impl="triton")[0]

    return {
        "SDPA FlashAttention-2, all tokens": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN, all tokens": sdpa(SDPBackend.CUDNN_ATTENTION),
        "decode kernel, all tokens": own,
    }
