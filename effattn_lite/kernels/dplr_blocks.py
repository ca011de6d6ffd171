"""Blocks of the kernels of a diagonal plus a matrix of rank 1: decays of readers and writers.

Every kernel runs both ways. From the left a token's readers are a and q, its writers b and k; with REVERSE
gradients come from the right, the readers are b and k, the writers a and q. Both times readers meet what
writers left before: x1 and x2 read, y1 and y2 write. Only a stands before its own token's decay.

A chunk is two halves, in the order of the run: E, then F. L is a log decay summed from the half's start in
time, [HC, BK] or [BK, HC]: it falls from row to row.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide
from effattn_lite.kernels.delta_blocks import load_columns, load_rows, span
from effattn_lite.kernels.gated_decay_chunk import FLOOR


@triton.jit
def sums(g, rows, m_c, o_k, H: tl.constexpr, K: tl.constexpr, OWN: tl.constexpr, COLUMNS: tl.constexpr):
    """Log decay from the half's start to each token, its own counted with OWN; [BK, HC] with COLUMNS.

    A stronger gate than FLOOR leaves nothing either, and large sums would cost small ones their digits.
    """
    if not OWN:
        # the tokens before, so that the same numbers are added in the same order
        m_c = m_c & (tl.arange(0, rows.shape[0]) > 0)
        rows = rows - H
    if COLUMNS:
        b_L = tl.cumsum(tl.maximum(load_columns(g, rows, m_c, o_k, K).to(tl.float32), FLOOR), 1)
    else:
        b_L = tl.cumsum(tl.maximum(load_rows(g, rows, m_c, o_k, K).to(tl.float32), FLOOR), 0)
    return b_L


@triton.jit
def reader_decays(g, rows, m_c, o_k, H: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr):
    """Decays between the half's beginning, in the order of the run, and x1 and x2; log decay of the half."""
    b_L = sums(g, rows, m_c, o_k, H, K, True, False)
    b_l = tl.min(b_L, 0)
    if REVERSE:
        b_1 = tl.exp(b_l[None, :] - b_L)
        b_2 = b_1
    else:
        b_1, b_2 = tl.exp(sums(g, rows, m_c, o_k, H, K, False, False)), tl.exp(b_L)
    return b_1, b_2, b_l


@triton.jit
def writer_decays(
    g, rows, m_c, o_k, H: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, COLUMNS: tl.constexpr
):
    """Decays between y1 and y2 and the half's end, in the order of the run; [BK, HC] with COLUMNS."""
    b_L = sums(g, rows, m_c, o_k, H, K, True, COLUMNS)
    if REVERSE:
        b_1, b_2 = tl.exp(sums(g, rows, m_c, o_k, H, K, False, COLUMNS)), tl.exp(b_L)
    else:
        if COLUMNS:
            b_1 = tl.exp(tl.min(b_L, 1)[:, None] - b_L)
        else:
            b_1 = tl.exp(tl.min(b_L, 0)[None, :] - b_L)
        b_2 = b_1
    return b_1, b_2


@triton.jit
def mix(
    b_W, b_y, b_Lx, b_Ly, b_L, SIGN: tl.constexpr, DTYPE: tl.constexpr, HC: tl.constexpr
):  # fmt: skip
    """Rows of y mixed with weights that decay channel by channel: the transpose of `delta_blocks.scores`.

    R_ic = sum_j W_ij e^(SIGN (Lx_ic - Ly_jc)) y_jc; W must be 0 where the exponent is above 0. It is
    `delta_blocks.mix` with other sums for the rows than for the columns.

    Args:
        b_W: [HC, HC] float32; b_y, b_Lx, b_Ly: [HC, BK].
        b_L: the sums with the tokens' own decays, which are the lowest.
    """
    if tl.min(tl.min(b_L, 1), 0) >= span(DTYPE):
        b_R = dot_wide(b_W, b_y * tl.exp(-SIGN * b_Ly), DTYPE) * tl.exp(SIGN * b_Lx)
    else:
        o_c = tl.arange(0, HC)
        b_R = tl.zeros_like(b_L)
        for j in range(HC):
            b_w = tl.sum(tl.where(o_c[None, :] == j, b_W, 0.0), 1)
            b_row = tl.sum(tl.where(o_c[:, None] == j, b_y.to(tl.float32), 0.0), 0)
            b_l = tl.sum(tl.where(o_c[:, None] == j, b_Ly, 0.0), 0)
            b_e = tl.exp(tl.minimum(SIGN * (b_Lx - b_l[None, :]), 0.0))
            b_R += b_w[:, None] * b_e * b_row[None, :]
    return b_R
