"""Attention to summaries of spans: the forward kernel, and the launches of all kernels of NSA's own.

A program owns BM queries of one head. It walks over the spans that have ended with its queries: first over
those that every query sees, without a mask, then over the others. The selected blocks and the window are
attended to by the kernels of token_sparse and softmax_attention.
float32 inputs use float32 products ("ieee"), not TF32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.softmax import online_step
from effattn_lite.kernels.common.tile import load_tile, store_tile
from effattn_lite.kernels.nsa_bwd import ended, locate_spans, nsa_bwd_dkdv_kernel, nsa_bwd_dq_kernel
from effattn_lite.kernels.nsa_launch import Sequences, select_tile, sizes_of, tile_of, tilings
from effattn_lite.kernels.nsa_select import nsa_select_kernel


@triton.jit(do_not_specialize=["T", "Tk", "NC", "NT"])
def nsa_fwd_kernel(
    q, k, v, o, lse, cu_seqlens, tiles, firsts, T, Tk, NC, NT, H, G, size, stride, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """Outputs [BM, V] and lse [BM] of one tile of queries; G query heads share a key head."""
    i_t, i_bh = tl.program_id(0) % NT, (tl.program_id(0) // NT).to(tl.int64)
    if not VARLEN:  # later ones first, since they have most to do
        i_t = NT - 1 - i_t
    i_b, i_h = i_bh // H, i_bh % H
    i_x, bos, sos, T_n, NC_n, off = locate_spans(cu_seqlens, tiles, firsts, i_t, T, Tk, NC, VARLEN)
    first = i_x * BM
    rows = T_n - first
    if rows <= 0:
        return
    q += i_b * q_b + (bos + first) * q_t + i_h * q_h
    k += i_b * k_b + sos * k_t + i_h // G * k_h
    v += i_b * v_b + sos * v_t + i_h // G * v_h
    b_q = load_tile(q, q_t, rows, K, BM, BK, True)
    b_o, b_l = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    o_r, o_n, factor = tl.arange(0, BM), tl.arange(0, BN), scale * 1.4426950408889634
    b_end = ended(off + first + o_r, size, stride)
    whole = ended(off + first, size, stride) // BN
    every = tl.cdiv(ended(off + first + tl.minimum(rows, BM) - 1, size, stride), BN)
    # [sketch:fwd]
    for n in range(0, whole):  # every query sees all of these spans
        b_k = load_tile(k + tl.cast(n * BN, tl.int64) * k_t, k_t, BN, K, BN, BK, False)
        b_v = load_tile(v + tl.cast(n * BN, tl.int64) * v_t, v_t, BN, V, BN, BV, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, False)
    for n in range(whole, every):  # some of these have not ended for some queries
        b_k = load_tile(k + tl.cast(n * BN, tl.int64) * k_t, k_t, NC_n - n * BN, K, BN, BK, True)
        b_v = load_tile(v + tl.cast(n * BN, tl.int64) * v_t, v_t, NC_n - n * BN, V, BN, BV, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s = tl.where(n * BN + o_n[None, :] < b_end[:, None], b_s, float("-inf"))
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, True)
    # [/sketch:fwd]
    b_full = tl.where(b_l == 0, 1.0, b_l)
    row = (i_b * T + bos + first) * H + i_h
    store_tile(o + row * V, b_o / b_full[:, None], H * V, rows, V, BM, BV)
    b_lse = tl.where(b_l == 0, float("-inf"), (b_m + tl.log2(b_full)) * 0.6931471805599453)
    tl.store(lse + (i_b * H + i_h) * T + bos + first + o_r, b_lse, mask=o_r < rows)


def forward(q, k, v, cu_seqlens, spans, *, tuning=None):
    """o [B, T, H, V] and lse [B, T, H]; `tuning` overrides the table's choice."""
    (B, T, H, _), V = q.shape, v.shape[3]
    q, k, v = map(launch.readable, (q, k, v))
    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel():
        text, (tile, options) = Sequences(q, k, cu_seqlens, spans), tile_of("fwd", q, v, tuning)
        with launch.on_device(q):
            where = text.tiles(tile["BM"])
            nsa_fwd_kernel[(B * H * where[-1],)](
                q, k, v, o, lse, *where, *text.sizes(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                VARLEN=cu_seqlens is not None, **tile, **options,
            )  # fmt: skip
    return o, lse.transpose(1, 2)


def backward(do, dlse, q, k, v, o, lse, cu_seqlens, spans, *, tuning=None):
    """dq, dk, dv; `tuning` overrides the table, for dq and for dkdv."""
    q, k, v = map(launch.readable, (q, k, v))
    o, do = o.contiguous(), do.contiguous()
    lse = lse.transpose(1, 2).contiguous()
    dlse = None if dlse is None else dlse.transpose(1, 2).contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    (B, _, H, _), HKV = q.shape, k.shape[2]
    # rows of k that are no span of any sequence get no gradient
    make = torch.zeros if cu_seqlens is not None or not o.numel() else torch.empty
    parts = [make((*x.shape[:2], H, x.shape[3]), dtype=torch.float32, device=q.device) for x in (k, v)]
    if o.numel():
        delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
        text, varlen = Sequences(q, k, cu_seqlens, spans), dict(VARLEN=cu_seqlens is not None)
        last = *text.sizes(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
        tile, options = tile_of("dq", q, v, tuning and tuning[0])
        with launch.on_device(q):
            where = text.tiles(tile["BM"])
            nsa_bwd_dq_kernel[(B * H * where[-1],)](
                q, k, v, o, do, lse, dlse, delta, dq, *where, *last, **varlen, **tile, **options
            )
            tile, options = tile_of("dkdv", q, v, tuning and tuning[1])
            where = text.tiles(tile["BN"], of_spans=True)
            if where[-1]:
                nsa_bwd_dkdv_kernel[(B * H * where[-1],)](
                    q, k, v, do, lse, delta, *parts, *where, *last, **varlen, **tile, **options
                )
    dk, dv = (x.unflatten(2, (HKV, H // HKV)).sum(3).to(q.dtype) for x in parts)
    return dq, dk, dv


def select(q, k, lse, cu_seqlens, spans, block_size, top_n):
    """The best blocks of every token, [B, T, HKV, min(top_n, ceil(Tk / BS))]."""
    q, k = map(launch.readable, (q, k))
    (B, T, H, _), HKV = q.shape, k.shape[2]
    n = min(top_n, launch.cdiv(spans.tokens, block_size))
    best = torch.empty((B, T, HKV, n), dtype=torch.int32, device=q.device)
    if best.numel():
        lse = lse.transpose(1, 2).contiguous()
        text = Sequences(q, k, cu_seqlens, spans)
        H, G, size, stride, scale = text.sizes()
        tile, options = select_tile(launch.capability(q), q.shape[3], G, n, q.element_size())
        with launch.on_device(q):
            where = text.tiles(tile["BT"])
            nsa_select_kernel[(B * HKV * where[-1],)](
                q, k, lse, best, *where, n, H, G, scale, *q.stride()[:3], *k.stride()[:3],
                SIZE=size, STRIDE=stride, BS=block_size, VARLEN=cu_seqlens is not None, **tile, **options,
            )  # fmt: skip
    return best


def variants(capability=80):
    """Compilations that stand for all: (name, kernel, signature, constants, options), by capability."""
    yield from _variants(capability, "fp16", 128, False)
    yield from _variants(capability, "fp16", 256, False)
    yield from _variants(capability, "bf16", 64, True)
    yield from _variants(capability, "fp32", 64, False)
    if capability >= 80:
        yield from _variants(capability, "fp32", 256, True)
    for kind, width, G in (("fp16", 128, 16), ("bf16", 256, 1), ("fp32", 64, 4)):
        tile, options = select_tile(capability, width, G, 16, 4 if kind == "fp32" else 2)
        constants = tile | dict(SIZE=32, STRIDE=16, BS=64, VARLEN=G == 4)
        yield _variant(nsa_select_kernel, kind, f"{kind}-{width}-{G}", constants, options)


def _variants(capability, kind, width, varlen):
    for name, kernel in (
        ("fwd", nsa_fwd_kernel),
        ("dq", nsa_bwd_dq_kernel),
        ("dkdv", nsa_bwd_dkdv_kernel),
    ):
        for tuning in tilings(name, capability, width, 4 if kind == "fp32" else 2):
            tile, options = sizes_of(tuning, width, width)
            yield _variant(kernel, kind, f"{kind}-{width}-{tuning}", tile | dict(VARLEN=varlen), options)


def _variant(kernel, kind, label, constants, options):
    constants = {x.name: constants[x.name] for x in kernel.params if x.is_constexpr}
    signature = {arg: "constexpr" if arg in constants else _kind(arg, kind) for arg in kernel.arg_names}
    return f"{kernel.fn.__name__}-{label}", kernel, signature, constants, options


def _kind(arg, kind):
    """Type of an argument in the notation of Triton's signatures."""
    if arg in ("q", "k", "v", "o", "do", "dq"):
        return f"*{kind}"
    if arg in ("lse", "dlse", "delta", "dk", "dv"):
        return "*fp32"
    if arg in ("best", "cu_seqlens", "tiles", "firsts"):
        return "*i32"
    return {"scale": "fp32"}.get(arg, "i32")
