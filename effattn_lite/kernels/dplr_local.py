r"""Gradients of readers from all that they met, all chunks at once; with REVERSE from the right.

Reader x of token i met the state S that entered the chunk, after a decay :math:`\rho_i`, and the writers y of
the tokens before it. Its read-out received e, and they had written d:

.. math:: dx_i = \rho_i \odot S e_i + \sum_w \sum_j (e_i \cdot d^w_j)\, D_{ij} \odot y^w_j

From the left a and q read; they received R and dO, and Y and V were written. From the right b and k read dS;
there Y and V are received, and R and dO were written.

The log decay of token t receives what passes over it: what later tokens read of the state, what earlier ones
leave in it, the state itself, and every pair with t between its tokens. The pairs are counted as all readers
a and q from t on less all writers b and k from t on, where a belongs to the token before, whose decay is the
last that it meets. Pairs that do not decay, a query with its own token and a with the token before, stay out,
so that strong gates leave no difference of large numbers.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.delta_blocks import load_columns, load_rows, store_rows
from effattn_lite.kernels.delta_local import read_state
from effattn_lite.kernels.dplr_blocks import mix, reader_decays, sums, writer_decays


@triton.jit
def value_tables(
    e1, e2, d1, d2, r_x, r_y, m_x, m_y, V: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Rows of e1 and e2 times rows of d1 and d2, summed over V: 11, 12, 21, 22, each [HC, HC]."""
    HC: tl.constexpr = r_x.shape[0]
    b_11, b_12 = tl.zeros([HC, HC], tl.float32), tl.zeros([HC, HC], tl.float32)
    b_21, b_22 = tl.zeros([HC, HC], tl.float32), tl.zeros([HC, HC], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_e1, b_e2 = load_rows(e1, r_x, m_x, o_v, V), load_rows(e2, r_x, m_x, o_v, V)
        b_dt1, b_dt2 = load_columns(d1, r_y, m_y, o_v, V), load_columns(d2, r_y, m_y, o_v, V)
        b_11 += dot_wide(b_e1, b_dt1, DTYPE)  # [HC, BV] @ [BV, HC]
        b_12 += dot_wide(b_e1, b_dt2, DTYPE)
        b_21 += dot_wide(b_e2, b_dt1, DTYPE)
        b_22 += dot_wide(b_e2, b_dt2, DTYPE)
    return b_11, b_12, b_21, b_22


@triton.jit
def undecayed(b_11, b_12, b_21, b_22, REVERSE: tl.constexpr):
    """Weights of the pairs of a half that meet without a decay, as columns, and the tables without them.

    A query and its own token's writers meet so, and a and those of the token before, its neighbour. Returns
    the weights with the neighbours (11, then the other table of a) and with the own token (the other, then
    22), then the tables 11, 12, 21, 22, 0 where the writer does not run before the reader.
    """
    o_c = tl.arange(0, b_11.shape[0])
    same = o_c[:, None] == o_c[None, :]
    if REVERSE:
        beside, later = o_c[:, None] + 1 == o_c[None, :], o_c[:, None] < o_c[None, :]
        b_p2, b_p3 = tl.where(beside, b_21, 0.0), tl.where(same, b_12, 0.0)
        b_12, b_21 = tl.where(later, b_12, 0.0), tl.where(later & ~beside, b_21, 0.0)
    else:
        beside, later = o_c[:, None] == o_c[None, :] + 1, o_c[:, None] > o_c[None, :]
        b_p2, b_p3 = tl.where(beside, b_12, 0.0), tl.where(same, b_21, 0.0)
        b_12, b_21 = tl.where(later & ~beside, b_12, 0.0), tl.where(later, b_21, 0.0)
    b_p1, b_p4 = tl.where(beside, b_11, 0.0), tl.where(same, b_22, 0.0)
    b_p1, b_p2 = tl.sum(b_p1, 1)[:, None], tl.sum(b_p2, 1)[:, None]
    b_p3, b_p4 = tl.sum(b_p3, 1)[:, None], tl.sum(b_p4, 1)[:, None]
    b_11, b_22 = tl.where(later & ~beside, b_11, 0.0), tl.where(later, b_22, 0.0)
    return b_p1, b_p2, b_p3, b_p4, b_11, b_12, b_21, b_22


@triton.jit
def corner(b_A, REVERSE: tl.constexpr):
    """Of a table of F on E: the weight of the tokens beside the boundary, as a column, and what is left."""
    o_c = tl.arange(0, b_A.shape[0])
    HC: tl.constexpr = b_A.shape[0]
    x: tl.constexpr = HC - 1 if REVERSE else 0
    beside = (o_c[:, None] == x) & (o_c[None, :] == HC - 1 - x)
    return tl.sum(tl.where(beside, b_A, 0.0), 1)[:, None], tl.where(beside, 0.0, b_A)


@triton.jit
def near(
    b_11, b_12, b_21, b_22, b_y1, b_y2, g, rows, m_c, o_k, H: tl.constexpr, K: tl.constexpr,
    HC: tl.constexpr, DTYPE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What both readers of half a chunk receive from the writers of the same half, [HC, BK] each."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    b_L = sums(g, rows, m_c, o_k, H, K, True, False)
    b_La = sums(g, rows, m_c, o_k, H, K, False, False)
    b_x, b_y = b_La, b_L
    if REVERSE:
        b_x, b_y = b_L, b_La
    b_n1 = mix(b_11, b_y1, b_x, b_y, b_L, SIGN, DTYPE, HC) + mix(b_12, b_y2, b_x, b_L, b_L, SIGN, DTYPE, HC)
    b_n2 = mix(b_21, b_y1, b_L, b_y, b_L, SIGN, DTYPE, HC) + mix(b_22, b_y2, b_L, b_L, b_L, SIGN, DTYPE, HC)
    return b_n1, b_n2


@triton.jit
def met_undecayed(
    b_p1, b_p2, b_p3, b_p4, b_y1, b_y2, y1, y2, rows, m_c, o_k, H: tl.constexpr, K: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What both readers receive without a decay, [HC, BK] each, from the weights of `undecayed`.

    m_c: tokens whose neighbour is in the chunk.
    """
    if REVERSE:
        b_a = load_rows(y1, rows + H, m_c, o_k, K)
        b_o1, b_o2 = b_p1 * b_a + b_p3 * b_y2, b_p2 * b_a + b_p4 * b_y2
    else:
        b_b, b_k = load_rows(y1, rows - H, m_c, o_k, K), load_rows(y2, rows - H, m_c, o_k, K)
        b_o1, b_o2 = b_p1 * b_b + b_p2 * b_k, b_p3 * b_y1 + b_p4 * b_y2
    return b_o1, b_o2


@triton.jit(do_not_specialize=["T", "N"])
def dplr_gradients_kernel(
    x1, x2, y1, y2, e1, e2, d1, d2, g, S, other, dx1, dx2, reads1, reads2, dg, cu_seqlens, T, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx1 and dx2 of one chunk, head and tile of K, [tokens, H, K]; from the left reads, from the right dg.

    reads: x dx without the pairs that do not decay, float32. S: the states that enter from this side,
    [chunks, H, K, V]; other: those from the other.
    """
    C: tl.constexpr = 2 * HC
    DTYPE: tl.constexpr = x2.dtype.element_ty
    NK: tl.constexpr = (K + BK - 1) // BK
    i_p = tl.program_id(0) // NK
    i_s, i_h = i_p // H, i_p % H
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, C, N, BS, PACKED)
    if (i_n >= N) | (length == 0):
        return
    o_c = tl.arange(0, HC)
    o_E = i_j * C + o_c + (HC if REVERSE else 0)
    o_F = i_j * C + o_c + (0 if REVERSE else HC)
    m_E, m_F = o_E < length, o_F < length
    r_E, r_F = (first + o_E) * H + i_h, (first + o_F) * H + i_h
    b_11, b_12, b_21, b_22 = value_tables(e1, e2, d1, d2, r_F, r_E, m_F, m_E, V, BV, DTYPE)
    b_11E, b_12E, b_21E, b_22E = value_tables(e1, e2, d1, d2, r_E, r_E, m_E, m_E, V, BV, DTYPE)
    b_11F, b_12F, b_21F, b_22F = value_tables(e1, e2, d1, d2, r_F, r_F, m_F, m_F, V, BV, DTYPE)
    b_pE1, b_pE2, b_pE3, b_pE4, b_11E, b_12E, b_21E, b_22E = undecayed(b_11E, b_12E, b_21E, b_22E, REVERSE)
    b_pF1, b_pF2, b_pF3, b_pF4, b_11F, b_12F, b_21F, b_22F = undecayed(b_11F, b_12F, b_21F, b_22F, REVERSE)
    b_p, b_11 = corner(b_11, REVERSE)
    b_pF1 += b_p
    if REVERSE:
        b_p, b_21 = corner(b_21, REVERSE)
        # the neighbour comes after the token, and for the last of E after the chunk
        m_nE, m_nF = (o_E + 1 < length) & (o_c < HC - 1), o_F + 1 < length
    else:
        b_p, b_12 = corner(b_12, REVERSE)
        m_nE, m_nF = m_E & (o_c > 0), m_F
    b_pF2 += b_p
    before = tl.where(o_c[:, None] > o_c[None, :], 1.0, 0.0)
    i_S = (i_s.to(tl.int64) * H + i_h) * K * V
    o_k = tl.program_id(0) % NK * BK + tl.arange(0, BK)
    b_yE1, b_yE2 = load_rows(y1, r_E, m_E, o_k, K), load_rows(y2, r_E, m_E, o_k, K)
    b_yF1, b_yF2 = load_rows(y1, r_F, m_F, o_k, K), load_rows(y2, r_F, m_F, o_k, K)
    b_oE1, b_oE2 = met_undecayed(
        b_pE1, b_pE2, b_pE3, b_pE4, b_yE1, b_yE2, y1, y2, r_E, m_nE, o_k, H, K, REVERSE
    )
    b_oF1, b_oF2 = met_undecayed(
        b_pF1, b_pF2, b_pF3, b_pF4, b_yF1, b_yF2, y1, y2, r_F, m_nF, o_k, H, K, REVERSE
    )
    # pairs of tokens within each half, and of F with E
    b_nE1, b_nE2 = near(b_11E, b_12E, b_21E, b_22E, b_yE1, b_yE2, g, r_E, m_E, o_k, H, K, HC, DTYPE, REVERSE)
    b_nF1, b_nF2 = near(b_11F, b_12F, b_21F, b_22F, b_yF1, b_yF2, g, r_F, m_F, o_k, H, K, HC, DTYPE, REVERSE)
    b_eE1, b_eE2, b_lE = reader_decays(g, r_E, m_E, o_k, H, K, REVERSE)
    b_eF1, b_eF2, b_lF = reader_decays(g, r_F, m_F, o_k, H, K, REVERSE)
    b_f1, b_f2 = writer_decays(g, r_E, m_E, o_k, H, K, REVERSE, False)
    b_yE1, b_yE2 = b_yE1 * b_f1, b_yE2 * b_f2
    b_nF1 += (dot_wide(b_11, b_yE1, DTYPE) + dot_wide(b_12, b_yE2, DTYPE)) * b_eF1
    b_nF2 += (dot_wide(b_21, b_yE1, DTYPE) + dot_wide(b_22, b_yE2, DTYPE)) * b_eF2
    # the state that entered
    b_eF1, b_eF2 = b_eF1 * tl.exp(b_lE)[None, :], b_eF2 * tl.exp(b_lE)[None, :]
    b_sE1 = read_state(e1, S + i_S, r_E, m_E, o_k, K, V, BK, BV, DTYPE) * b_eE1
    b_sE2 = read_state(e2, S + i_S, r_E, m_E, o_k, K, V, BK, BV, DTYPE) * b_eE2
    b_sF1 = read_state(e1, S + i_S, r_F, m_F, o_k, K, V, BK, BV, DTYPE) * b_eF1
    b_sF2 = read_state(e2, S + i_S, r_F, m_F, o_k, K, V, BK, BV, DTYPE) * b_eF2
    store_rows(dx1, r_E, m_E, o_k, b_sE1 + b_nE1 + b_oE1, K)
    store_rows(dx2, r_E, m_E, o_k, b_sE2 + b_nE2 + b_oE2, K)
    store_rows(dx1, r_F, m_F, o_k, b_sF1 + b_nF1 + b_oF1, K)
    store_rows(dx2, r_F, m_F, o_k, b_sF2 + b_nF2 + b_oF2, K)
    b_xE1, b_xE2 = load_rows(x1, r_E, m_E, o_k, K), load_rows(x2, r_E, m_E, o_k, K)
    b_xF1, b_xF2 = load_rows(x1, r_F, m_F, o_k, K), load_rows(x2, r_F, m_F, o_k, K)
    if REVERSE:
        # E is the second half of the chunk: pairs from the token on, writes before it, the state itself
        b_nE1 = load_rows(reads2, r_E, m_E, o_k, K) - b_xE1 * b_nE1 - b_xE2 * b_nE2
        b_nF1 = load_rows(reads2, r_F, m_F, o_k, K) - b_xF1 * b_nF1 - b_xF2 * b_nF2
        b_nE1 += load_rows(reads1, r_E + H, m_nE, o_k, K)
        b_nF1 += load_rows(reads1, r_F + H, m_nF, o_k, K)
        b_sE1, b_sF1 = b_xE1 * b_sE1 + b_xE2 * b_sE2, b_xF1 * b_sF1 + b_xF2 * b_sF2
        b_left = tl.zeros([BK], tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            o_S, m_S = i_S + o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]
            b_h = tl.load(S + o_S, mask=m_S, other=0).to(tl.float32)
            b_left += tl.sum(b_h * tl.load(other + o_S, mask=m_S, other=0).to(tl.float32), 1)
        b_left *= tl.exp(b_lE + b_lF)
        b_dF = tl.cumsum(b_nF1, 0, reverse=True) + (b_left + tl.sum(b_nE1, 0))[None, :]
        b_dE = tl.cumsum(b_nE1, 0, reverse=True) + (b_left + tl.sum(b_sF1, 0))[None, :]
        # [HC, HC] @ [HC, BK]
        store_rows(dg, r_F, m_F, o_k, b_dF + tl.dot(before, b_sF1, input_precision=PRECISION), K)
        store_rows(dg, r_E, m_E, o_k, b_dE + tl.dot(before, b_sE1, input_precision=PRECISION), K)
    else:
        store_rows(reads1, r_E, m_E, o_k, b_xE1 * (b_sE1 + b_nE1), K)
        store_rows(reads1, r_F, m_F, o_k, b_xF1 * (b_sF1 + b_nF1), K)
        store_rows(reads2, r_E, m_E, o_k, b_xE2 * (b_sE2 + b_nE2), K)
        store_rows(reads2, r_F, m_F, o_k, b_xF2 * (b_sF2 + b_nF2), K)
