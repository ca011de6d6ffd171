r"""Gradients of mLSTM: three linear attentions with the forward's weights, and sums for the gates.

With r_t one over the denominator, :math:`W_{tj} = e^{F_t - F_j + i_j - m_t}\, r_t` and
:math:`\delta_t = -\mathrm{sign}(den_t)\,(o_t \cdot do_t)` where the denominator is what was counted, 0 where
it is the bound:

.. math:: dq_t = s \sum_{j \le t} W_{tj}\,(do_t \cdot v_j + \delta_t)\, k_j, \qquad
    dk_j = s \sum_{t \ge j} W_{tj}\,(do_t \cdot v_j + \delta_t)\, q_t, \qquad
    dv_j = s \sum_{t \ge j} W_{tj}\,(q_t \cdot k_j)\, do_t

The input gate multiplies a key, so :math:`di_j = k_j \cdot dk_j`. The forget gate of step t multiplies every
weight that passes it: :math:`d\log\sigma(f_t) = P + \sum_{r \ge t} (q_r \cdot dq_r - k_r \cdot dk_r)` over
the rest of the segment, where P is the inner product of the state that leaves the segment with its gradient:
nothing cancels over more than a segment. And :math:`q_t \cdot dq_t = o_t \cdot do_t` where the denominator is
the bound, 0 where it is counted: then a longer query changes nothing.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.mlstm_state import (
    bound,
    chunk_gates,
    last_of,
    log_sigmoid,
    state_after,
    state_before,
)


@triton.jit
def mlstm_rows_kernel(o, do, mt, den, r, d, u, ROWS, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """What the backward needs of every token and head, float32: r, delta, and u = q . dq."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m_r = o_r < ROWS
    p, m = o_r[:, None] * V + o_v[None, :], m_r[:, None] & (o_v < V)[None, :]
    b_o = tl.load(o + p, mask=m, other=0).to(tl.float32)
    b_dot = tl.sum(b_o * tl.load(do + p, mask=m, other=0).to(tl.float32), 1)
    b_den = tl.load(den + o_r, mask=m_r, other=0)
    b_least = bound(tl.load(mt + o_r, mask=m_r, other=0))
    counted = tl.abs(b_den) > b_least
    tl.store(r + o_r, 1 / tl.maximum(tl.abs(b_den), b_least), mask=m_r)
    tl.store(d + o_r, tl.where(counted, tl.where(b_den > 0, -b_dot, b_dot), 0.0), mask=m_r)
    tl.store(u + o_r, tl.where(counted, 0.0, b_dot), mask=m_r)


