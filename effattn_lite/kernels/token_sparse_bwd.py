"""Gradients of attention to sets of blocks, one a token: dq along the sets, dk and dv along those who chose.

Both compute the weights again from the scores and lse. With delta_t = do_t . o_t - dlse_t, the gradient of a
score is p_tj (do_t . v_j - delta_t). The second kernel gathers the queries that chose a block of keys, and
computes its products as [keys, queries], so that no result has to be turned before the next one.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.block_sparse_lists import locate_block
from effattn_lite.kernels.common.softmax import load_exponent
from effattn_lite.kernels.common.tile import load_rows, load_tile, store_rows, store_tile
from effattn_lite.kernels.token_sparse_lists import token_tile


@triton.jit(do_not_specialize=["T", "Tk", "NQ", "NK", "CAP"])
def token_sparse_bwd_dq_kernel(
    q, k, v, o, do, lse, dlse, delta, dq, mask, lists, counts, cu_seqlens, tiles, T, Tk, NQ, NK, CAP,
    H, G, HS, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, GS: tl.constexpr, BT: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """dq [BM, K] and delta [BM] of the rows of one tile of tokens."""
    i_b, i_s, line, whole, every, bos, off, Tk, b_t, b_h, live = token_tile(
        counts, cu_seqlens, tiles, T, Tk, NQ, HS, GS, BT, BM, CAUSAL, VARLEN
    )
    lists += line * CAP
    mask += ((i_b * HS + i_s) * T + bos + b_t) * NK  # [BM]
    k += i_b * k_b + bos * k_t + i_s * GS // G * k_h
    v += i_b * v_b + bos * v_t + i_s * GS // G * v_h
    row = (i_b * T + bos + b_t) * H + b_h
    b_q = load_rows(q + i_b * q_b + (bos + b_t) * q_t + b_h * q_h, live, K, BK)
    b_do = load_rows(do + row * V, live, V, BV)
    b_o = load_rows(o + row * V, live, V, BV)
    # lse, dlse and delta lie as [B, H, T]
    t = (i_b * H + b_h) * T + bos + b_t
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + t, mask=live, other=0.0)
    tl.store(delta + t, b_delta, mask=live)
    b_lse = load_exponent(lse + t, live)
    b_dq = tl.zeros([BM, BK], tl.float32)
    o_n, factor = tl.arange(0, BN), scale * 1.4426950408889634
    PER: tl.constexpr = (BS + BN - 1) // BN  # tiles of a block of keys
    for n in range(0, every * PER):
        i_x = tl.load(lists + n // PER)
        i_j = i_x * BS + n % PER * BN
        keys = tl.minimum(BS - n % PER * BN, Tk - i_j)
        b_k = load_tile(k + tl.cast(i_j, tl.int64) * k_t, k_t, keys, K, BN, BK, True)
        b_v = load_tile(v + tl.cast(i_j, tl.int64) * v_t, v_t, keys, V, BN, BV, True)
        see = live[:, None] & (o_n[None, :] < keys)
        if BT > 1:  # another token of the tile may have chosen the block
            see = see & (tl.load(mask + i_x, mask=live, other=0) != 0)[:, None]
        if CAUSAL:
            see = see & (i_j + o_n[None, :] <= (b_t + off)[:, None])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
        # the exponent of an unseen score may overflow: it is not multiplied but replaced
        b_p = tl.where(see, tl.exp2(b_s * factor - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BM, BV] @ [BV, BN] -> [BM, BN]
        b_ds = b_p * (b_dp - b_delta[:, None])
        # [BM, BN] @ [BN, BK] -> [BM, BK]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    store_rows(dq + row * K, b_dq * scale, live, K, BK)


@triton.jit(do_not_specialize=["T", "Tk", "NT", "CAP"])
def token_sparse_bwd_dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, dk_part, dv_part, lists, counts, items, cu_seqlens, tiles,
    T, Tk, NT, CAP, H, G, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, GS: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk [BN, K] and dv [BN, V] of one tile of keys, summed over the query heads that the key head serves.

    With SPLIT the entries of a list that a program takes stand in `items`; if they are not all, it leaves
    float32 parts in dk_part and dv_part, [places, blocks in tiles, K or V].
    """
    KEYS: tl.constexpr = (BS + BN - 1) // BN  # tiles of a block of keys
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
    i_x, bos, T_n = locate_block(cu_seqlens, tiles, line % NT, Tk, VARLEN)
    first, off = i_x * BS + i_n, T_n * 0
    if not VARLEN:
        off = Tk - T
    keys = tl.minimum(BS - i_n, T_n - first)
    if keys <= 0:
        return
    if not SPLIT:
        end = tl.load(counts + 2 * line)
    lists += tl.cast(line, tl.int64) * CAP
    b_k = load_tile(k + i_b * k_b + (bos + first) * k_t + i_h * k_h, k_t, keys, K, BN, BK, True)
    b_v = load_tile(v + i_b * v_b + (bos + first) * v_t + i_h * v_h, v_t, keys, V, BN, BV, True)
    b_dk, b_dv = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    o_r, o_n, factor = tl.arange(0, BM), tl.arange(0, BN), scale * 1.4426950408889634
    # [sketch:bwd]
    for n in range(begin * GS, end * GS, BM):  # each entry brings the GS query heads that share its set
        live = n + o_r < end * GS
        b_e = tl.load(lists + (n + o_r) // GS, mask=live, other=0)
        b_t, b_h = b_e % T, i_h * G + b_e // T * GS + (n + o_r) % GS
        row, t = (i_b * T + bos + b_t) * H + b_h, (i_b * H + b_h) * T + bos + b_t
        b_q = load_rows(q + i_b * q_b + (bos + b_t) * q_t + b_h * q_h, live, K, BK)
        b_do = load_rows(do + row * V, live, V, BV)
        b_lse = load_exponent(lse + t, live)
        b_delta = tl.load(delta + t, mask=live, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BN, BK] @ [BK, BM] -> [BN, BM]
        b_p = tl.exp2(b_s * factor - b_lse[None, :])
        if CAUSAL:
            b_p = tl.where(first + o_n[:, None] <= (b_t + off)[None, :], b_p, 0.0)
        # [BN, BM] @ [BM, BV] -> [BN, BV]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BN, BV] @ [BV, BM] -> [BN, BM]
        b_ds = b_p * (b_dp - b_delta[None, :])
        # [BN, BM] @ [BM, BK] -> [BN, BK]
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    # [/sketch:bwd]
    b_dk *= scale
    row = (i_b * Tk + bos + first) * (H // G) + i_h
    if SPLIT:
        if place >= 0:
            part = tl.cast(place, tl.int64) * KEYS * BN + i_n
            store_tile(dk_part + part * K, b_dk, K, keys, K, BN, BK)
            store_tile(dv_part + part * V, b_dv, V, keys, V, BN, BV)
            keys = 0
    store_tile(dk + row * K, b_dk, H // G * K, keys, K, BN, BK)
    store_tile(dv + row * V, b_dv, H // G * V, keys, V, BN, BV)
