r"""What a chunk of the delta rule can know before its state arrives, all chunks at once.

.. math:: M = \Bigl(I + \operatorname{tril}\bigl(\beta_i\, k_i^\top D_{ij} k_j\bigr)\Bigr)^{-1}, \quad
    W = M\,(\beta\xi \odot K), \quad U = M\,(\beta \odot V), \quad P_{ij} = q_i^\top D_{ij} k_j\,[i \ge j]

with :math:`D_{ij} = e^{G_i - G_j}` and :math:`\xi_i = e^{G_i}` from the chunk's start. The backward asks for
the same from the right, :math:`W' = M^\top (\zeta \odot K)` and :math:`U' = s\,M^\top P^\top dO` with
:math:`\zeta_j = e^{G_C - G_j}`; it makes the transposed matrices anew, since a product that is rounded to 16
bits must not be transposed on chip (Triton on Hopper gives wrong numbers).

A chunk is two halves. Between them a decay a channel splits at the boundary, so that both factors' exponents
are at most 0; within a half see `delta_blocks.scores`.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.common.solve import unit_inverse
from effattn_lite.kernels.delta_blocks import between, load_columns, load_rows, scores, store_rows


@triton.jit
def half_tables(
    q, k, g, row1, row2, m_1, m_2, qk_head, g_head, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    HC: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, SIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """k D k and q D k, three [HC, HC] blocks each: first half, between the halves, second half.

    With SIGN = 1 row i has column j's past: blocks (1, 1), (2, 1), (2, 2). With SIGN = -1 all is transposed:
    (1, 1), (1, 2), (2, 2), and rows are keys, columns queries. A head's decay is not in yet.
    """
    b_a1, b_a, b_a2 = (
        tl.zeros([HC, HC], tl.float32),
        tl.zeros([HC, HC], tl.float32),
        tl.zeros([HC, HC], tl.float32),
    )
    b_p1, b_p, b_p2 = (
        tl.zeros([HC, HC], tl.float32),
        tl.zeros([HC, HC], tl.float32),
        tl.zeros([HC, HC], tl.float32),
    )
    r_1, r_2 = row1 * H + qk_head, row2 * H + qk_head
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k1, b_k2 = load_rows(k, r_1, m_1, o_k, K), load_rows(k, r_2, m_2, o_k, K)
        b_kt1, b_kt2 = load_columns(k, r_1, m_1, o_k, K), load_columns(k, r_2, m_2, o_k, K)
        b_L1, b_L2, b_Lt1, b_Lt2 = b_k1, b_k2, b_kt1, b_kt2
        if GATE == 2:
            s_1, s_2 = row1 * HV + g_head, row2 * HV + g_head
            b_L1 = tl.cumsum(load_rows(g, s_1, m_1, o_k, K).to(tl.float32), 0)
            b_L2 = tl.cumsum(load_rows(g, s_2, m_2, o_k, K).to(tl.float32), 0)
            b_Lt1 = tl.cumsum(load_columns(g, s_1, m_1, o_k, K).to(tl.float32), 1)
            b_Lt2 = tl.cumsum(load_columns(g, s_2, m_2, o_k, K).to(tl.float32), 1)
        b_a1 += scores(b_k1, b_kt1, b_L1, b_Lt1, SIGN, GATE, DTYPE, HC)
        b_a2 += scores(b_k2, b_kt2, b_L2, b_Lt2, SIGN, GATE, DTYPE, HC)
        if SIGN == 1:
            b_x1, b_x2 = load_rows(q, r_1, m_1, o_k, K), load_rows(q, r_2, m_2, o_k, K)
            b_p1 += scores(b_x1, b_kt1, b_L1, b_Lt1, SIGN, GATE, DTYPE, HC)
            b_p2 += scores(b_x2, b_kt2, b_L2, b_Lt2, SIGN, GATE, DTYPE, HC)
            if GATE == 2:
                # the last row of L is its minimum: what is left of the first half
                b_kt1 = b_kt1 * tl.exp(tl.min(b_Lt1, 1)[:, None] - b_Lt1)
                b_k2, b_x2 = b_k2 * tl.exp(b_L2), b_x2 * tl.exp(b_L2)
            b_a += dot_wide(b_k2, b_kt1, DTYPE)
            b_p += dot_wide(b_x2, b_kt1, DTYPE)
        else:
            b_yt1, b_yt2 = load_columns(q, r_1, m_1, o_k, K), load_columns(q, r_2, m_2, o_k, K)
            b_p1 += scores(b_k1, b_yt1, b_L1, b_Lt1, SIGN, GATE, DTYPE, HC)
            b_p2 += scores(b_k2, b_yt2, b_L2, b_Lt2, SIGN, GATE, DTYPE, HC)
            if GATE == 2:
                b_k1 = b_k1 * tl.exp(tl.min(b_L1, 0)[None, :] - b_L1)
                b_kt2, b_yt2 = b_kt2 * tl.exp(b_Lt2), b_yt2 * tl.exp(b_Lt2)
            b_a += dot_wide(b_k1, b_kt2, DTYPE)
            b_p += dot_wide(b_k1, b_yt2, DTYPE)
    return b_a1, b_a, b_a2, b_p1, b_p, b_p2


@triton.jit(do_not_specialize=["T", "N"])
def delta_prepare_kernel(
    q, k, v, g, beta, w, u, p, qx, kz, total, cu_seqlens, T, N,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W, U and, with SCORES, P [tokens, HV, C] of one chunk and value head; its decay for who comes after.

    total: with one decay a head G, [tokens, HV]; with one a channel the whole chunk's, [chunks, HV, K], and
    then the decayed queries qx and keys kz, [tokens, HV, K], are written too.
    """
    C: tl.constexpr = 2 * HC
    DTYPE: tl.constexpr = k.dtype.element_ty
    i_s, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_q = i_h // (HV // H)
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, C, N, BS, PACKED)
    if i_n >= N:
        return
    o_c = tl.arange(0, HC)
    row1 = first + i_j * C + o_c
    row2 = row1 + HC
    m_1, m_2 = i_j * C + o_c < length, i_j * C + HC + o_c < length
    r_1, r_2 = row1 * HV + i_h, row2 * HV + i_h
    b_b1 = tl.load(beta + r_1, mask=m_1, other=0).to(tl.float32)
    b_b2 = tl.load(beta + r_2, mask=m_2, other=0).to(tl.float32)
    b_a1, b_a, b_a2, b_p1, b_p, b_p2 = half_tables(
        q, k, g, row1, row2, m_1, m_2, i_q, i_h, H, HV, K, HC, BK, GATE, 1, DTYPE
    )
    b_x1, b_x2 = b_b1, b_b2
    if GATE == 1:
        b_G1 = tl.cumsum(tl.load(g + r_1, mask=m_1, other=0).to(tl.float32), 0)
        b_G2 = tl.cumsum(tl.load(g + r_2, mask=m_2, other=0).to(tl.float32), 0) + tl.min(b_G1, 0)
        tl.store(total + r_1, b_G1, mask=m_1)
        tl.store(total + r_2, b_G2, mask=m_2)
        b_D1, b_D, b_D2 = between(b_G1, b_G1, 1), between(b_G2, b_G1, 1), between(b_G2, b_G2, 1)
        b_a1, b_a, b_a2 = b_a1 * b_D1, b_a * b_D, b_a2 * b_D2
        b_p1, b_p, b_p2 = b_p1 * b_D1, b_p * b_D, b_p2 * b_D2
        b_x1, b_x2 = b_b1 * tl.exp(b_G1), b_b2 * tl.exp(b_G2)
    later, own = o_c[:, None] > o_c[None, :], o_c[:, None] >= o_c[None, :]
    # [sketch:fwd]
    # 1 M = (I + A)^-1: both halves, then what the second half answers to the first's writes
    b_M1 = unit_inverse(tl.where(later, b_b1[:, None] * b_a1, 0.0), HC, PRECISION)
    b_M2 = unit_inverse(tl.where(later, b_b2[:, None] * b_a2, 0.0), HC, PRECISION)
    b_M = tl.dot(b_M2, b_b2[:, None] * b_a, input_precision=PRECISION)
    b_M = -tl.dot(b_M, b_M1, input_precision=PRECISION)  # [HC, HC] @ [HC, HC]
    # 2 what would be written on an empty state, U = M Diag(beta) V
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v1, b_v2 = load_rows(v, r_1, m_1, o_v, V), load_rows(v, r_2, m_2, o_v, V)
        b_u2 = dot_wide(b_M * b_b1[None, :], b_v1, DTYPE) + dot_wide(b_M2 * b_b2[None, :], b_v2, DTYPE)
        store_rows(u, r_1, m_1, o_v, dot_wide(b_M1 * b_b1[None, :], b_v1, DTYPE), V)
        store_rows(u, r_2, m_2, o_v, b_u2, V)
    # 3 how a state is read before it is written to, W = M Diag(beta xi) K
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k1 = load_rows(k, row1 * H + i_q, m_1, o_k, K)
        b_k2 = load_rows(k, row2 * H + i_q, m_2, o_k, K)
        if GATE == 2:
            b_G1 = tl.cumsum(load_rows(g, r_1, m_1, o_k, K).to(tl.float32), 0)
            b_G2 = tl.cumsum(load_rows(g, r_2, m_2, o_k, K).to(tl.float32), 0) + tl.min(b_G1, 0)[None, :]
            b_last = tl.min(b_G2, 0)
            tl.store(total + (i_s.to(tl.int64) * HV + i_h) * K + o_k, b_last, mask=o_k < K)
            store_rows(kz, r_1, m_1, o_k, b_k1 * tl.exp(b_last[None, :] - b_G1), K)
            store_rows(kz, r_2, m_2, o_k, b_k2 * tl.exp(b_last[None, :] - b_G2), K)
            b_q1 = load_rows(q, row1 * H + i_q, m_1, o_k, K)
            b_q2 = load_rows(q, row2 * H + i_q, m_2, o_k, K)
            store_rows(qx, r_1, m_1, o_k, b_q1 * tl.exp(b_G1), K)
            store_rows(qx, r_2, m_2, o_k, b_q2 * tl.exp(b_G2), K)
            b_k1, b_k2 = b_k1 * tl.exp(b_G1), b_k2 * tl.exp(b_G2)
        b_w2 = dot_wide(b_M * b_x1[None, :], b_k1, DTYPE) + dot_wide(b_M2 * b_x2[None, :], b_k2, DTYPE)
        store_rows(w, r_1, m_1, o_k, dot_wide(b_M1 * b_x1[None, :], b_k1, DTYPE), K)
        store_rows(w, r_2, m_2, o_k, b_w2, K)
    # [/sketch:fwd]
    if SCORES:
        store_rows(p, r_1, m_1, o_c, tl.where(own, b_p1, 0.0), C)
        store_rows(p, r_1, m_1, HC + o_c, tl.zeros([HC, HC], tl.float32), C)
        store_rows(p, r_2, m_2, o_c, b_p, C)
        store_rows(p, r_2, m_2, HC + o_c, tl.where(own, b_p2, 0.0), C)


