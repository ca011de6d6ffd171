"""The blocks that the weights of summaries point at, without the weights in memory.

A program owns some tokens of one key head, with all query heads of the group as rows. It walks over the
blocks, computes the weights of the spans that share something with each, adds them up over the heads, and
keeps the best blocks so far. A block's score and number are one integer, so that a maximum finds both.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.softmax import load_exponent
from effattn_lite.kernels.common.tile import load_rows
from effattn_lite.kernels.nsa_bwd import locate_spans


@triton.jit
def group_weights(
    b_q, b_lse, k, k_t, b_span, NC, factor, K: tl.constexpr, BK: tl.constexpr,
    GP: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Weights of the spans b_span [NP], added up over the heads: [BT, NP]; rows are (token, head)."""
    there = (b_span >= 0) & (b_span < NC)
    b_k = load_rows(k + b_span.to(tl.int64) * k_t, there, K, BK)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BT GP, BK] @ [BK, NP] -> [BT GP, NP]
    b_p = tl.exp2(tl.minimum(b_s * factor - b_lse[:, None], 0.0))
    return tl.sum(tl.reshape(b_p, (BT, GP, NP)), 1)


@triton.jit(do_not_specialize=["T", "Tk", "NC", "NT", "n"])
def nsa_select_kernel(
    q, k, lse, best, cu_seqlens, tiles, firsts, T, Tk, NC, NT, n, H, G, scale,
    q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BS: tl.constexpr,
    GP: tl.constexpr, HEADS: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The n <= NP best blocks of BT tokens, [B, T, HKV, n]; HEADS tiles of GP heads are the group."""
    A: tl.constexpr = BS // STRIDE
    C: tl.constexpr = SIZE // STRIDE
    i_t, i_bh = tl.program_id(0) % NT, (tl.program_id(0) // NT).to(tl.int64)
    if not VARLEN:
        i_t = NT - 1 - i_t
    HKV = H // G
    i_b, i_h = i_bh // HKV, i_bh % HKV
    i_x, bos, sos, T_n, NC_n, off = locate_spans(cu_seqlens, tiles, firsts, i_t, T, Tk, NC, VARLEN)
    first = i_x * BT
    if first >= T_n:
        return
    k += i_b * k_b + sos * k_t + i_h * k_h
    q += i_b * q_b + bos * q_t + i_h * G * q_h
    lse += (i_b * H + i_h * G) * T + bos
    b_t, b_g = first + tl.arange(0, BT * GP) // GP, tl.arange(0, BT * GP) % GP
    b_q = load_rows(q + b_t.to(tl.int64) * q_t + b_g * q_h, (b_t < T_n) & (b_g < G), K, BK)
    b_lse = load_exponent(lse + b_g.to(tl.int64) * T + b_t, (b_t < T_n) & (b_g < G))
    place = off + first + tl.arange(0, BT)
    own = place // BS
    factor = scale * 1.4426950408889634
    o_n = tl.arange(0, NP)
    b_best = tl.full([BT, NP], -1, tl.int64)
    # [sketch:select]
    for i_j in range(0, (off + tl.minimum(first + BT, T_n) - 1) // BS + 1, NP):
        b_j = i_j + tl.arange(0, NP)
        b_score = tl.zeros([BT, NP], tl.float32)
        for shift in tl.static_range(1 - C, A):  # spans from the first to the last that share a stride
            weight = min(A - 1, shift + C - 1) - max(0, shift) + 1
            b_span = b_j * A + shift
            if HEADS > 1:
                b_p = tl.zeros([BT, NP], tl.float32)
                for i_g in range(0, HEADS):
                    b_h = i_g * GP + b_g
                    live = (b_t < T_n) & (b_h < G)
                    b_q = load_rows(q + b_t.to(tl.int64) * q_t + b_h * q_h, live, K, BK)
                    b_lse = load_exponent(lse + b_h.to(tl.int64) * T + b_t, live)
                    b_p += group_weights(b_q, b_lse, k, k_t, b_span, NC_n, factor, K, BK, GP, BT, NP)
            else:
                b_p = group_weights(b_q, b_lse, k, k_t, b_span, NC_n, factor, K, BK, GP, BT, NP)
            seen = (b_span >= 0)[None, :] & (b_span[None, :] * STRIDE + SIZE - 1 <= place[:, None])
            b_score += tl.where(seen, weight * b_p, 0.0)
        always = (b_j == 0)[None, :] | (b_j[None, :] > own[:, None] - 2)
        b_score = tl.where(always, float("inf"), b_score)
        # scores are >= 0, so their bits are ordered as they are; of equal ones the lower block is larger
        b_key = b_score.to(tl.int32, bitcast=True).to(tl.int64) * 4294967296 + (2147483647 - b_j)[None, :]
        b_key = tl.where(b_j[None, :] <= own[:, None], b_key, -1)
        # the n-th best so far; most blocks late in a text do not reach it
        b_last = tl.min(tl.where(o_n[None, :] < n, b_best, 9223372036854775807), 1)
        if tl.max((tl.max(b_key, 1) > b_last).to(tl.int32), 0) > 0:
            b_new = tl.full([BT, NP], -1, tl.int64)
            for r in range(0, n):
                b_top = tl.maximum(tl.max(b_best, 1), tl.max(b_key, 1))[:, None]
                b_new = tl.where(o_n[None, :] == r, b_top, b_new)
                b_best = tl.where(b_best == b_top, -1, b_best)
                b_key = tl.where(b_key == b_top, -1, b_key)
            b_best = b_new
    # [/sketch:select]
    b_block = tl.where(b_best < 0, -1, 2147483647 - (b_best % 4294967296)).to(tl.int32)
    p_t = bos + first + tl.arange(0, BT)
    p_best = best + (((i_b * T + p_t) * HKV + i_h) * n)[:, None] + o_n[None, :]
    live = (first + tl.arange(0, BT) < T_n)[:, None] & (o_n < n)[None, :]
    tl.store(p_best, b_block, mask=live)
