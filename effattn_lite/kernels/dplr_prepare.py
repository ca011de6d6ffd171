r"""What a chunk can know before its state arrives, all chunks at once; with REVERSE from the right.

.. math:: M = (I - A^{11})^{-1}, \quad N = A^{21} M, \quad W_1 = M X_1, \quad W_2 = X_2 + N X_1, \quad
    U_1 = M A^{12} V, \quad U_2 = (N A^{12} + A^{22}) V

with the tables :math:`A^{rw}` of readers r on writers w, each pair with the decay between them. A state S
that enters then gives both read-outs, :math:`W_1 S + U_1` and :math:`W_2 S + U_2`: what is written back and
the output, or from the right the gradients of what was written back and of v. No table is kept for later.

A chunk is two halves. Between them decays split at the boundary, so that both factors' exponents are at most
0; within a half see `delta_blocks.scores`. From the right the tables are made anew, since a product that is
rounded to 16 bits must not be transposed on chip (Triton on Hopper gives wrong numbers).
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.common.solve import unit_inverse
from effattn_lite.kernels.delta_blocks import load_columns, load_rows, scores, store_rows
from effattn_lite.kernels.dplr_blocks import reader_decays, sums, writer_decays


@triton.jit
def own_tables(
    x1, x2, y1, y2, g, rows, m_c, o_k, H: tl.constexpr, K: tl.constexpr, HC: tl.constexpr,
    DTYPE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Both readers on both writers of one half, channels o_k: 11, 12, 21, 22, each [HC, HC]; not masked."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    b_x1, b_x2 = load_rows(x1, rows, m_c, o_k, K), load_rows(x2, rows, m_c, o_k, K)
    b_yt1, b_yt2 = load_columns(y1, rows, m_c, o_k, K), load_columns(y2, rows, m_c, o_k, K)
    # a comes before its own decay: the first reader, or from the right the first writer
    b_L1 = sums(g, rows, m_c, o_k, H, K, REVERSE, False)
    b_L2 = sums(g, rows, m_c, o_k, H, K, True, False)
    b_Lt1 = sums(g, rows, m_c, o_k, H, K, not REVERSE, True)
    b_Lt2 = sums(g, rows, m_c, o_k, H, K, True, True)
    b_11 = scores(b_x1, b_yt1, b_L1, b_Lt1, SIGN, 2, DTYPE, HC)
    b_12 = scores(b_x1, b_yt2, b_L1, b_Lt2, SIGN, 2, DTYPE, HC)
    b_21 = scores(b_x2, b_yt1, b_L2, b_Lt1, SIGN, 2, DTYPE, HC)
    b_22 = scores(b_x2, b_yt2, b_L2, b_Lt2, SIGN, 2, DTYPE, HC)
    return b_11, b_12, b_21, b_22


@triton.jit
def cross_tables(
    x1, x2, y1, y2, g, r_E, r_F, m_E, m_F, o_k, H: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Both readers of half F on both writers of half E, channels o_k: 11, 12, 21, 22, each [HC, HC]."""
    b_e1, b_e2, b_l = reader_decays(g, r_F, m_F, o_k, H, K, REVERSE)
    b_f1, b_f2 = writer_decays(g, r_E, m_E, o_k, H, K, REVERSE, True)
    b_x1, b_x2 = load_rows(x1, r_F, m_F, o_k, K) * b_e1, load_rows(x2, r_F, m_F, o_k, K) * b_e2
    b_yt1, b_yt2 = load_columns(y1, r_E, m_E, o_k, K) * b_f1, load_columns(y2, r_E, m_E, o_k, K) * b_f2
    b_11, b_12 = dot_wide(b_x1, b_yt1, DTYPE), dot_wide(b_x1, b_yt2, DTYPE)  # [HC, BK] @ [BK, HC]
    b_21, b_22 = dot_wide(b_x2, b_yt1, DTYPE), dot_wide(b_x2, b_yt2, DTYPE)
    return b_11, b_12, b_21, b_22


