"""What the last queries weigh: the weights of at most 128 queries on all keys, by key and by distance.

Two sweeps over the keys, in tiles as wide as there are queries. The first gives each tile's part of the rows'
log-sum-exp. The second forms the weights; their sums along diagonals are sums along columns of the tile
turned on its side, row r shifted by r: a program writes it so, and reads it again.
"""

import triton
import triton.language as tl


@triton.jit
def last_scores(q, q_t, k, k_t, i_j, T, L, factor, K: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr):
    """Scores [BL, BL] of the last L queries on the keys from i_j on, exponents of 2; unseen ones -inf."""
    o_r, o_k = tl.arange(0, BL), tl.arange(0, BC)
    o_t, o_j = T - L + o_r, i_j + o_r
    b_s = tl.zeros([BL, BL], tl.float32)
    for c in range(0, K, BC):
        m_t, m_j = (o_r < L)[:, None] & (c + o_k < K)[None, :], (o_j < T)[:, None] & (c + o_k < K)[None, :]
        b_q = tl.load(q + o_t.to(tl.int64)[:, None] * q_t + (c + o_k)[None, :], mask=m_t, other=0.0)
        b_k = tl.load(k + o_j.to(tl.int64)[:, None] * k_t + (c + o_k)[None, :], mask=m_j, other=0.0)
        # [BL, BC] @ [BC, BL] -> [BL, BL]
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
    see = (o_j[None, :] <= o_t[:, None]) & (o_r < L)[:, None]
    return tl.where(see, b_s * factor, float("-inf"))


@triton.jit(do_not_specialize=["T", "L", "NT"])
def last_query_lse_kernel(
    q, k, lse, T, L, NT, H, G, factor, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp [BL] of the scores on one tile of keys, in exponents of 2; -inf where none is seen."""
    i_n, i_bh = tl.program_id(0) % NT, (tl.program_id(0) // NT).to(tl.int64)
    i_h = i_bh % H
    q += i_bh // H * q_b + i_h * q_h
    k += i_bh // H * k_b + i_h // G * k_h
    b_s = last_scores(q, q_t, k, k_t, i_n * BL, T, L, factor, K, BL, BC)
    b_m = tl.max(b_s, 1)
    b_l = tl.sum(tl.exp2(b_s - tl.where(b_m == float("-inf"), 0.0, b_m)[:, None]), 1)
    b_lse = tl.where(b_l == 0, float("-inf"), b_m + tl.log2(tl.where(b_l == 0, 1.0, b_l)))
    tl.store(lse + (i_bh * NT + i_n) * BL + tl.arange(0, BL), b_lse)


@triton.jit(do_not_specialize=["T", "L", "NT", "P"])
def last_query_sums_kernel(
    q, k, lse, columns, sums, scratch, P, T, L, NT, H, G, factor, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Weights of every P-th tile of keys, added up along columns, and along diagonals, [2 BL] a tile."""
    i_p, i_bh = tl.program_id(0) % P, (tl.program_id(0) // P).to(tl.int64)
    i_h, o_r = i_bh % H, tl.arange(0, BL)
    q += i_bh // H * q_b + i_h * q_h
    k += i_bh // H * k_b + i_h // G * k_h
    b_lse = tl.load(lse + i_bh * BL + o_r)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    scratch += (i_bh * P + i_p) * 2 * BL * BL
    for i_n in range(i_p, NT, P):
        b_s = last_scores(q, q_t, k, k_t, i_n * BL, T, L, factor, K, BL, BC)
        b_p = tl.exp2(b_s - b_lse[:, None])
        o_j = i_n * BL + o_r
        tl.store(columns + i_bh * T + o_j, tl.sum(b_p, 0), mask=o_j < T)
        # [sketch:slash]
        # weight of row r and column c goes to column r - c + BL - 1 of row r
        tl.store(scratch + (o_r * 2 * BL)[:, None] + o_r[:, None] - o_r[None, :] + BL - 1, b_p)
        tl.debug_barrier()
        for half in tl.static_range(2):
            o_e = half * BL + o_r
            c = o_r[:, None] - o_e[None, :] + BL - 1  # where it came from
            b_x = tl.load(
                scratch + (o_r * 2 * BL)[:, None] + o_e[None, :], mask=(c >= 0) & (c < BL), other=0.0
            )
            tl.store(sums + ((i_bh * NT + i_n) * 2 + half) * BL + o_r, tl.sum(b_x, 0))
        tl.debug_barrier()
        # [/sketch:slash]
