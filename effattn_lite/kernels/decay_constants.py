r"""Gradients of the constants of a fixed decay: g, one number a head or a key channel, and the bonus u.

Every token shares g, so its gradient is a sum over all steps of the text. Step t gives
:math:`\sum_{i \ge t} (q_i \cdot dq_i - k_i \cdot dk_i)` and a term of the final state, so the short way is
:math:`\sum_t t\,(q_t \cdot dq_t - k_t \cdot dk_t)`: it subtracts nearly equal numbers and multiplies their
rounding errors by up to T. Here the state's derivative :math:`\dot S = \partial S / \partial g` is carried
beside the state instead, and nothing cancels:

.. math:: \dot S_t = e^{g}(\dot S_{t-1} + S_{t-1}), \qquad
    \frac{\partial L}{\partial g} = \sum_t s\, q_t \odot (\dot S_t\, do_t) + \langle \dot S_T, dS_T\rangle

Each segment begins with :math:`\dot S = 0` and ends with the gradient of the state that leaves it: so it
counts the decay of its own steps, and the segments' sums add up.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.output import mix_by_channel
from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.common.state import load_state


@triton.jit(do_not_specialize=["T", "L", "N"])
def decay_constants_kernel(
    q, k, v, do, g, h0, dht, segments, dsegments, dg, du, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, CHANNEL: tl.constexpr, READ: tl.constexpr, BONUS: tl.constexpr, PACKED: tl.constexpr,
    HAS_H0: tl.constexpr, HAS_DHT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Sums of one segment, head and tile of the state: dg, du [segments, tiles of V, H, K].

    The state is held as S^T [BV, BK]; `segments` and `dsegments` are what the tokens of a segment write into
    the state and, from the right, into its gradient.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0)
    i_s = i_p // (NK * NV * H)
    i_h = i_p // (NK * NV) % H
    o_k = i_p // NV % NK * BK + tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k, m_v = o_k < K, o_v < V
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    SHIFT: tl.constexpr = 1 - READ
    lag = o_c[:, None] - o_c[None, :] - SHIFT
    b_g = tl.load(g + i_h * K + o_k, mask=m_k, other=0) if CHANNEL else tl.load(g + i_h + 0 * o_k)
    b_gs = b_g[None, :]
    # one decay a head: the same for every channel
    b_D = lag if CHANNEL else tl.exp(tl.load(g + i_h) * tl.maximum(lag, 0))
    b_S = load_state(
        h0, segments, i_s, i_n, i_j, i_h, o_v, o_k, b_gs, length, L, H, V, K, 1, V, False, HAS_H0, SEGMENTS
    )
    b_dot = tl.zeros_like(b_S)
    b_dg = tl.zeros([BK], tl.float32)
    b_du = tl.zeros([BK], tl.float32)
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    for i_c in range(0, tokens, C):
        n = tl.minimum(tokens - i_c, C)
        row = (first + i_c + o_c) * H + i_h
        m_c = o_c < n
        p_k, m_ck = row[:, None] * K + o_k[None, :], m_c[:, None] & m_k[None, :]
        b_q = tl.load(q + p_k, mask=m_ck, other=0)
        b_k = tl.load(k + p_k, mask=m_ck, other=0)
        b_do = tl.load(do + row[:, None] * V + o_v[None, :], mask=m_c[:, None] & m_v[None, :], other=0)
        b_vt = tl.load(v + row[None, :] * V + o_v[:, None], mask=m_c[None, :] & m_v[:, None], other=0)
        # an exponent comes down as a factor: `lag` between two tokens, `since` and `left` to the edges
        since, left = (o_c + READ).to(tl.float32), tl.maximum(n - 1 - o_c, 0).to(tl.float32)
        b_W = tl.dot(b_do, b_vt, input_precision="ieee")  # [C, BV] @ [BV, C] -> [C, C]
        if BONUS:
            b_self = tl.sum(tl.where(lag == -1, b_W, 0.0), 1)
            b_du += tl.sum(b_self[:, None] * b_q * b_k, 0)
        p_row = k + ((first + i_c) * H + i_h) * K + o_k
        b_W = tl.where(lag > 0, b_W * lag, 0.0)
        if CHANNEL:
            b_r = mix_by_channel(b_W, b_k, p_row, H * K, b_g, n, m_k, SHIFT, C)
        else:
            b_r = dot_wide(b_W * b_D, b_k, b_k.dtype)  # [C, C] @ [C, BK]
        b_past = dot_wide(b_do, b_dot, b_do.dtype)  # [C, BV] @ [BV, BK]
        b_past += dot_wide(b_do, b_S, b_do.dtype) * since[:, None]
        b_r += b_past * tl.exp(b_gs * since[:, None])
        b_dg += tl.sum(b_q * b_r, 0)
        b_kx = b_k * tl.exp(b_gs * left[:, None])
        b_dot = (b_dot + b_S * n) * tl.exp(b_gs * n)
        b_dot += dot_wide(b_vt, b_kx * left[:, None], b_k.dtype)  # [BV, C] @ [C, BK]
        b_S = b_S * tl.exp(b_gs * n) + dot_wide(b_vt, b_kx, b_k.dtype)
    b_dS = load_state(
        dht, dsegments, i_s, i_n, i_j, i_h, o_v, o_k, b_gs, length, L, H, V, K, 1, V, True, HAS_DHT, SEGMENTS
    )
    b_dg = b_dg * scale + tl.sum(b_dot * b_dS, 0)
    p_o = ((i_s.to(tl.int64) * NV + i_p % NV) * H + i_h) * K + o_k
    tl.store(dg + p_o, b_dg, mask=m_k)
    if BONUS:
        tl.store(du + p_o, b_du * scale, mask=m_k)
