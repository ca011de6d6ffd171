"""Blocks of the delta rule's kernels: which chunk, tiles of rows, products of tokens that decay.

GATE says what decays: 0 nothing, 1 a head, 2 every key channel. Of a half chunk, L is the log decay summed
from the half's start, [HC] or [HC, BK]: it falls from row to row.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide


@triton.jit
def find_sequence(i_n, cu_seqlens, T, C: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr):
    """Row of a sequence's first token (int64), its tokens, and the number of its first chunk.

    An empty sequence owns one chunk of no token, as in `find_segment`.
    """
    if PACKED:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
        o_n = tl.arange(0, BS)
        b_first = tl.load(cu_seqlens + o_n, mask=o_n < i_n, other=0).to(tl.int32)
        b_next = tl.load(cu_seqlens + o_n + 1, mask=o_n < i_n, other=0).to(tl.int32)
        b_count = tl.where(o_n < i_n, tl.maximum((b_next - b_first + C - 1) // C, 1), 0)
        begin = tl.sum(b_count, 0)
    else:
        first = i_n.to(tl.int64) * T
        length = T
        begin = i_n * ((T + C - 1) // C)
    return first, length, begin


@triton.jit
def load_rows(p, row, m_row, o_x, X: tl.constexpr):
    """Tile [rows, columns] of a matrix of X columns."""
    return tl.load(p + row[:, None] * X + o_x[None, :], mask=m_row[:, None] & (o_x < X)[None, :], other=0)


@triton.jit
def load_columns(p, row, m_row, o_x, X: tl.constexpr):
    """The same tile transposed, [columns, rows]: no transposition of a tile on chip."""
    return tl.load(p + row[None, :] * X + o_x[:, None], mask=m_row[None, :] & (o_x < X)[:, None], other=0)


@triton.jit
def store_rows(p, row, m_row, o_x, b_x, X: tl.constexpr):
    """Store tile b_x [rows, columns] in the dtype of the memory."""
    m_x = m_row[:, None] & (o_x < X)[None, :]
    tl.store(p + row[:, None] * X + o_x[None, :], b_x.to(p.dtype.element_ty), mask=m_x)


@triton.jit
def between(b_x, b_y, SIGN: tl.constexpr):
    """Decay from row to column, e^(x - y), or with SIGN = -1 from column to row; 1 where time runs back."""
    return tl.exp(tl.minimum(SIGN * (b_x[:, None] - b_y[None, :]), 0.0))


@triton.jit
def span(DTYPE: tl.constexpr):
    """The decay of half a chunk, in nats, down to which one product holds all its pairs of tokens.

    e^80 is in the range of bfloat16 and float32. An exponent x is rounded by 2^-24 |x|, which 16 bits never
    see; float32 would, so its exponents stay within -8 and 8.
    """
    return -8.0 if DTYPE == tl.float32 else -80.0


@triton.jit
def scores(
    b_x, b_yt, b_L, b_Lt, SIGN: tl.constexpr, GATE: tl.constexpr, DTYPE: tl.constexpr, HC: tl.constexpr
):
    """Products of all pairs of a half chunk, [HC, HC], each channel decayed from one token to the other.

    A_ij = sum_c x_ic e^(SIGN (L_ic - L_jc)) y_jc; the triangle where the exponent is above 0 has no meaning.
    Where no channel decays too much, both factors are taken relative to the half's start, which lies before
    all tokens, and one product gives all pairs. Otherwise one column at a time is summed, from exponents <= 0
    alone.

    Args:
        b_x, b_L: [HC, BK]; b_yt, b_Lt: [BK, HC].
    """
    if GATE < 2:
        return dot_wide(b_x, b_yt, DTYPE)
    else:
        o_c = tl.arange(0, HC)
        if tl.min(tl.min(b_L, 1), 0) >= span(DTYPE):
            b_A = dot_wide(b_x * tl.exp(SIGN * b_L), b_yt * tl.exp(-SIGN * b_Lt), DTYPE)
        else:
            b_A = tl.zeros([HC, HC], tl.float32)
            for j in range(HC):
                b_y = tl.sum(tl.where(o_c[None, :] == j, b_yt.to(tl.float32), 0.0), 1)
                b_l = tl.sum(tl.where(o_c[None, :] == j, b_Lt, 0.0), 1)
                b_e = tl.exp(tl.minimum(SIGN * (b_L - b_l[None, :]), 0.0))
                b_a = tl.sum(b_x.to(tl.float32) * b_e * b_y[None, :], 1)
                b_A = tl.where(o_c[None, :] == j, b_a[:, None], b_A)
        return b_A


@triton.jit
def mix(b_W, b_y, b_L, SIGN: tl.constexpr, GATE: tl.constexpr, DTYPE: tl.constexpr, HC: tl.constexpr):
    """Rows of y mixed with weights that decay channel by channel: the transpose of `scores`.

    R_ic = sum_j W_ij e^(SIGN (L_ic - L_jc)) y_jc; W must be 0 where the exponent is above 0, and holds the
    decay of a head already.

    Args:
        b_W: [HC, HC] float32; b_y, b_L: [HC, BK].
    """
    if GATE < 2:
        return dot_wide(b_W, b_y, DTYPE)
    else:
        o_c = tl.arange(0, HC)
        if tl.min(tl.min(b_L, 1), 0) >= span(DTYPE):
            b_R = dot_wide(b_W, b_y * tl.exp(-SIGN * b_L), DTYPE) * tl.exp(SIGN * b_L)
        else:
            b_R = tl.zeros_like(b_L)
            for j in range(HC):
                b_w = tl.sum(tl.where(o_c[None, :] == j, b_W, 0.0), 1)
                b_row = tl.sum(tl.where(o_c[:, None] == j, b_y.to(tl.float32), 0.0), 0)
                b_l = tl.sum(tl.where(o_c[:, None] == j, b_L, 0.0), 0)
                b_e = tl.exp(tl.minimum(SIGN * (b_L - b_l[None, :]), 0.0))
                b_R += b_w[:, None] * b_e * b_row[None, :]
        return b_R
