"""Blocks of a chunk's output where every channel decays at its own rate."""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide


@triton.jit
def intra_rows(
    b_q, b_kt, b_v, p_k, step, b_g, b_u, n, m_k, SHIFT: tl.constexpr, BONUS: tl.constexpr, C: tl.constexpr
):
    """Output of a chunk's own tokens, [C, BV], where the channels that the scores sum over decay.

    With BONUS, b_u [BK] weighs the channels of a token's score with itself; the rest as `scores_by_channel`.
    """
    b_A = scores_by_channel(b_q, b_kt, p_k, step, b_g, n, m_k, SHIFT, C)
    if BONUS:
        o_c = tl.arange(0, C)
        m_ck = (o_c < n)[:, None] & m_k[None, :]
        b_k = tl.load(p_k[None, :] + (o_c * step)[:, None], mask=m_ck, other=0)
        b_self = tl.sum(b_q * b_u[None, :] * b_k, 1)
        b_A = tl.where(o_c[:, None] == o_c[None, :], b_self[:, None], b_A)
    return tl.dot(b_A.to(b_v.dtype), b_v, input_precision="ieee")  # [C, C] @ [C, BV] -> [C, BV]


@triton.jit
def intra_columns(
    b_q, b_kt, b_v, p_v, step, b_g, b_u, n, m_v, SHIFT: tl.constexpr, BONUS: tl.constexpr, C: tl.constexpr
):
    """Output of a chunk's own tokens, [C, BV], where the channels that are read out decay.

    With BONUS, b_u [BV] weighs what a token reads of itself; the rest as `mix_by_channel`.
    """
    lag = tl.arange(0, C)[:, None] - tl.arange(0, C)[None, :]
    b_A = tl.dot(b_q, b_kt, input_precision="ieee")  # [C, BK] @ [BK, C] -> [C, C]
    b_o = mix_by_channel(tl.where(lag >= SHIFT, b_A, 0.0), b_v, p_v, step, b_g, n, m_v, SHIFT, C)
    if BONUS:
        b_o += tl.sum(tl.where(lag == 0, b_A, 0.0), 1)[:, None] * b_u[None, :] * b_v
    return b_o


@triton.jit
def span(DTYPE: tl.constexpr):
    """The decay of a chunk, in nats, down to which a product may be split at the chunk's middle.

    Exponents within -40 and 40 stay in the range of bfloat16 and float32. An exponent x is rounded by
    2^-24 |x|, which 16 bits never see; float32 would, so its exponents stay within -8 and 8.
    """
    return -16.0 if DTYPE == tl.float32 else -80.0


@triton.jit
def scores_by_channel(b_q, b_kt, p_k, step, b_g, n, m_k, SHIFT: tl.constexpr, C: tl.constexpr):
    """Scores of a chunk whose channels decay each at its own rate.

    A_ij = sum_c q_ic e^(g_c (i - j - SHIFT)) k_jc for i - j >= SHIFT, else 0. Where half a chunk decays by at
    most e^40 (float32: e^8), both factors are taken relative to the chunk's middle and one product gives all
    scores. Otherwise one column at a time is summed, from differences >= 0 alone: right for any decay.

    Args:
        b_q, b_kt: [C, BK] and [BK, C].
        p_k: pointers to the chunk's first row of k, [BK]; the next row is `step` further; m_k masks channels.
        b_g: log decay, [BK].
        n: tokens of the chunk.
    """
    o_c = tl.arange(0, C)
    if tl.min(b_g, 0) * C >= span(b_q.dtype):
        o_x = (o_c - C // 2).to(tl.float32)
        b_qx = b_q * tl.exp(b_g[None, :] * o_x[:, None])
        b_kx = b_kt * tl.exp(-b_g[:, None] * (o_x + SHIFT)[None, :])
        b_A = dot_wide(b_qx, b_kx, b_q.dtype)  # [C, BK] @ [BK, C] -> [C, C]
    else:
        b_A = tl.zeros([C, C], tl.float32)
        for j in range(n):
            b_k = tl.load(p_k + j * step, mask=m_k, other=0).to(tl.float32)
            b_e = tl.exp(b_g[None, :] * tl.maximum(o_c - j - SHIFT, 0).to(tl.float32)[:, None])
            b_a = tl.sum(b_q.to(tl.float32) * b_e * b_k[None, :], 1)
            b_A = tl.where(o_c[None, :] == j, b_a[:, None], b_A)
    return tl.where(o_c[:, None] - o_c[None, :] >= SHIFT, b_A, 0.0)


@triton.jit
def mix_by_channel(b_W, b_v, p_v, step, b_g, n, m_v, SHIFT: tl.constexpr, C: tl.constexpr):
    """Rows of v mixed with weights W that decay channel by channel: the transpose of the scores above.

    R_ic = sum_j W_ij e^(g_c (i - j - SHIFT)) v_jc; W must be 0 where i - j < SHIFT.

    Args:
        b_W, b_v: [C, C] float32 and [C, BV].
        p_v: pointers to the chunk's first row of v, [BV]; the next row is `step` further; m_v masks channels.
        b_g: log decay, [BV].
        n: tokens of the chunk.
    """
    o_c = tl.arange(0, C)
    if tl.min(b_g, 0) * C >= span(b_v.dtype):
        o_x = (o_c - C // 2).to(tl.float32)
        b_vx = b_v * tl.exp(-b_g[None, :] * (o_x + SHIFT)[:, None])
        b_R = dot_wide(b_W, b_vx, b_v.dtype) * tl.exp(
            b_g[None, :] * o_x[:, None]
        )  # [C, C] @ [C, BV] -> [C, BV]
    else:
        b_R = tl.zeros_like(b_v).to(tl.float32)
        for j in range(n):
            b_row = tl.load(p_v + j * step, mask=m_v, other=0).to(tl.float32)
            b_e = tl.exp(b_g[None, :] * tl.maximum(o_c - j - SHIFT, 0).to(tl.float32)[:, None])
            b_w = tl.sum(tl.where(o_c[None, :] == j, b_W, 0.0), 1)
            b_R += b_w[:, None] * b_e * b_row[None, :]
    return b_R
