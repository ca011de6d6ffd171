r"""Gradients of q, k, g and the bonus: one pass from the left, given every chunk's dS, of its last state.

The gradient of g_t sums over all pairs of a writer j < t and a reader i >= t: their path crosses g_t. The
short way, :math:`\sum_{i \ge t} (q_i \odot dq_i - k_i \odot dk_i)` over the rest of the text, also adds every
pair that does not cross and takes it away again: the roundings stay, and add up over the text. Here a chunk
that holds S before it and dS behind it adds up the four kinds of pairs:

.. math:: dg_t = e^{\mathrm{total}} \odot \mathrm{rowsum}(S \odot dS)
    + \sum_{i \ge t} q_i \odot dq_i^{S} + \sum_{j < t} k_j \odot dk_j^{dS} + dg_t^{in}

both outside; the writer before, dq^S read from S; the reader behind, dk^dS read from dS; both inside. Nothing
is ever taken away. With a bonus g_t is crossed where j < t < i.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.gated_decay_chunk import (
    crossing,
    enter_segment,
    first_decays,
    grow,
    head_sums,
)


@triton.jit
def head_pairs(b_q, b_k, b_kt, b_W, b_Wt, b_D, WIDE: tl.constexpr):
    """dq, dk [C, BK] of the pairs i >= j inside a chunk with one gate a token, and dg [C] of those i > j.

    Args:
        b_q, b_k, b_kt: [C, BK], [C, BK], [BK, C].
        b_W, b_Wt: do v^T and v do^T, [C, C].
        b_D: decay between writer and reader, [C, C].
    """
    o_c = tl.arange(0, b_q.shape[0])
    b_P = b_W * b_D
    b_dq = tl.dot(b_P.to(b_k.dtype), b_k, input_precision="ieee")  # [C, C] @ [C, BK]
    b_dk = tl.dot((b_Wt * tl.trans(b_D)).to(b_q.dtype), b_q, input_precision="ieee")
    b_X = tl.dot(b_q, b_kt, input_precision="ieee") * b_P  # [C, BK] @ [BK, C]
    earlier = o_c[:, None] < o_c[None, :]
    # writers before t, [C, C] @ [C, C], then readers from t on; what does not cross t is 0, not taken away
    b_X = tl.dot(tl.where(earlier, 0.0, b_X), earlier.to(tl.float32), input_precision=WIDE)
    return b_dq, b_dk, tl.sum(tl.where(o_c[:, None] >= o_c[None, :], b_X, 0.0), 0)


@triton.jit
def channel_pairs(b_q, b_k, b_g, b_W, b_Wt, BONUS: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr):
    """dq, dk and dg [C, BK] of the pairs i > j inside a chunk whose channels have a gate each.

    As in `channel_scores` a pair is computed in the smallest block that holds both. There the reader crosses
    the gates of the second half up to its own, the writer those of the first half behind it: dg sums readers
    from t on in second halves, writers before t in first halves.

    Returns:
        b_dq, b_dk, b_dg; and the decays from the chunk's start and to its end, [C, BK].
    """
    C: tl.constexpr = b_q.shape[0]
    o_c = tl.arange(0, C)
    b_fq, b_fk = first_decays(b_g, not BONUS), first_decays(b_g, False)
    b_dq, b_dk, b_dg = (tl.zeros_like(b_g), tl.zeros_like(b_g), tl.zeros_like(b_g))
    for level in tl.static_range(LEVELS):
        b_qd, b_kd = b_q * b_fq, b_k * b_fk
        pairs = crossing(C, level)
        # [C, C] @ [C, BK] -> [C, BK]
        b_r = tl.dot(tl.where(pairs, b_W, 0.0).to(b_q.dtype), b_kd.to(b_q.dtype), input_precision="ieee")
        b_s = tl.dot(
            tl.where(tl.trans(pairs), b_Wt, 0.0).to(b_q.dtype), b_qd.to(b_q.dtype), input_precision="ieee"
        )
        b_dq, b_dk = b_dq + b_fq * b_r, b_dk + b_fk * b_s
        o_h = o_c // 2**level
        t, r = o_c[:, None], o_c[None, :]
        sums = tl.where(o_h[:, None] % 2 == 1, r >= t + BONUS, r < t) & (o_h[:, None] == o_h[None, :])
        # rows of second halves hold readers only, rows of first halves writers
        b_dg += tl.dot(sums.to(tl.float32), b_qd * b_r + b_kd * b_s, input_precision=WIDE)
        b_fq, b_fk = grow(b_fq, b_g, False, level, 0), grow(b_fk, b_g, True, level, 0)
    return b_dq, b_dk, b_dg, b_fq, b_fk


@triton.jit(do_not_specialize=["T", "L", "N"])
def gated_decay_gradient_kernel(
    q, k, v, do, g, u, h0, segments, totals, states, dq, dk, dg, du, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BS: tl.constexpr, CHANNEL: tl.constexpr, BONUS: tl.constexpr, PACKED: tl.constexpr,
    HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dq, dk [tokens, H, K] and dg of one segment, value head and tile of K columns; V is whole.

    dg is [tokens, H, K], or, with one gate a token, this tile's part [tokens, H, tiles of K]; du is this
    segment's part [segments, H, K]. The state is held as S^T [BV, BK].
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    LEVELS: tl.constexpr = 4 if C == 16 else 5 if C == 32 else 6
    i_p = tl.program_id(0)
    i_s = i_p // (NK * H)
    i_h = i_p // NK % H
    o_k = i_p % NK * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k, m_v = o_k < K, o_v < V
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    WIDE: tl.constexpr = "ieee" if q.dtype.element_ty == tl.float32 else "tf32"
    o_S, m_S = o_v[:, None] + o_k[None, :] * V, m_v[:, None] & m_k[None, :]
    b_S = enter_segment(
        h0, segments, totals, i_s, i_n, i_j, i_h, o_k[None, :], o_v[:, None], length, L,
        H, K, V, CHANNEL, False, HAS_H0, SEGMENTS,
    )  # fmt: skip
    b_du = tl.zeros([BK], tl.float32)
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    behind = (o_c[None, :] >= o_c[:, None] + BONUS).to(tl.float32)
    before = (o_c[None, :] < o_c[:, None]).to(tl.float32)
    for i_c in range(0, tokens, C):
        n = tl.minimum(tokens - i_c, C)
        m_c = o_c < n
        # one 64-bit number a tile; within it 32 bits are enough
        row = (first + i_c) * H + i_h
        i_q = ((first + i_c) * (H // GROUP) + i_h // GROUP) * K
        o_q, m_q = (o_c * (H // GROUP * K))[:, None] + o_k[None, :], m_c[:, None] & m_k[None, :]
        o_o, m_o = (o_c * (H * V))[:, None] + o_v[None, :], m_c[:, None] & m_v[None, :]
        o_t, m_t = (o_c * (H * V))[None, :] + o_v[:, None], m_c[None, :] & m_v[:, None]
        o_d = (o_c * (H * K))[:, None] + o_k[None, :]
        b_q, b_k = tl.load(q + i_q + o_q, mask=m_q, other=0), tl.load(k + i_q + o_q, mask=m_q, other=0)
        b_v = tl.load(v + row * V + o_o, mask=m_o, other=0)
        b_vt = tl.load(v + row * V + o_t, mask=m_t, other=0)
        b_do = tl.load(do + row * V + o_o, mask=m_o, other=0)
        p_S = states + ((i_s.to(tl.int64) * (L // C) + i_c // C) * H + i_h) * K * V
        b_dS = tl.load(p_S + o_S, mask=m_S, other=0)
        b_W = tl.dot(b_do, b_vt, input_precision="ieee")  # [C, BV] @ [BV, C]
        if b_q.dtype == tl.float32:
            b_Wt = tl.trans(b_W)
        else:
            # on Hopper some Tritons turn a product, cast to 16 bits, into a wrong operand
            b_Wt = tl.dot(b_v, tl.load(do + row * V + o_t, mask=m_t, other=0))
        b_past = dot_wide(b_do, b_S, b_q.dtype)  # [C, BV] @ [BV, BK]
        b_future = dot_wide(b_v, b_dS, b_q.dtype)
        if CHANNEL:
            b_g = tl.load(g + row * K + o_d, mask=m_q, other=0)
            b_dq, b_dk, b_dg, b_since, b_left = channel_pairs(b_q, b_k, b_g, b_W, b_Wt, BONUS, LEVELS, WIDE)
            b_own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_W, 0.0), 1)[:, None]
            if BONUS:
                b_du += tl.sum(b_own * b_q * b_k, 0)
                b_own = b_own * tl.load(u + i_h * K + o_k, mask=m_k, other=0)[None, :]
            b_dq, b_dk = b_dq + b_own * b_k, b_dk + b_own * b_q
            b_past, b_future, b_kd = b_past * b_since, b_future * b_left, b_k * b_left
            b_keep = tl.exp(tl.sum(b_g, 0))[None, :]
            # [C, C] @ [C, BK] -> [C, BK]
            b_dg = tl.dot(behind, b_q * b_past, b_dg, input_precision=WIDE) * scale
            b_dg = tl.dot(before, b_k * b_future, b_dg, input_precision=WIDE)
            b_dg += tl.sum(b_S * b_dS * b_keep, 0)[None, :]
            tl.store(dg + row * K + o_d, b_dg, mask=m_q)
        else:
            b_since, b_left, b_total, b_D = head_sums(g + row, H, n, C, False)
            o_kt = (o_c * (H // GROUP * K))[None, :] + o_k[:, None]
            b_kt = tl.load(k + i_q + o_kt, mask=m_c[None, :] & m_k[:, None], other=0)
            b_dq, b_dk, b_dg = head_pairs(b_q, b_k, b_kt, b_W, b_Wt, b_D, WIDE)
            b_past = b_past * tl.exp(b_since)[:, None]
            b_future = b_future * tl.exp(b_left)[:, None]
            b_keep = tl.exp(b_total)
            b_y, b_z = tl.sum(b_q * b_past, 1) * scale, tl.sum(b_k * b_future, 1)
            b_dg = b_dg * scale + tl.sum(behind * b_y[None, :] + before * b_z[None, :], 1)
            b_dg += tl.sum(b_S * b_dS) * b_keep
            tl.store(dg + row * NK + o_c * (H * NK) + i_p % NK, b_dg, mask=m_c)
            b_kd = b_k * tl.exp(b_left)[:, None]
        tl.store(dq + row * K + o_d, ((b_dq + b_past) * scale).to(dq.dtype.element_ty), mask=m_q)
        tl.store(dk + row * K + o_d, (b_dk * scale + b_future).to(dk.dtype.element_ty), mask=m_q)
        b_S = tl.dot(b_vt, b_kd.to(b_v.dtype), b_S * b_keep, input_precision="ieee")  # [BV, C] @ [C, BK]
    if BONUS:
        tl.store(du + (i_s.to(tl.int64) * H + i_h) * K + o_k, b_du * scale, mask=m_k)
