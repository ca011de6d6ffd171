"""Gradients of softmax attention: a kernel along the rows gives dq, one along the columns dk and dv.

Both compute the weights again from the scores and lse. With delta_t = do_t . o_t - dlse_t, the gradient of a
score is p_tj (do_t . v_j - delta_t). The second kernel computes its products as [keys, queries], so that no
result has to be turned before it enters the next product.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.softmax import capped, key_blocks, load_lse, query_blocks, visible
from effattn_lite.kernels.common.tile import edge_block, load_tile, locate, store_tile


@triton.jit
def score_gradient(b_p, b_dp, b_delta, b_s, softcap, SOFTCAP: tl.constexpr):
    """Gradient by the scores, before the scale: through the softmax and, if any, the cap."""
    b_ds = b_p * (b_dp - b_delta)
    if SOFTCAP:
        b_ds = b_ds * (1 - (b_s / softcap) * (b_s / softcap))
    return b_ds


@triton.jit(do_not_specialize=["Tq", "Tk", "NT", "window", "sinks"])
def softmax_attention_bwd_dq_kernel(
    q, k, v, o, do, lse, dlse, delta, dq, cu_seqlens, tiles,
    Tq, Tk, NT, H, G, window, sinks, scale, softcap,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, GRAIN: tl.constexpr,
    SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """dq [BM, K] and delta [BM] of one tile of queries."""
    i_bh, i_t, bos, T, Tk = locate(cu_seqlens, tiles, Tq, Tk, NT, VARLEN, CAUSAL and not VARLEN)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_m = i_t * BM
    row = i_b * Tq + bos + i_m
    q += i_b * q_b + (bos + i_m) * q_t + i_h * q_h
    k += i_b * k_b + bos * k_t + i_h // G * k_h
    v += i_b * v_b + bos * v_t + i_h // G * v_h
    b_q = load_tile(q, q_t, T - i_m, K, BM, BK, True)
    b_do = load_tile(do + (row * H + i_h) * V, H * V, T - i_m, V, BM, BV, True)
    b_o = load_tile(o + (row * H + i_h) * V, H * V, T - i_m, V, BM, BV, True)
    # lse, dlse and delta lie as [B, H, T]
    line = (i_b * H + i_h) * Tq + bos + i_m
    o_r = tl.arange(0, BM)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + line + o_r, mask=o_r < T - i_m, other=0.0)
    tl.store(delta + line + o_r, b_delta, mask=o_r < T - i_m)
    b_lse = load_lse(lse + line, T - i_m, BM)
    b_dq = tl.zeros([BM, BK], tl.float32)

    first, last = i_m + Tk - T, tl.minimum(i_m + BM, T) - 1 + Tk - T
    a, b, c, d, before = key_blocks(first, last, Tk, window, sinks, BN, CAUSAL, WINDOW, SINKS, GRAIN)
    o_t = first + o_r
    factor = 1.4426950408889634 if SOFTCAP else scale * 1.4426950408889634
    for i_n in range(b, c):
        b_k = load_tile(k + tl.cast(i_n, tl.int64) * BN * k_t, k_t, BN, K, BN, BK, False)
        b_v = load_tile(v + tl.cast(i_n, tl.int64) * BN * v_t, v_t, BN, V, BN, BV, False)
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s = capped(b_s, scale, softcap, SOFTCAP)
        b_p = tl.exp2(b_s * factor - b_lse[:, None])
        # [BM, BV] @ [BV, BN] -> [BM, BN]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = score_gradient(b_p, b_dp, b_delta[:, None], b_s, softcap, SOFTCAP)
        b_dq = tl.dot(
            b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee"
        )  # [BM, BN] @ [BN, BK] -> [BM, BK]
    for n in range(0, before + b - a + d - c):
        i_n = edge_block(n, before, a, b, c)
        b_k = load_tile(k + tl.cast(i_n, tl.int64) * BN * k_t, k_t, Tk - i_n * BN, K, BN, BK, True)
        b_v = load_tile(v + tl.cast(i_n, tl.int64) * BN * v_t, v_t, Tk - i_n * BN, V, BN, BV, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s = capped(b_s, scale, softcap, SOFTCAP)
        o_j = i_n * BN + tl.arange(0, BN)
        see = visible(o_t[:, None], o_j[None, :], Tk, window, sinks, CAUSAL, WINDOW, SINKS, GRAIN)
        # the exponent of an unseen score may overflow: it is not multiplied but replaced
        b_p = tl.where(see, tl.exp2(b_s * factor - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = score_gradient(b_p, b_dp, b_delta[:, None], b_s, softcap, SOFTCAP)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    store_tile(dq + (row * H + i_h) * K, b_dq * scale, H * K, T - i_m, K, BM, BK)


@triton.jit(do_not_specialize=["Tq", "Tk", "NT", "window", "sinks", "NS", "NR", "L"])
def softmax_attention_bwd_dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, dk_part, dv_part, cu_seqlens, tiles,
    Tq, Tk, NT, NS, NR, L, H, G, window, sinks, scale, softcap,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, GRAIN: tl.constexpr,
    SOFTCAP: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk [BN, K] and dv [BN, V] of one tile of keys, summed over the query heads that the key head serves.

    All queries see the sinks. With SPLIT the first NS tiles share them among NR programs, L blocks of queries
    each, which leave float32 parts in dk_part and dv_part, [B, NR, NS BN, HKV, K or V].
    """
    i_bh, i_t, bos, T, T_k = locate(cu_seqlens, tiles, Tq, Tk, NT, VARLEN, False)
    i_r = 0
    if SPLIT:  # the programs behind the last tile
        i_x = i_t - tl.cdiv(Tk, BN)
        i_r = tl.where(i_x < 0, 0, 1 + i_x // NS)
        i_t = tl.where(i_x < 0, i_t, i_x % NS)
    HKV = H // G
    i_b, i_h = (i_bh // HKV).to(tl.int64), (i_bh % HKV).to(tl.int64)
    i_n = i_t * BN
    k += i_b * k_b + (bos + i_n) * k_t + i_h * k_h
    v += i_b * v_b + (bos + i_n) * v_t + i_h * v_h
    b_k = load_tile(k, k_t, T_k - i_n, K, BN, BK, True)
    b_v = load_tile(v, v_t, T_k - i_n, V, BN, BV, True)
    b_dk, b_dv = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)

    first, last = i_n, tl.minimum(i_n + BN, T_k) - 1
    a, b, c, d = query_blocks(first, last, T, T_k, window, sinks, BM, CAUSAL, WINDOW, SINKS, GRAIN)
    if SPLIT:
        start = a + i_r * L
        stop = tl.where(i_n < NS * BN, start + L, d)
        a, b = tl.minimum(tl.maximum(a, start), stop), tl.minimum(tl.maximum(b, start), stop)
        c, d = tl.minimum(tl.maximum(c, start), stop), tl.minimum(tl.maximum(d, start), stop)
    o_j = i_n + tl.arange(0, BN)
    factor = 1.4426950408889634 if SOFTCAP else scale * 1.4426950408889634
    for i_g in range(0, G):
        i_q = i_h * G + i_g
        p_q = q + i_b * q_b + bos * q_t + i_q * q_h
        p_do = do + ((i_b * Tq + bos) * H + i_q) * V
        line = (i_b * H + i_q) * Tq + bos
        # [sketch:bwd]
        for i_t in range(b, c):  # every query sees all keys of the tile
            i_m = tl.cast(i_t, tl.int64) * BM
            b_q = load_tile(p_q + i_m * q_t, q_t, BM, K, BM, BK, False)
            b_do = load_tile(p_do + i_m * H * V, H * V, BM, V, BM, BV, False)
            b_lse = load_lse(lse + line + i_m, BM, BM)
            b_delta = tl.load(delta + line + i_m + tl.arange(0, BM))
            # [BN, BK] @ [BK, BM] -> [BN, BM]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            b_s = capped(b_s, scale, softcap, SOFTCAP)
            b_p = tl.exp2(b_s * factor - b_lse[None, :])
            # [BN, BM] @ [BM, BV]
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            # [BN, BV] @ [BV, BM] -> [BN, BM]
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            b_ds = score_gradient(b_p, b_dp, b_delta[None, :], b_s, softcap, SOFTCAP)
            # [BN, BM] @ [BM, BK]
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        # [/sketch:bwd]
        for n in range(0, b - a + d - c):
            i_t = edge_block(n, 0, a, b, c)
            i_m = tl.cast(i_t, tl.int64) * BM
            rows = T - i_t * BM
            b_q = load_tile(p_q + i_m * q_t, q_t, rows, K, BM, BK, True)
            b_do = load_tile(p_do + i_m * H * V, H * V, rows, V, BM, BV, True)
            b_lse = load_lse(lse + line + i_m, rows, BM)
            o_r = tl.arange(0, BM)
            b_delta = tl.load(delta + line + i_m + o_r, mask=o_r < rows, other=0.0)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            b_s = capped(b_s, scale, softcap, SOFTCAP)
            o_t = i_t * BM + o_r + T_k - T
            see = visible(o_t[None, :], o_j[:, None], T_k, window, sinks, CAUSAL, WINDOW, SINKS, GRAIN)
            b_p = tl.where(see, tl.exp2(b_s * factor - b_lse[None, :]), 0.0)
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            b_ds = score_gradient(b_p, b_dp, b_delta[None, :], b_s, softcap, SOFTCAP)
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    b_dk *= scale
    row, rows = (i_b * Tk + bos + i_n) * HKV + i_h, T_k - i_n
    if SPLIT:
        if i_n < NS * BN:
            part = ((i_b * NR + i_r) * NS * BN + i_n) * HKV + i_h
            store_tile(dk_part + part * K, b_dk, HKV * K, rows, K, BN, BK)
            store_tile(dv_part + part * V, b_dv, HKV * V, rows, V, BN, BV)
            rows = 0
    store_tile(dk + row * K, b_dk, HKV * K, rows, K, BN, BK)
    store_tile(dv + row * V, b_dv, HKV * V, rows, V, BN, BV)
