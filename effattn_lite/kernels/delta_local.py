r"""Gradients of the delta rule within a chunk, from the states on both of its sides; all chunks at once.

With S entering from the left, dS' from the right, Delta and R of `kernels/delta.py`, and D the decay between
two tokens, what the products of queries, keys and strengths receive is

.. math:: dP = s\,dO\,\Delta^\top\,[i \ge j], \qquad dA = -R\,\Delta^\top\,[i > j]

Two launches. `delta_rows_kernel`: what row i reads, :math:`dQ = s\,\xi\,dO\,S^\top + (dP \odot D) K` and
:math:`Z = -\xi\,R\,S^\top + (dA \odot D) K`, hence dq, :math:`d\beta_i = R_i \cdot V_i + Z_i \cdot K_i`,
:math:`dV = \beta R` and the reader's part of dk, :math:`\beta Z`. `delta_columns_kernel`: what column j
writes, into later rows and into the state, the rest of dk.

The log decay of token t receives what passes over it: what later tokens read of the state, what earlier ones
leave in it, the state itself, and every pair of tokens i >= t > j. The pairs are counted as all rows from t
on less all columns from t on; a token's pair with itself does not decay and stays out, so that strong gates
leave no difference of large numbers.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.delta_blocks import between, load_columns, load_rows, mix, store_rows


@triton.jit
def product(x, y, x_rows, y_rows, m_x, m_y, V: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of x times rows of y, summed over V: [HC, HC]."""
    HC: tl.constexpr = x_rows.shape[0]
    b_A = tl.zeros([HC, HC], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_x, b_yt = load_rows(x, x_rows, m_x, o_v, V), load_columns(y, y_rows, m_y, o_v, V)
        b_A += dot_wide(b_x, b_yt, DTYPE)  # [HC, BV] @ [BV, HC]
    return b_A


@triton.jit
def read_state(
    x, S, x_rows, m_x, o_k, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows of x [., V] times the transposed state at S, columns o_k of [HC, K]."""
    HC: tl.constexpr = x_rows.shape[0]
    b_y = tl.zeros([HC, BK], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_S = (o_k < K)[None, :] & (o_v < V)[:, None]
        b_St = tl.load(S + o_k[None, :] * V + o_v[:, None], mask=m_S, other=0)
        b_y += dot_wide(load_rows(x, x_rows, m_x, o_v, V), b_St, DTYPE)  # [HC, BV] @ [BV, BK]
    return b_y


@triton.jit
def own_products(
    v, do, d, r, dv, rows, m_c, b_b, V: tl.constexpr, HC: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """Writes dv of half a chunk; returns R_i . V_i and dO_i . Delta_i."""
    b_db, b_self = tl.zeros([HC], tl.float32), tl.zeros([HC], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_r = load_rows(r, rows, m_c, o_v, V).to(tl.float32)
        b_db += tl.sum(b_r * load_rows(v, rows, m_c, o_v, V).to(tl.float32), 1)
        b_do = load_rows(do, rows, m_c, o_v, V).to(tl.float32)
        b_self += tl.sum(b_do * load_rows(d, rows, m_c, o_v, V).to(tl.float32), 1)
        store_rows(dv, rows, m_c, o_v, b_r * b_b[:, None], V)
    return b_db, b_self


@triton.jit(do_not_specialize=["T", "N"])
def delta_rows_kernel(
    q, k, v, g, beta, do, h, d, r, dq, z, dv, dbeta, reads, own, cu_seqlens, scale, T, N,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What the rows of one chunk and value head read: dq and z [tokens, HV, K], dv, dbeta.

    own: s dO_i . Delta_i, [tokens, HV]. reads: q_i dq_i + k_i z_i without the own token, [tokens, HV, K] or,
    with one decay a head, summed over K.
    """
    C: tl.constexpr = 2 * HC
    DTYPE: tl.constexpr = k.dtype.element_ty
    i_s, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_q = i_h // (HV // H)
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, C, N, BS, PACKED)
    if (i_n >= N) | (length == 0):
        return
    o_c = tl.arange(0, HC)
    later = o_c[:, None] > o_c[None, :]
    row1 = first + i_j * C + o_c
    row2 = row1 + HC
    m_1, m_2 = i_j * C + o_c < length, i_j * C + HC + o_c < length
    r_1, r_2 = row1 * HV + i_h, row2 * HV + i_h
    b_b1 = tl.load(beta + r_1, mask=m_1, other=0).to(tl.float32)
    b_b2 = tl.load(beta + r_2, mask=m_2, other=0).to(tl.float32)
    b_db1, b_self1 = own_products(v, do, d, r, dv, r_1, m_1, b_b1, V, HC, BV)
    b_db2, b_self2 = own_products(v, do, d, r, dv, r_2, m_2, b_b2, V, HC, BV)
    tl.store(own + r_1, b_self1 * scale, mask=m_1)
    tl.store(own + r_2, b_self2 * scale, mask=m_2)
    # dP / s and -dA of i > j: first half, second half on first, second half
    b_p1 = tl.where(later, product(do, d, r_1, r_1, m_1, m_1, V, BV, DTYPE), 0.0)
    b_p = product(do, d, r_2, r_1, m_2, m_1, V, BV, DTYPE)
    b_p2 = tl.where(later, product(do, d, r_2, r_2, m_2, m_2, V, BV, DTYPE), 0.0)
    b_a1 = tl.where(later, product(r, d, r_1, r_1, m_1, m_1, V, BV, DTYPE), 0.0)
    b_a = product(r, d, r_2, r_1, m_2, m_1, V, BV, DTYPE)
    b_a2 = tl.where(later, product(r, d, r_2, r_2, m_2, m_2, V, BV, DTYPE), 0.0)
    b_xi1, b_xi2 = tl.full([HC, 1], 1.0, tl.float32), tl.full([HC, 1], 1.0, tl.float32)
    if GATE == 1:
        b_G1 = tl.cumsum(tl.load(g + r_1, mask=m_1, other=0).to(tl.float32), 0)
        b_G2 = tl.cumsum(tl.load(g + r_2, mask=m_2, other=0).to(tl.float32), 0) + tl.min(b_G1, 0)
        b_D1, b_D, b_D2 = between(b_G1, b_G1, 1), between(b_G2, b_G1, 1), between(b_G2, b_G2, 1)
        b_p1, b_p, b_p2 = b_p1 * b_D1, b_p * b_D, b_p2 * b_D2
        b_a1, b_a, b_a2 = b_a1 * b_D1, b_a * b_D, b_a2 * b_D2
        b_xi1, b_xi2 = tl.exp(b_G1)[:, None], tl.exp(b_G2)[:, None]
    b_reads1, b_reads2 = tl.zeros([HC], tl.float32), tl.zeros([HC], tl.float32)
    p_S = h + (i_s.to(tl.int64) * HV + i_h) * K * V
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k1 = load_rows(k, row1 * H + i_q, m_1, o_k, K).to(tl.float32)
        b_k2 = load_rows(k, row2 * H + i_q, m_2, o_k, K).to(tl.float32)
        # decay from a token of the first half to its end (e), from there to one of the second half (f)
        b_L1, b_L2, b_e, b_f, b_x1, b_x2 = b_k1, b_k2, 1.0, 1.0, b_xi1, b_xi2
        if GATE == 2:
            b_L1 = tl.cumsum(load_rows(g, r_1, m_1, o_k, K).to(tl.float32), 0)
            b_L2 = tl.cumsum(load_rows(g, r_2, m_2, o_k, K).to(tl.float32), 0)
            b_l1 = tl.min(b_L1, 0)[None, :]
            b_e, b_f = tl.exp(b_l1 - b_L1), tl.exp(b_L2)
            b_x1, b_x2 = tl.exp(b_L1), tl.exp(b_l1) * b_f
        b_ke = b_k1 * b_e
        b_q1 = read_state(do, p_S, r_1, m_1, o_k, K, V, BK, BV, DTYPE) * b_x1
        b_q1 = (b_q1 + mix(b_p1, b_k1, b_L1, 1, GATE, DTYPE, HC)) * scale
        b_q2 = read_state(do, p_S, r_2, m_2, o_k, K, V, BK, BV, DTYPE) * b_x2
        b_q2 += mix(b_p2, b_k2, b_L2, 1, GATE, DTYPE, HC) + dot_wide(b_p, b_ke, DTYPE) * b_f
        b_q2 *= scale
        b_z1 = read_state(r, p_S, r_1, m_1, o_k, K, V, BK, BV, DTYPE) * b_x1
        b_z1 = -b_z1 - mix(b_a1, b_k1, b_L1, 1, GATE, DTYPE, HC)
        b_z2 = read_state(r, p_S, r_2, m_2, o_k, K, V, BK, BV, DTYPE) * b_x2
        b_z2 += mix(b_a2, b_k2, b_L2, 1, GATE, DTYPE, HC) + dot_wide(b_a, b_ke, DTYPE) * b_f
        b_db1 += tl.sum(b_k1 * b_z1, 1)
        b_db2 -= tl.sum(b_k2 * b_z2, 1)
        b_z1, b_z2 = b_z1 * b_b1[:, None], -b_z2 * b_b2[:, None]
        store_rows(z, r_1, m_1, o_k, b_z1, K)
        store_rows(z, r_2, m_2, o_k, b_z2, K)
        store_rows(dq, r_1, m_1, o_k, b_q1 + (b_self1 * scale)[:, None] * b_k1, K)
        store_rows(dq, r_2, m_2, o_k, b_q2 + (b_self2 * scale)[:, None] * b_k2, K)
        if GATE > 0:
            b_q1 = b_q1 * load_rows(q, row1 * H + i_q, m_1, o_k, K) + b_k1 * b_z1
            b_q2 = b_q2 * load_rows(q, row2 * H + i_q, m_2, o_k, K) + b_k2 * b_z2
        if GATE == 1:
            b_reads1 += tl.sum(b_q1, 1)
            b_reads2 += tl.sum(b_q2, 1)
        if GATE == 2:
            store_rows(reads, r_1, m_1, o_k, b_q1, K)
            store_rows(reads, r_2, m_2, o_k, b_q2, K)
    if GATE == 1:
        tl.store(reads + r_1, b_reads1, mask=m_1)
        tl.store(reads + r_2, b_reads2, mask=m_2)
    tl.store(dbeta + r_1, b_db1.to(dbeta.dtype.element_ty), mask=m_1)
    tl.store(dbeta + r_2, b_db2.to(dbeta.dtype.element_ty), mask=m_2)


@triton.jit(do_not_specialize=["T", "N"])
def delta_columns_kernel(
    q, k, g, beta, do, h, dh, d, r, z, reads, own, dk, dg, cu_seqlens, scale, T, N,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the columns of one chunk and value head write: dk [tokens, HV, K], and with the reads dg."""
    C: tl.constexpr = 2 * HC
    DTYPE: tl.constexpr = k.dtype.element_ty
    i_s, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_q = i_h // (HV // H)
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, C, N, BS, PACKED)
    if (i_n >= N) | (length == 0):
        return
    o_c = tl.arange(0, HC)
    later = o_c[:, None] < o_c[None, :]
    row1 = first + i_j * C + o_c
    row2 = row1 + HC
    m_1, m_2 = i_j * C + o_c < length, i_j * C + HC + o_c < length
    r_1, r_2 = row1 * HV + i_h, row2 * HV + i_h
    b_b1 = tl.load(beta + r_1, mask=m_1, other=0).to(tl.float32)
    b_b2 = tl.load(beta + r_2, mask=m_2, other=0).to(tl.float32)
    b_self1, b_self2 = tl.load(own + r_1, mask=m_1, other=0), tl.load(own + r_2, mask=m_2, other=0)
    # the transposed dP / s and -dA of i > j: first half, first half from second, second half
    b_p1 = tl.where(later, product(d, do, r_1, r_1, m_1, m_1, V, BV, DTYPE), 0.0) * scale
    b_p = product(d, do, r_1, r_2, m_1, m_2, V, BV, DTYPE) * scale
    b_p2 = tl.where(later, product(d, do, r_2, r_2, m_2, m_2, V, BV, DTYPE), 0.0) * scale
    b_a1 = tl.where(later, product(d, r, r_1, r_1, m_1, m_1, V, BV, DTYPE), 0.0) * b_b1[None, :]
    b_a = product(d, r, r_1, r_2, m_1, m_2, V, BV, DTYPE) * b_b2[None, :]
    b_a2 = tl.where(later, product(d, r, r_2, r_2, m_2, m_2, V, BV, DTYPE), 0.0) * b_b2[None, :]
    b_zeta1, b_zeta2 = tl.full([HC, 1], 1.0, tl.float32), tl.full([HC, 1], 1.0, tl.float32)
    b_whole = 1.0
    if GATE == 1:
        b_G1 = tl.cumsum(tl.load(g + r_1, mask=m_1, other=0).to(tl.float32), 0)
        b_G2 = tl.cumsum(tl.load(g + r_2, mask=m_2, other=0).to(tl.float32), 0) + tl.min(b_G1, 0)
        b_D1, b_D, b_D2 = between(b_G1, b_G1, -1), between(b_G1, b_G2, -1), between(b_G2, b_G2, -1)
        b_p1, b_p, b_p2 = b_p1 * b_D1, b_p * b_D, b_p2 * b_D2
        b_a1, b_a, b_a2 = b_a1 * b_D1, b_a * b_D, b_a2 * b_D2
        b_zeta1 = tl.exp(tl.min(b_G2, 0) - b_G1)[:, None]
        b_zeta2 = tl.exp(tl.min(b_G2, 0) - b_G2)[:, None]
        b_whole = tl.exp(tl.min(b_G2, 0))
    # passing over a token: pairs, from its row on; writes into the state, before it; the state itself
    b_pairs1, b_pairs2 = tl.zeros([HC], tl.float32), tl.zeros([HC], tl.float32)
    b_writes1, b_writes2, b_kept = tl.zeros([HC], tl.float32), tl.zeros([HC], tl.float32), 0.0
    before = tl.where(o_c[:, None] > o_c[None, :], 1.0, 0.0)
    i_S = (i_s.to(tl.int64) * HV + i_h) * K * V
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k1 = load_rows(k, row1 * H + i_q, m_1, o_k, K).to(tl.float32)
        b_k2 = load_rows(k, row2 * H + i_q, m_2, o_k, K).to(tl.float32)
        b_q1 = load_rows(q, row1 * H + i_q, m_1, o_k, K).to(tl.float32)
        b_q2 = load_rows(q, row2 * H + i_q, m_2, o_k, K).to(tl.float32)
        b_L1, b_L2, b_e, b_f, b_x1, b_x2, b_all = b_k1, b_k2, 1.0, 1.0, b_zeta1, b_zeta2, b_whole
        if GATE == 2:
            b_L1 = tl.cumsum(load_rows(g, r_1, m_1, o_k, K).to(tl.float32), 0)
            b_L2 = tl.cumsum(load_rows(g, r_2, m_2, o_k, K).to(tl.float32), 0)
            b_l1, b_l2 = tl.min(b_L1, 0), tl.min(b_L2, 0)
            b_e, b_f = tl.exp(b_l1[None, :] - b_L1), tl.exp(b_L2)
            b_x1, b_x2, b_all = b_e * tl.exp(b_l2)[None, :], tl.exp(b_l2[None, :] - b_L2), tl.exp(b_l1 + b_l2)
        b_c1 = mix(b_p1, b_q1, b_L1, -1, GATE, DTYPE, HC) - mix(b_a1, b_k1, b_L1, -1, GATE, DTYPE, HC)
        b_c2 = mix(b_p2, b_q2, b_L2, -1, GATE, DTYPE, HC) - mix(b_a2, b_k2, b_L2, -1, GATE, DTYPE, HC)
        b_c1 += (dot_wide(b_p, b_q2 * b_f, DTYPE) - dot_wide(b_a, b_k2 * b_f, DTYPE)) * b_e
        b_w1 = read_state(d, dh + i_S, r_1, m_1, o_k, K, V, BK, BV, DTYPE) * b_x1
        b_w2 = read_state(d, dh + i_S, r_2, m_2, o_k, K, V, BK, BV, DTYPE) * b_x2
        b_dk1 = load_rows(z, r_1, m_1, o_k, K) + b_c1 + b_w1 + b_self1[:, None] * b_q1
        b_dk2 = load_rows(z, r_2, m_2, o_k, K) + b_c2 + b_w2 + b_self2[:, None] * b_q2
        store_rows(dk, r_1, m_1, o_k, b_dk1, K)
        store_rows(dk, r_2, m_2, o_k, b_dk2, K)
        if GATE > 0:
            b_c1, b_c2, b_w1, b_w2 = b_c1 * b_k1, b_c2 * b_k2, b_w1 * b_k1, b_w2 * b_k2
            b_left = tl.zeros([BK], tl.float32)
            for i_v in range(0, V, BV):
                o_v = i_v + tl.arange(0, BV)
                o_S, m_S = o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]
                b_h = tl.load(h + i_S + o_S, mask=m_S, other=0).to(tl.float32)
                b_left += tl.sum(b_h * tl.load(dh + i_S + o_S, mask=m_S, other=0).to(tl.float32), 1)
            b_left *= b_all
        if GATE == 1:
            b_pairs1 -= tl.sum(b_c1, 1)
            b_pairs2 -= tl.sum(b_c2, 1)
            b_writes1 += tl.sum(b_w1, 1)
            b_writes2 += tl.sum(b_w2, 1)
            b_kept += tl.sum(b_left, 0)
        if GATE == 2:
            b_c1, b_c2 = load_rows(reads, r_1, m_1, o_k, K) - b_c1, load_rows(reads, r_2, m_2, o_k, K) - b_c2
            b_dg1 = tl.cumsum(b_c1, 0, reverse=True) + (b_left + tl.sum(b_c2, 0))[None, :]
            b_dg2 = tl.cumsum(b_c2, 0, reverse=True) + (b_left + tl.sum(b_w1, 0))[None, :]
            # [HC, HC] @ [HC, BK]
            store_rows(dg, r_1, m_1, o_k, b_dg1 + tl.dot(before, b_w1, input_precision=PRECISION), K)
            store_rows(dg, r_2, m_2, o_k, b_dg2 + tl.dot(before, b_w2, input_precision=PRECISION), K)
    if GATE == 1:
        b_pairs1 += tl.load(reads + r_1, mask=m_1, other=0)
        b_pairs2 += tl.load(reads + r_2, mask=m_2, other=0)
        b_dg1 = tl.cumsum(b_pairs1, 0, reverse=True) + tl.sum(before * b_writes1[None, :], 1)
        b_dg2 = tl.cumsum(b_pairs2, 0, reverse=True) + tl.sum(before * b_writes2[None, :], 1)
        b_dg1 += tl.sum(b_pairs2, 0) + b_kept
        b_dg2 += tl.sum(b_writes1, 0) + b_kept
        tl.store(dg + r_1, b_dg1.to(dg.dtype.element_ty), mask=m_1)
        tl.store(dg + r_2, b_dg2.to(dg.dtype.element_ty), mask=m_2)