@triton.jit
def tables(
    x1, x2, y1, y2, g, r_E, r_F, m_E, m_F, H: tl.constexpr, K: tl.constexpr, HC: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The tables 11, 12, 21, 22 within E, within F and of F on E, summed over all channels."""
    b_0 = tl.zeros([HC, HC], tl.float32)
    b_11E, b_12E, b_21E, b_22E = b_0, b_0, b_0, b_0
    b_11F, b_12F, b_21F, b_22F = b_0, b_0, b_0, b_0
    b_11, b_12, b_21, b_22 = b_0, b_0, b_0, b_0
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_a, b_b, b_c, b_d = own_tables(x1, x2, y1, y2, g, r_E, m_E, o_k, H, K, HC, DTYPE, REVERSE)
        b_11E, b_12E, b_21E, b_22E = b_11E + b_a, b_12E + b_b, b_21E + b_c, b_22E + b_d
        b_a, b_b, b_c, b_d = own_tables(x1, x2, y1, y2, g, r_F, m_F, o_k, H, K, HC, DTYPE, REVERSE)
        b_11F, b_12F, b_21F, b_22F = b_11F + b_a, b_12F + b_b, b_21F + b_c, b_22F + b_d
        b_a, b_b, b_c, b_d = cross_tables(x1, x2, y1, y2, g, r_E, r_F, m_E, m_F, o_k, H, K, DTYPE, REVERSE)
        b_11, b_12, b_21, b_22 = b_11 + b_a, b_12 + b_b, b_21 + b_c, b_22 + b_d
    return b_11E, b_12E, b_21E, b_22E, b_11F, b_12F, b_21F, b_22F, b_11, b_12, b_21, b_22


@triton.jit(do_not_specialize=["T", "N"])
def dplr_prepare_kernel(
    x1, x2, y1, y2, v, g, w1, w2, u1, u2, z1, z2, total, cu_seqlens, T, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W and U of one chunk and head, the second ones with OUTPUT; writers z1, z2 decayed to the chunk's end.

    w1, w2, z1, z2: [tokens, H, K]; u1, u2: [tokens, H, V]; total: log decay of the chunk, [chunks, H, K].
    """
    C: tl.constexpr = 2 * HC
    DTYPE: tl.constexpr = x2.dtype.element_ty
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, C, N, BS, PACKED)
    if i_n >= N:
        return
    o_E = i_j * C + tl.arange(0, HC) + (HC if REVERSE else 0)
    o_F = i_j * C + tl.arange(0, HC) + (0 if REVERSE else HC)
    m_E, m_F = o_E < length, o_F < length
    r_E, r_F = (first + o_E) * H + i_h, (first + o_F) * H + i_h
    b_11E, b_12E, b_21E, b_22E, b_11F, b_12F, b_21F, b_22F, b_11, b_12, b_21, b_22 = tables(
        x1, x2, y1, y2, g, r_E, r_F, m_E, m_F, H, K, HC, BK, DTYPE, REVERSE
    )
    o_c = tl.arange(0, HC)
    later = (o_c[:, None] < o_c[None, :]) if REVERSE else (o_c[:, None] > o_c[None, :])
    # q meets what its own token writes, a does not
    own = later | (o_c[:, None] == o_c[None, :])
    m_12, m_21 = own if REVERSE else later, later if REVERSE else own
    b_12E, b_12F = tl.where(m_12, b_12E, 0.0), tl.where(m_12, b_12F, 0.0)
    b_21E, b_21F = tl.where(m_21, b_21E, 0.0), tl.where(m_21, b_21F, 0.0)
    b_22E, b_22F = tl.where(own, b_22E, 0.0), tl.where(own, b_22F, 0.0)
    # [sketch:fwd]
    # 1 M = (I - A11)^-1: both halves, then what the second half answers to the first's; [HC, HC] @ [HC, HC]
    b_ME = unit_inverse(tl.where(later, -b_11E, 0.0), HC, PRECISION)
    b_MF = unit_inverse(tl.where(later, -b_11F, 0.0), HC, PRECISION)
    b_M = tl.dot(tl.dot(b_MF, b_11, input_precision=PRECISION), b_ME, input_precision=PRECISION)
    b_BE, b_BF = (
        tl.dot(b_ME, b_12E, input_precision=PRECISION),
        tl.dot(b_MF, b_12F, input_precision=PRECISION),
    )
    b_B = tl.dot(b_M, b_12E, input_precision=PRECISION) + tl.dot(b_MF, b_12, input_precision=PRECISION)
    # 2 N = A21 M, and what V leaves in the second read-out
    if OUTPUT:
        b_NE = tl.dot(b_21E, b_ME, input_precision=PRECISION)
        b_NF = tl.dot(b_21F, b_MF, input_precision=PRECISION)
        b_N = tl.dot(b_21, b_ME, input_precision=PRECISION) + tl.dot(b_21F, b_M, input_precision=PRECISION)
        b_22 += tl.dot(b_N, b_12E, input_precision=PRECISION) + tl.dot(b_NF, b_12, input_precision=PRECISION)
        b_22E += tl.dot(b_NE, b_12E, input_precision=PRECISION)
        b_22F += tl.dot(b_NF, b_12F, input_precision=PRECISION)
    # 3 the read-outs of an empty state, U1 and U2
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_vE, b_vF = load_rows(v, r_E, m_E, o_v, V), load_rows(v, r_F, m_F, o_v, V)
        store_rows(u1, r_E, m_E, o_v, dot_wide(b_BE, b_vE, DTYPE), V)
        store_rows(u1, r_F, m_F, o_v, dot_wide(b_B, b_vE, DTYPE) + dot_wide(b_BF, b_vF, DTYPE), V)
        if OUTPUT:
            store_rows(u2, r_E, m_E, o_v, dot_wide(b_22E, b_vE, DTYPE), V)
            store_rows(u2, r_F, m_F, o_v, dot_wide(b_22, b_vE, DTYPE) + dot_wide(b_22F, b_vF, DTYPE), V)
    # [/sketch:fwd]
    # 4 how a state is read, W1 and W2, and how it is written to
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_e1, b_e2, b_lE = reader_decays(g, r_E, m_E, o_k, H, K, REVERSE)
        b_f1, b_f2, b_lF = reader_decays(g, r_F, m_F, o_k, H, K, REVERSE)
        b_xE = load_rows(x1, r_E, m_E, o_k, K) * b_e1
        b_xF = load_rows(x1, r_F, m_F, o_k, K) * b_f1 * tl.exp(b_lE)[None, :]
        store_rows(w1, r_E, m_E, o_k, dot_wide(b_ME, b_xE, DTYPE), K)
        store_rows(w1, r_F, m_F, o_k, dot_wide(b_M, b_xE, DTYPE) + dot_wide(b_MF, b_xF, DTYPE), K)
        if OUTPUT:
            b_qE = load_rows(x2, r_E, m_E, o_k, K) * b_e2
            b_qF = load_rows(x2, r_F, m_F, o_k, K) * b_f2 * tl.exp(b_lE)[None, :]
            store_rows(w2, r_E, m_E, o_k, b_qE + dot_wide(b_NE, b_xE, DTYPE), K)
            b_qF += dot_wide(b_N, b_xE, DTYPE) + dot_wide(b_NF, b_xF, DTYPE)
            store_rows(w2, r_F, m_F, o_k, b_qF, K)
        tl.store(total + (i_s.to(tl.int64) * H + i_h) * K + o_k, b_lE + b_lF, mask=o_k < K)
        b_e1, b_e2 = writer_decays(g, r_E, m_E, o_k, H, K, REVERSE, False)
        b_f1, b_f2 = writer_decays(g, r_F, m_F, o_k, H, K, REVERSE, False)
        b_lF = tl.exp(b_lF)[None, :]
        store_rows(z1, r_E, m_E, o_k, load_rows(y1, r_E, m_E, o_k, K) * b_e1 * b_lF, K)
        store_rows(z1, r_F, m_F, o_k, load_rows(y1, r_F, m_F, o_k, K) * b_f1, K)
        store_rows(z2, r_E, m_E, o_k, load_rows(y2, r_E, m_E, o_k, K) * b_e2 * b_lF, K)
        store_rows(z2, r_F, m_F, o_k, load_rows(y2, r_F, m_F, o_k, K) * b_f2, K)
