"""Softmax attention in one pass over the keys: the forward kernel, the launches, and their tuning.

A program owns BM queries of one head. It walks over the blocks of keys that its rows see and no others: first
those that every row sees wholly, without a mask, then the edges (sinks, window's begin, diagonal) with one.
Keys and values of a group of query heads are read where they lie; nothing is repeated in memory.
float32 inputs use float32 products ("ieee"), not TF32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.softmax import capped, key_blocks, online_step, visible
from effattn_lite.kernels.common.softmax_tuning import candidates
from effattn_lite.kernels.common.tile import edge_block, load_tile, locate, store_tile
from effattn_lite.kernels.softmax_attention_bwd import (
    softmax_attention_bwd_dkdv_kernel,
    softmax_attention_bwd_dq_kernel,
)

MIN_RANGE = 32
"""Blocks of queries that one program of the sinks' gradient takes at least."""


@triton.jit(do_not_specialize=["Tq", "Tk", "NT", "window", "sinks"])
def softmax_attention_fwd_kernel(
    q, k, v, o, lse, sink_logits, cu_seqlens, tiles,
    Tq, Tk, NT, H, G, window, sinks, scale, softcap,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, GRAIN: tl.constexpr,
    LOGITS: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Outputs [BM, V] and lse [BM] of one tile of queries."""
    i_bh, i_t, bos, T, Tk = locate(cu_seqlens, tiles, Tq, Tk, NT, VARLEN, CAUSAL and not VARLEN)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_m = i_t * BM
    q += i_b * q_b + (bos + i_m) * q_t + i_h * q_h
    k += i_b * k_b + bos * k_t + i_h // G * k_h
    v += i_b * v_b + bos * v_t + i_h // G * v_h
    b_q = load_tile(q, q_t, T - i_m, K, BM, BK, True)
    b_o, b_l = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)

    # positions of the first and last row, and the blocks of keys that they see
    first, last = i_m + Tk - T, tl.minimum(i_m + BM, T) - 1 + Tk - T
    a, b, c, d, before = key_blocks(first, last, Tk, window, sinks, BN, CAUSAL, WINDOW, SINKS, GRAIN)
    o_t = first + tl.arange(0, BM)
    factor = 1.4426950408889634 if SOFTCAP else scale * 1.4426950408889634  # exp(x) = exp2(factor x)
    # [sketch:fwd]
    for i_n in range(b, c):  # every row sees the whole block
        b_k = load_tile(k + tl.cast(i_n, tl.int64) * BN * k_t, k_t, BN, K, BN, BK, False)
        b_v = load_tile(v + tl.cast(i_n, tl.int64) * BN * v_t, v_t, BN, V, BN, BV, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_s = capped(b_s, scale, softcap, SOFTCAP)
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, False)
    for n in range(0, before + b - a + d - c):  # some rows see some of the block
        i_n = edge_block(n, before, a, b, c)
        b_k = load_tile(k + tl.cast(i_n, tl.int64) * BN * k_t, k_t, Tk - i_n * BN, K, BN, BK, True)
        b_v = load_tile(v + tl.cast(i_n, tl.int64) * BN * v_t, v_t, Tk - i_n * BN, V, BN, BV, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s = capped(b_s, scale, softcap, SOFTCAP)
        o_j = i_n * BN + tl.arange(0, BN)
        see = visible(o_t[:, None], o_j[None, :], Tk, window, sinks, CAUSAL, WINDOW, SINKS, GRAIN)
        b_s = tl.where(see, b_s, float("-inf"))
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, True)
    # [/sketch:fwd]
    if LOGITS:  # a key of its own, with value 0
        b_sink = tl.load(sink_logits + i_h).to(tl.float32) * 1.4426950408889634
        b_top = tl.maximum(b_m, b_sink)
        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_shrink = tl.exp2(b_m - b_top)
        b_l, b_o = b_l * b_shrink + tl.exp2(b_sink - b_top), b_o * b_shrink[:, None]
        b_m = b_top
    b_full = tl.where(b_l == 0, 1.0, b_l)
    o += ((i_b * Tq + bos + i_m) * H + i_h) * V
    store_tile(o, b_o / b_full[:, None], H * V, T - i_m, V, BM, BV)
    b_lse = tl.where(b_l == 0, float("-inf"), (b_m + tl.log2(b_full)) * 0.6931471805599453)
    o_r = tl.arange(0, BM)
    tl.store(lse + (i_b * H + i_h) * Tq + bos + i_m + o_r, b_lse, mask=o_r < T - i_m)


def forward(q, k, v, sink_logits, cu_seqlens, pattern, *, tuning=None):
    """o [B, T, H, V] and lse [B, T, H]; `tuning` overrides the table's choice."""
    (B, T, H, K), (_, Tk, HKV, V) = q.shape, v.shape
    q, k, v = map(launch.readable, (q, k, v))
    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel():
        BM, BN, warps, stages = tuning or _tuning("fwd", q, v)
        tiles, NT = _tiles(cu_seqlens, T, BM)
        with launch.on_device(q):
            softmax_attention_fwd_kernel[(NT * B * H,)](
                q, k, v, o, lse, sink_logits, cu_seqlens, tiles, T, Tk, NT, H, H // HKV,
                pattern.window, pattern.sinks, max(pattern.scale, 1e-30), pattern.softcap,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                **_constants(K, V, BM, BN, pattern, cu_seqlens), LOGITS=sink_logits is not None,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return o, lse.transpose(1, 2)


def backward(do, dlse, q, k, v, o, lse, cu_seqlens, pattern, *, tuning=None):
    """dq, dk, dv, and delta [B, T, H] = do . o - dlse; `tuning` overrides the table, for dq and for dkdv."""
    (B, T, H, K), (_, Tk, HKV, V) = q.shape, v.shape
    q, k, v = map(launch.readable, (q, k, v))
    o, do = o.contiguous(), do.contiguous()
    lse = lse.transpose(1, 2).contiguous()
    dlse = None if dlse is None else dlse.transpose(1, 2).contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    scalars = (H, H // HKV, pattern.window, pattern.sinks, max(pattern.scale, 1e-30), pattern.softcap)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if dq.numel():
        BM, BN, warps, stages = tuning[0] if tuning else _tuning("dq", q, v)
        tiles, NT = _tiles(cu_seqlens, T, BM)
        with launch.on_device(q):
            softmax_attention_bwd_dq_kernel[(NT * B * H,)](
                q, k, v, o, do, lse, dlse, delta, dq, cu_seqlens, tiles, T, Tk, NT, *scalars, *strides,
                **_constants(K, V, BM, BN, pattern, cu_seqlens), num_warps=warps, num_stages=stages,
            )  # fmt: skip
    if dk.numel():
        BM, BN, warps, stages = tuning[1] if tuning else _tuning("dkdv", q, v)
        tiles, NT = _tiles(cu_seqlens, Tk, BN)
        NS, NR, L = _ranges(T, Tk, BM, BN, pattern, cu_seqlens)
        NT += NS * (NR - 1)
        parts = (
            [torch.empty((B, NR, NS * BN, HKV, n), device=q.device) for n in (K, V)] if NR > 1 else [None] * 2
        )
        with launch.on_device(q):
            softmax_attention_bwd_dkdv_kernel[(NT * B * HKV,)](
                q, k, v, do, lse, delta, dk, dv, *parts, cu_seqlens, tiles,
                T, Tk, NT, NS, NR, L, *scalars, *strides, **_constants(K, V, BM, BN, pattern, cu_seqlens),
                SPLIT=NR > 1, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        if NR > 1:
            n = min(NS * BN, Tk)
            dk[:, :n], dv[:, :n] = (part[:, :, :n].sum(1) for part in parts)
    return dq, dk, dv, delta.transpose(1, 2)


def _tuning(kernel, q, v):
    width = max(launch.padded(q.shape[3]), launch.padded(v.shape[3]))
    return candidates(kernel, launch.capability(q), width, q.element_size())[0]


def _tiles(cu_seqlens, T, block):
    """The table of tiles, if sequences are packed, and the number of tiles of a head."""
    if cu_seqlens is None:
        return None, launch.cdiv(T, block)
    tiles = launch.tile_table(cu_seqlens, T, block)
    return tiles, tiles.shape[0]


def _ranges(T, Tk, BM, BN, pattern, cu_seqlens):
    """Tiles with sinks, ranges that the queries of such a tile fall into, blocks of queries in a range."""
    if cu_seqlens is not None or not (pattern.window and pattern.sinks):
        return 0, 1, 0
    # as long as a tile of the window takes, so that no program is waited for
    L = max(MIN_RANGE, launch.cdiv(pattern.window + BN, BM))
    return launch.cdiv(min(pattern.sinks, Tk), BN), max(1, launch.cdiv(launch.cdiv(T, BM), L)), L


def _constants(K, V, BM, BN, pattern, cu_seqlens):
    return dict(
        K=K, V=V, BK=launch.padded(K), BV=launch.padded(V), BM=BM, BN=BN,
        CAUSAL=pattern.causal, WINDOW=pattern.window > 0, SINKS=pattern.window > 0 and pattern.sinks > 0,
        GRAIN=pattern.grain, SOFTCAP=pattern.softcap > 0, VARLEN=cu_seqlens is not None,
    )  # fmt: skip


def variants(capability=80):
    """Compilations that stand for all: (name, kernel, signature, constants, options), by capability."""
    plain = dict(CAUSAL=True, WINDOW=False, SINKS=False, GRAIN=1, SOFTCAP=False, VARLEN=False)
    plain |= dict(LOGITS=False, SPLIT=False)
    window = dict(CAUSAL=True, WINDOW=True, SINKS=True, GRAIN=1, SOFTCAP=False, VARLEN=False)
    window |= dict(LOGITS=False, SPLIT=True)
    packed = dict(CAUSAL=True, WINDOW=True, SINKS=True, GRAIN=64, SOFTCAP=True, VARLEN=True)
    packed |= dict(LOGITS=True, SPLIT=False)
    yield from _variants(capability, "fp16", 128, "plain", plain)
    yield from _variants(capability, "fp16", 256, "plain", plain)
    yield from _variants(capability, "fp16", 64, "packed", packed)
    yield from _variants(capability, "bf16", 128, "window", window)
    yield from _variants(capability, "fp32", 64, "plain", plain)
    if capability >= 80:
        yield from _variants(capability, "fp32", 256, "plain", plain)


def _variants(capability, kind, width, label, flags):
    for name, kernel in (
        ("fwd", softmax_attention_fwd_kernel),
        ("dq", softmax_attention_bwd_dq_kernel),
        ("dkdv", softmax_attention_bwd_dkdv_kernel),
    ):
        for BM, BN, warps, stages in candidates(name, capability, width, 4 if kind == "fp32" else 2):
            constants = dict(K=width, V=width, BK=width, BV=width, BM=BM, BN=BN, **flags)
            signature = {arg: _kind(arg, kind, constants) for arg in kernel.arg_names}
            constants = {arg: x for arg, x in constants.items() if arg in signature}
            title = f"{name}-{kind}-{width}-{BM}x{BN}-{warps}-{stages}-{label}"
            yield title, kernel, signature, constants, dict(num_warps=warps, num_stages=stages)


def _kind(arg, kind, constants):
    """Type of an argument in the notation of Triton's signatures."""
    if arg in constants:
        return "constexpr"
    if arg in ("cu_seqlens", "tiles"):
        return "*i32"
    if arg in ("lse", "dlse", "delta", "sink_logits", "dk_part", "dv_part"):
        return "*fp32"
    if arg in ("q", "k", "v", "o", "do", "dq", "dk", "dv"):
        return f"*{kind}"
    return "fp32" if arg in ("scale", "softcap") else "i32"