@triton.jit(do_not_specialize=["T", "N"])
def delta_prepare_right_kernel(
    q, k, g, beta, do, w, u, kx, cu_seqlens, scale, T, N,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W' and U' of one chunk and value head: [tokens, HV, K] and [tokens, HV, V].

    kx: with one decay a channel, xi K is written too, [tokens, HV, K].
    """
    C: tl.constexpr = 2 * HC
    DTYPE: tl.constexpr = k.dtype.element_ty
    i_s, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_q = i_h // (HV // H)
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, C, N, BS, PACKED)
    if i_n >= N:
        return
    o_c = tl.arange(0, HC)
    row1 = first + i_j * C + o_c
    row2 = row1 + HC
    m_1, m_2 = i_j * C + o_c < length, i_j * C + HC + o_c < length
    r_1, r_2 = row1 * HV + i_h, row2 * HV + i_h
    b_b1 = tl.load(beta + r_1, mask=m_1, other=0).to(tl.float32)
    b_b2 = tl.load(beta + r_2, mask=m_2, other=0).to(tl.float32)
    b_a1, b_a, b_a2, b_p1, b_p, b_p2 = half_tables(
        q, k, g, row1, row2, m_1, m_2, i_q, i_h, H, HV, K, HC, BK, GATE, -1, DTYPE
    )
    b_z1, b_z2 = tl.full([HC], 1.0, tl.float32), tl.full([HC], 1.0, tl.float32)
    if GATE == 1:
        b_G1 = tl.cumsum(tl.load(g + r_1, mask=m_1, other=0).to(tl.float32), 0)
        b_G2 = tl.cumsum(tl.load(g + r_2, mask=m_2, other=0).to(tl.float32), 0) + tl.min(b_G1, 0)
        b_D1, b_D, b_D2 = between(b_G1, b_G1, -1), between(b_G1, b_G2, -1), between(b_G2, b_G2, -1)
        b_a1, b_a, b_a2 = b_a1 * b_D1, b_a * b_D, b_a2 * b_D2
        b_p1, b_p, b_p2 = b_p1 * b_D1, b_p * b_D, b_p2 * b_D2
        b_z1, b_z2 = tl.exp(tl.min(b_G2, 0) - b_G1), tl.exp(tl.min(b_G2, 0) - b_G2)
    later, own = o_c[:, None] < o_c[None, :], o_c[:, None] <= o_c[None, :]
    b_p1, b_p2 = tl.where(own, b_p1, 0.0), tl.where(own, b_p2, 0.0)
    # M^T, and scale M^T P^T; all [HC, HC] @ [HC, HC]
    b_M1 = unit_inverse(tl.where(later, b_b1[None, :] * b_a1, 0.0), HC, PRECISION)
    b_M2 = unit_inverse(tl.where(later, b_b2[None, :] * b_a2, 0.0), HC, PRECISION)
    b_M = tl.dot(b_M1, b_b2[None, :] * b_a, input_precision=PRECISION)
    b_M = -tl.dot(b_M, b_M2, input_precision=PRECISION)
    b_Y1 = tl.dot(b_M1, b_p1 * scale, input_precision=PRECISION)
    b_Y = tl.dot(b_M1, b_p * scale, input_precision=PRECISION)
    b_Y += tl.dot(b_M, b_p2 * scale, input_precision=PRECISION)
    b_Y2 = tl.dot(b_M2, b_p2 * scale, input_precision=PRECISION)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_do1, b_do2 = load_rows(do, r_1, m_1, o_v, V), load_rows(do, r_2, m_2, o_v, V)
        store_rows(u, r_1, m_1, o_v, dot_wide(b_Y1, b_do1, DTYPE) + dot_wide(b_Y, b_do2, DTYPE), V)
        store_rows(u, r_2, m_2, o_v, dot_wide(b_Y2, b_do2, DTYPE), V)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k1 = load_rows(k, row1 * H + i_q, m_1, o_k, K)
        b_k2 = load_rows(k, row2 * H + i_q, m_2, o_k, K)
        if GATE == 2:
            b_G1 = tl.cumsum(load_rows(g, r_1, m_1, o_k, K).to(tl.float32), 0)
            b_G2 = tl.cumsum(load_rows(g, r_2, m_2, o_k, K).to(tl.float32), 0) + tl.min(b_G1, 0)[None, :]
            store_rows(kx, r_1, m_1, o_k, b_k1 * tl.exp(b_G1), K)
            store_rows(kx, r_2, m_2, o_k, b_k2 * tl.exp(b_G2), K)
            b_last = tl.min(b_G2, 0)[None, :]
            b_k1, b_k2 = b_k1 * tl.exp(b_last - b_G1), b_k2 * tl.exp(b_last - b_G2)
        b_w1 = dot_wide(b_M1 * b_z1[None, :], b_k1, DTYPE) + dot_wide(b_M * b_z2[None, :], b_k2, DTYPE)
        store_rows(w, r_1, m_1, o_k, b_w1, K)
        store_rows(w, r_2, m_2, o_k, dot_wide(b_M2 * b_z2[None, :], b_k2, DTYPE), K)