@triton.jit(do_not_specialize=["T", "L", "N", "ROWS"])
def mlstm_gradient_kernel(
    a, b, c, x, i, f, mt, r, d, C0, n0, m0, dC, dn, segments, nsegments, marks, dsegments, dnsegments, dmarks,
    out, di, P, dC0, dn0, cu_seqlens, read_scale, write_scale, ROWS, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, A: tl.constexpr, X: tl.constexpr, C: tl.constexpr,
    BA: tl.constexpr, BX: tl.constexpr, BS: tl.constexpr, REVERSE: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, HAS_DHT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One gradient of one segment, head and tile of X columns: rows a, scored with b, take a mixture of c.

    ======  =========  ==  ==  ==
    output  direction  a   b   c
    ======  =========  ==  ==  ==
    dq      forward    do  v   k
    dk      backward   v   do  q
    dv      backward   k   q   do
    ======  =========  ==  ==  ==

    NORM: delta joins the scores, and the normaliser or its gradient the state (dq and dk). dk also gives,
    from the keys x, its tile's share of di [tiles, B, T, H], and P [tiles, segments, H] of the segments that
    have a later one. At a sequence's start dv leaves the gradient of C_0, dk that of n_0.
    """
    NX: tl.constexpr = (X + BX - 1) // BX
    DK: tl.constexpr = REVERSE and NORM
    i_p = tl.program_id(0)
    i_s = i_p // (NX * H)
    i_h = i_p // NX % H
    i_x = i_p % NX
    o_a = tl.arange(0, BA)
    o_x = i_x * BX + tl.arange(0, BX)
    o_c = tl.arange(0, C)
    m_a, m_x = o_a < A, o_x < X
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    # the state lies as [K, V]; keys are the columns of the tile, or its rows for dv
    o_S = o_a[:, None] + o_x[None, :] * V if NORM else o_a[:, None] * V + o_x[None, :]
    m_S = m_a[:, None] & m_x[None, :]
    b_start = tl.load(m0 + i_n.to(tl.int64) * H + i_h) if HAS_H0 else 0.0
    b_m = b_start
    if REVERSE:
        b_S, b_n = state_after(
            dC, dn, dsegments, dnsegments, dmarks, i_s, i_n, i_j, i_h, o_S, m_S, o_x, m_x, length, L,
            H, K, V, HAS_DHT, SEGMENTS, NORM,
        )  # fmt: skip
    else:
        b_S, b_n, b_m = state_before(
            C0, n0, m0, segments, nsegments, marks, i_s, i_n, i_j, i_h, o_S, m_S, o_x, m_x,
            H, K, V, HAS_H0, SEGMENTS,
        )  # fmt: skip
    if DK and SEGMENTS:
        if (i_j + 1) * L < length:
            b_C, b_k, _ = state_before(
                C0, n0, m0, segments, nsegments, marks, i_s + 1, i_n, i_j + 1, i_h, o_S, m_S, o_x, m_x,
                H, K, V, HAS_H0, SEGMENTS,
            )  # fmt: skip
            b_P = tl.sum(tl.sum(b_C * b_S, 0) + b_k * b_n, 0)
            tl.store(P + i_x * (tl.num_programs(0) // NX) + i_s * H + i_h, b_P)
    for i_b in range(0, tokens, C):
        # the chunk's first token
        i_c = (tokens - 1) // C * C - i_b if REVERSE else i_b
        n = tl.minimum(tokens - i_c, C)
        row = (first + i_c + o_c) * H + i_h
        m_c = o_c < n
        m_cx = m_c[:, None] & m_x[None, :]
        b_a = tl.load(a + row[:, None] * A + o_a[None, :], mask=m_c[:, None] & m_a[None, :], other=0)
        b_bt = tl.load(b + row[None, :] * A + o_a[:, None], mask=m_c[None, :] & m_a[:, None], other=0)
        b_c = tl.load(c + row[:, None] * X + o_x[None, :], mask=m_cx, other=0)
        # 1 local gates, as in the forward: `since` of the queries, `left` of the keys
        b_i, b_b = chunk_gates(i, f, row, m_c)
        b_mt, b_r = tl.load(mt + row, mask=m_c, other=1e30), tl.load(r + row, mask=m_c, other=0)
        m_end = last_of(b_mt, o_c, n)
        if REVERSE:
            b_m = b_start
            if i_j * L + i_c > 0:
                b_m = tl.load(mt + (first + i_c - 1) * H + i_h)
        b_sum = last_of(b_b, o_c, n)
        since, left = tl.exp(b_b + b_m - b_mt) * b_r, tl.exp(b_sum - b_b + b_i - m_end)
        kept = tl.exp(b_sum + b_m - m_end)
        # 2 intra-chunk, [C, BA] @ [BA, C] @ [C, BX], and 4 inter-chunk, [C, BA] @ [BA, BX]
        b_W = tl.dot(b_a, b_bt, input_precision="ieee")
        b_o = dot_wide(b_a, b_S, b_a.dtype)
        if REVERSE:
            b_D = b_b[None, :] - b_b[:, None] + b_i[:, None] - b_mt[None, :]
            see, b_rt, b_read, b_write = o_c[None, :] >= o_c[:, None], b_r[None, :], left, since * write_scale
        else:
            b_D = b_b[:, None] - b_b[None, :] + b_i[None, :] - b_mt[:, None]
            see, b_rt, b_read, b_write = o_c[:, None] >= o_c[None, :], b_r[:, None], since, left * write_scale
        b_x = b_c * b_write[:, None]
        if NORM:
            b_d = tl.load(d + row, mask=m_c, other=0)
            b_W += b_d[None, :] if REVERSE else b_d[:, None]
            b_o += b_n[None, :] if REVERSE else b_d[:, None] * b_n[None, :]
            b_n = b_n * kept + tl.sum(b_x * b_d[:, None] if REVERSE else b_x, 0)
        b_W *= tl.exp(tl.where(see, b_D, float("-inf"))) * (b_rt * write_scale)
        b_o = (b_o * b_read[:, None] + dot_wide(b_W, b_c, b_c.dtype)) * read_scale
        # 3 chunk state: [BA, C] @ [C, BX] -> [BA, BX]
        b_S = b_S * kept + dot_wide(b_bt, b_x, b_c.dtype)
        b_m = m_end
        # 5 output
        tl.store(out + row[:, None] * X + o_x[None, :], b_o.to(out.dtype.element_ty), mask=m_cx)
        if DK:
            b_k = tl.load(x + row[:, None] * X + o_x[None, :], mask=m_cx, other=0)
            tl.store(di + i_x.to(tl.int64) * ROWS + row, tl.sum(b_o * b_k, 1), mask=m_c)
    if REVERSE and HAS_H0:
        if i_j == 0:
            i_nh = i_n.to(tl.int64) * H + i_h
            if DK:
                tl.store(dn0 + i_nh * K + o_x, b_n, mask=m_x)
            else:
                tl.store(dC0 + i_nh * K * V + o_S, b_S, mask=m_S)


@triton.jit(do_not_specialize=["T", "L", "N", "ROWS"])
def mlstm_gates_kernel(
    f, u, di_parts, P, held, di, df, cu_seqlens, ROWS, T, L, N,
    H: tl.constexpr, NX: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """di and df [B, T, H] of one segment and head, from right to left; NX tiles have shares in di and P.

    held [N, H]: inner product of the final state with its gradient, if it has one.
    """
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    o_t = tl.arange(0, BT)
    # what the weights that pass the segment's end are worth
    b_P = 0.0
    if (i_j + 1) * L < length:
        for i_x in range(NX):
            b_P += tl.load(P + i_x * tl.num_programs(0) + i_s * H + i_h)
    elif HELD:
        b_P = tl.load(held + i_n.to(tl.int64) * H + i_h)
    for i_b in range(0, tokens, BT):
        t = (tokens - 1) // BT * BT - i_b + o_t
        row, m_t = (first + t) * H + i_h, t < tokens
        b_di = tl.zeros([BT], tl.float32)
        for i_x in range(NX):
            b_di += tl.load(di_parts + i_x * ROWS + row, mask=m_t, other=0)
        b_new = tl.load(u + row, mask=m_t, other=0) - b_di
        b_df = b_P + tl.cumsum(b_new, 0, reverse=True)
        b_P += tl.sum(b_new, 0)
        # the derivative of log(sigmoid(f)) is sigmoid(-f)
        b_df *= tl.exp(log_sigmoid(-tl.load(f + row, mask=m_t, other=0).to(tl.float32)))
        tl.store(di + row, b_di, mask=m_t)
        tl.store(df + row, b_df, mask=m_t)
