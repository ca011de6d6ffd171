"""Gradients of attention to summaries: one kernel along the queries gives dq, one along the spans dk and dv.

Both compute the weights again from the scores and lse. With delta_t = do_t . o_t - dlse_t, the gradient of a
score is p_ti (do_t . v_i - delta_t). The second kernel has a program a query head, and computes its products
as [spans, queries], so that no result has to be turned before the next one.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.softmax import load_lse
from effattn_lite.kernels.common.tile import load_tile, store_tile


@triton.jit
def locate_spans(cu_seqlens, tiles, firsts, i_t, T, Tk, NC, VARLEN: tl.constexpr):
    """Of the i_t-th tile: its number in its sequence, and that sequence.

    Returns:
        i_x; bos, sos: the sequence's first token and first span (int64); T, NC: how many it has; off: place
        of its first query in the text. With VARLEN a tile of no sequence has T = NC = 0.
    """
    if VARLEN:
        i_n = tl.load(tiles + 2 * i_t)
        i_x, n = tl.load(tiles + 2 * i_t + 1), tl.maximum(i_n, 0)
        bos, sos = tl.load(cu_seqlens + n).to(tl.int64), tl.load(firsts + n).to(tl.int64)
        T_n = tl.load(cu_seqlens + n + 1).to(tl.int64) - bos
        NC_n = tl.load(firsts + n + 1).to(tl.int64) - sos
        there = tl.cast(i_n >= 0, tl.int64)
        return i_x, bos, sos, (T_n * there).to(tl.int32), (NC_n * there).to(tl.int32), i_x * 0
    else:
        zero = tl.cast(i_t, tl.int64) * 0
        return i_t, zero, zero, T, NC, Tk - T


@triton.jit
def ended(place, size, stride):
    """How many spans have ended with the token at this place of the text."""
    return tl.maximum(place + 1 - size + stride, 0) // stride


@triton.jit
def dq_step(
    b_dq, b_q, b_do, b_lse, b_delta, k, k_t, v, v_t, spans, b_end, factor,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Add a tile of spans to dq; CUT: row r sees the first b_end[r] of them, and `spans` are there."""
    b_k = load_tile(k, k_t, spans, K, BN, BK, CUT)
    b_v = load_tile(v, v_t, spans, V, BN, BV, CUT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
    b_p = tl.exp2(b_s * factor - b_lse[:, None])
    if CUT:
        # the exponent of an unseen score may overflow: it is not multiplied but replaced
        b_p = tl.where(tl.arange(0, BN)[None, :] < b_end[:, None], b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BM, BV] @ [BV, BN] -> [BM, BN]
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")  # [BM, BN] @ [BN, BK] -> [BM, BK]


@triton.jit(do_not_specialize=["T", "Tk", "NC", "NT"])
def nsa_bwd_dq_kernel(
    q, k, v, o, do, lse, dlse, delta, dq, cu_seqlens, tiles, firsts, T, Tk, NC, NT, H, G, size, stride, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """dq [BM, K] and delta [BM] of one tile of queries."""
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
    row = (i_b * T + bos + first) * H + i_h
    b_q = load_tile(q, q_t, rows, K, BM, BK, True)
    b_do = load_tile(do + row * V, H * V, rows, V, BM, BV, True)
    b_o = load_tile(o + row * V, H * V, rows, V, BM, BV, True)
    # lse, dlse and delta lie as [B, H, T]
    t, o_r = (i_b * H + i_h) * T + bos + first, tl.arange(0, BM)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + t + o_r, mask=o_r < rows, other=0.0)
    tl.store(delta + t + o_r, b_delta, mask=o_r < rows)
    b_lse = load_lse(lse + t, rows, BM)
    b_dq = tl.zeros([BM, BK], tl.float32)
    factor = scale * 1.4426950408889634
    b_end = ended(off + first + o_r, size, stride)
    whole = ended(off + first, size, stride) // BN
    every = tl.cdiv(ended(off + first + tl.minimum(rows, BM) - 1, size, stride), BN)
    for n in range(0, whole):
        p_k, p_v = k + tl.cast(n * BN, tl.int64) * k_t, v + tl.cast(n * BN, tl.int64) * v_t
        b_dq = dq_step(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, k_t, p_v, v_t, BN, b_end, factor, K, V, BK, BV, BN, False
        )
    for n in range(whole, every):
        p_k, p_v = k + tl.cast(n * BN, tl.int64) * k_t, v + tl.cast(n * BN, tl.int64) * v_t
        b_dq = dq_step(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, k_t, p_v, v_t, NC_n - n * BN, b_end - n * BN, factor,
            K, V, BK, BV, BN, True,
        )  # fmt: skip
    store_tile(dq + row * K, b_dq * scale, H * K, rows, K, BM, BK)


@triton.jit(do_not_specialize=["T", "Tk", "NC", "NT"])
def nsa_bwd_dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, cu_seqlens, tiles, firsts, T, Tk, NC, NT, H, G, size, stride, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """A query head's part of dk [BN, K] and dv [BN, V] of a tile of spans, in float32, [B, NC, H, K or V]."""
    i_t, i_bh = tl.program_id(0) % NT, (tl.program_id(0) // NT).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_x, bos, sos, T_n, NC_n, off = locate_spans(cu_seqlens, tiles, firsts, i_t, T, Tk, NC, VARLEN)
    first = i_x * BN
    spans = NC_n - first
    if spans <= 0:
        return
    k += i_b * k_b + (sos + first) * k_t + i_h // G * k_h
    v += i_b * v_b + (sos + first) * v_t + i_h // G * v_h
    b_k = load_tile(k, k_t, spans, K, BN, BK, True)
    b_v = load_tile(v, v_t, spans, V, BN, BV, True)
    b_dk, b_dv = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    q += i_b * q_b + bos * q_t + i_h * q_h
    do += ((i_b * T + bos) * H + i_h) * V
    t = (i_b * H + i_h) * T + bos
    o_n, o_r, factor = first + tl.arange(0, BN), tl.arange(0, BM), scale * 1.4426950408889634
    # the first query that sees the first span
    begin = tl.maximum(first * stride + size - 1 - off, 0) // BM
    for n in range(begin, tl.cdiv(T_n, BM)):
        i_m = n * BM
        p_m = tl.cast(i_m, tl.int64)
        b_q = load_tile(q + p_m * q_t, q_t, T_n - i_m, K, BM, BK, True)
        b_do = load_tile(do + p_m * H * V, H * V, T_n - i_m, V, BM, BV, True)
        b_lse = load_lse(lse + t + p_m, T_n - i_m, BM)
        b_delta = tl.load(delta + t + p_m + o_r, mask=o_r < T_n - i_m, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BN, BK] @ [BK, BM] -> [BN, BM]
        see = o_n[:, None] < ended(off + i_m + o_r, size, stride)[None, :]
        b_p = tl.where(see, tl.exp2(b_s * factor - b_lse[None, :]), 0.0)
        # [BN, BM] @ [BM, BV] -> [BN, BV]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BN, BV] @ [BV, BM] -> [BN, BM]
        b_ds = b_p * (b_dp - b_delta[None, :])
        # [BN, BM] @ [BM, BK] -> [BN, BK]
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    row = (i_b * NC + sos + first) * H + i_h
    store_tile(dk + row * K, b_dk * scale, H * K, spans, K, BN, BK)
    store_tile(dv + row * V, b_dv, H * V, spans, V, BN, BV)
