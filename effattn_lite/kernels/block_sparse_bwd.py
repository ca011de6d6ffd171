"""Gradients of block-sparse attention: one kernel along the rows gives dq, one along the columns dk and dv.

Both compute the weights again from the scores and lse. With delta_t = do_t . o_t - dlse_t, the gradient of a
score is p_tj (do_t . v_j - delta_t). The second kernel walks over the blocks of queries that chose a block of
keys, and computes its products as [keys, queries], so that no result has to be turned before the next one.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.block_sparse_lists import locate_block, query_tile
from effattn_lite.kernels.common.softmax import load_lse
from effattn_lite.kernels.common.tile import load_tile, store_tile


@triton.jit
def dq_step(
    b_dq, b_q, b_do, b_lse, b_delta, k, k_t, v, v_t, keys, offset, factor, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to dq; CUT: it has `keys` keys; row r sees the first `offset` + r + 1 of them."""
    b_k = load_tile(k, k_t, keys, K, BN, BK, CUT)
    b_v = load_tile(v, v_t, keys, V, BN, BV, CUT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
    b_p = tl.exp2(b_s * factor - b_lse[:, None])
    if CUT:
        o_n = tl.arange(0, BN)[None, :]
        see = o_n < keys
        if CAUSAL:
            see = see & (o_n <= offset + tl.arange(0, BM)[:, None])
        # the exponent of an unseen score may overflow: it is not multiplied but replaced
        b_p = tl.where(see, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BM, BV] @ [BV, BN] -> [BM, BN]
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")  # [BM, BN] @ [BN, BK] -> [BM, BK]


@triton.jit(do_not_specialize=["T", "NQ", "CAP"])
def block_sparse_bwd_dq_kernel(
    q, k, v, o, do, lse, dlse, delta, dq, lists, counts, cu_seqlens, tiles, T, NQ, CAP, H, G, GS, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, QS: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """dq [BM, K] and delta [BM] of one tile of queries."""
    i_b, i_h, line, whole, every, bos, T_n, first, rows = query_tile(
        counts, cu_seqlens, tiles, T, NQ, H, GS, QS, BM, CAUSAL, VARLEN
    )
    if rows <= 0:
        return
    lists += line * CAP
    q += i_b * q_b + (bos + first) * q_t + i_h * q_h
    k += i_b * k_b + bos * k_t + i_h // G * k_h
    v += i_b * v_b + bos * v_t + i_h // G * v_h
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
    PER: tl.constexpr = (BS + BN - 1) // BN
    inner = whole if BS % BN == 0 else whole * 0
    for n in range(0, inner * PER):
        i_j = tl.cast(tl.load(lists + n // PER) * BS + n % PER * BN, tl.int64)
        b_dq = dq_step(
            b_dq, b_q, b_do, b_lse, b_delta, k + i_j * k_t, k_t, v + i_j * v_t, v_t, BN, 0, factor,
            K, V, BK, BV, BM, BN, CAUSAL, False,
        )  # fmt: skip
    for n in range(inner * PER, every * PER):
        i_j = tl.load(lists + n // PER) * BS + n % PER * BN
        keys, i_j = tl.minimum(BS - n % PER * BN, T_n - i_j), tl.cast(i_j, tl.int64)
        b_dq = dq_step(
            b_dq, b_q, b_do, b_lse, b_delta, k + i_j * k_t, k_t, v + i_j * v_t, v_t, keys,
            (first - i_j).to(tl.int32), factor, K, V, BK, BV, BM, BN, CAUSAL, True,
        )  # fmt: skip
    store_tile(dq + row * K, b_dq * scale, H * K, rows, K, BM, BK)


@triton.jit
def dkdv_step(
    b_dk, b_dv, b_k, b_v, q, q_t, do, do_t, lse, delta, rows, offset, factor,
    K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries to dk and dv; CUT: it has `rows`, row r sees the first `offset` + r + 1 keys."""
    o_r = tl.arange(0, BM)
    b_q = load_tile(q, q_t, rows, K, BM, BK, CUT)
    b_do = load_tile(do, do_t, rows, V, BM, BV, CUT)
    b_lse = load_lse(lse, rows, BM)
    b_delta = tl.load(delta + o_r, mask=o_r < rows, other=0.0)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BN, BK] @ [BK, BM] -> [BN, BM]
    b_p = tl.exp2(b_s * factor - b_lse[None, :])
    if CUT and CAUSAL:
        b_p = tl.where(tl.arange(0, BN)[:, None] <= offset + o_r[None, :], b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")  # [BN, BM] @ [BM, BV] -> [BN, BV]
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BN, BV] @ [BV, BM] -> [BN, BM]
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")  # [BN, BM] @ [BM, BK] -> [BN, BK]
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "NQ", "NT", "CAP"])
def block_sparse_bwd_dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, dk_part, dv_part, lists, counts, items, cu_seqlens, tiles,
    T, NQ, NT, CAP, H, G, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, QS: tl.constexpr, GS: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk [BN, K] and dv [BN, V] of one tile of keys, summed over the query heads that the key head serves.

    GS query heads share a set. With SPLIT the entries of a list that a program takes stand in `items`; if
    they are not all, it leaves float32 parts in dk_part and dv_part, [places, blocks in tiles, K or V].
    """
    KEYS: tl.constexpr = (BS + BN - 1) // BN  # tiles of a block of keys
    PER: tl.constexpr = (QS + BM - 1) // BM  # tiles of a block of queries
    line, i_n = tl.program_id(0) // KEYS, tl.program_id(0) % KEYS * BN
    begin, place = line * 0, line * 0 - 1
    if SPLIT:
        p_item = items + 4 * line
        line, begin = tl.load(p_item), tl.load(p_item + 1)
        end, place = tl.load(p_item + 2), tl.load(p_item + 3)
        if line < 0:
            return
    i_bh = (line // NT).to(tl.int64)
    i_b, i_h = i_bh // (H // G), i_bh % (H // G)
    i_x, bos, T_n = locate_block(cu_seqlens, tiles, line % NT, T, VARLEN)
    first = i_x * BS + i_n
    keys = tl.minimum(BS - i_n, T_n - first)
    if keys <= 0:
        return
    whole = tl.load(counts + 2 * line)
    if not SPLIT:
        end = whole + tl.load(counts + 2 * line + 1)
    lists += tl.cast(line, tl.int64) * CAP
    b_k = load_tile(k + i_b * k_b + (bos + first) * k_t + i_h * k_h, k_t, keys, K, BN, BK, True)
    b_v = load_tile(v + i_b * v_b + (bos + first) * v_t + i_h * v_h, v_t, keys, V, BN, BV, True)
    b_dk, b_dv = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    q += i_b * q_b + bos * q_t + i_h * G * q_h
    do += ((i_b * T + bos) * H + i_h * G) * V
    t = (i_b * H + i_h * G) * T + bos
    factor = scale * 1.4426950408889634
    inner = tl.maximum(tl.minimum(end, whole), begin) if QS % BM == 0 else begin
    # [sketch:bwd]
    for n in range(begin * GS * PER, inner * GS * PER):  # every query sees all keys
        i_e = tl.load(lists + n // (GS * PER))
        i_g = tl.cast(i_e // NQ * GS + n // PER % GS, tl.int64)
        i_m = tl.cast(i_e % NQ * QS + n % PER * BM, tl.int64)
        p_q, p_do, p_t = q + i_m * q_t + i_g * q_h, do + (i_m * H + i_g) * V, t + i_g * T + i_m
        b_dk, b_dv = dkdv_step(
            b_dk, b_dv, b_k, b_v, p_q, q_t, p_do, H * V, lse + p_t, delta + p_t, BM, 0, factor,
            K, V, BK, BV, BM, BN, CAUSAL, False,
        )  # fmt: skip
    # [/sketch:bwd]
    for n in range(inner * GS * PER, end * GS * PER):
        i_e = n // (GS * PER)
        i_e = tl.load(lists + tl.where(i_e < whole, i_e, CAP - 1 - (i_e - whole)))
        i_g = tl.cast(i_e // NQ * GS + n // PER % GS, tl.int64)
        i_m = i_e % NQ * QS + n % PER * BM
        offset, rows = i_m - first, tl.minimum(QS - n % PER * BM, T_n - i_m)
        i_m = tl.cast(i_m, tl.int64)
        p_q, p_do, p_t = q + i_m * q_t + i_g * q_h, do + (i_m * H + i_g) * V, t + i_g * T + i_m
        b_dk, b_dv = dkdv_step(
            b_dk, b_dv, b_k, b_v, p_q, q_t, p_do, H * V, lse + p_t, delta + p_t, rows, offset, factor,
            K, V, BK, BV, BM, BN, CAUSAL, True,
        )  # fmt: skip
    b_dk *= scale
    row = (i_b * T + bos + first) * (H // G) + i_h
    if SPLIT:
        if place >= 0:
            part = tl.cast(place, tl.int64) * KEYS * BN + i_n
            store_tile(dk_part + part * K, b_dk, K, keys, K, BN, BK)
            store_tile(dv_part + part * V, b_dv, V, keys, V, BN, BV)
            keys = 0
    store_tile(dk + row * K, b_dk, H // G * K, keys, K, BN, BK)
    store_tile(dv + row * V, b_dv, H // G * V, keys, V, BN, BV)


@triton.jit(do_not_specialize=["T", "NT"])
def block_sparse_bwd_sum_kernel(
    dk_part, dv_part, dk, dv, starts, cu_seqlens, tiles, T, NT, HKV, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """dk [BN, K] and dv [BN, V] of a tile of keys whose list was cut: the sum of the parts."""
    KEYS: tl.constexpr = (BS + BN - 1) // BN
    line, i_n = tl.program_id(0) // KEYS, tl.program_id(0) % KEYS * BN
    place, pieces = tl.load(starts + 2 * line), tl.load(starts + 2 * line + 1)
    if pieces < 2:
        return
    i_bh = (line // NT).to(tl.int64)
    i_x, bos, T_n = locate_block(cu_seqlens, tiles, line % NT, T, VARLEN)
    first = i_x * BS + i_n
    keys = tl.minimum(BS - i_n, T_n - first)
    b_dk, b_dv = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    for i in range(pieces):
        part = tl.cast(place + i, tl.int64) * KEYS * BN + i_n
        b_dk += load_tile(dk_part + part * K, K, keys, K, BN, BK, True)
        b_dv += load_tile(dv_part + part * V, V, keys, V, BN, BV, True)
    row = (i_bh // HKV * T + bos + first) * HKV + i_bh % HKV
    store_tile(dk + row * K, b_dk, HKV * K, keys, K, BN, BK)
    store_tile(dv + row * V, b_dv, HKV * V, keys, V, BN, BV)
