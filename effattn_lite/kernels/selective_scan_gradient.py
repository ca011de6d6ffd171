"""Gradients of a selective scan: states made again, chunk by chunk, meet their gradient from the right."""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import find_segment
from effattn_lite.kernels.selective_scan_token import enter_state, factor, load_token, strength


@triton.jit(do_not_specialize=["T", "L", "N"])
def selective_scan_gradient_kernel(
    q, k, v, w, do, A, D, h0, dht, products, segments, dsegments, checkpoints, states,
    dq, dk, dv, dw, dA, dD, dh0, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    C: tl.constexpr, RATED: tl.constexpr, SKIP: tl.constexpr, PACKED: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_DHT: tl.constexpr, SEGMENTS: tl.constexpr, STORE_DH0: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment, head and tile of value channels.

    dq and dk, [tiles, B, T, H, K], are this tile's shares, and dA [segments, K, V] and dD [segments, V] this
    segment's; the caller adds them up. checkpoints [programs, L / C, BK, BV] has the states at the starts of
    chunks, states [programs, C, BK, BV] those before each token of one chunk.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    SK: tl.constexpr = 1 if RATED else V
    SV: tl.constexpr = K if RATED else 1
    i_p = tl.program_id(0)
    i_s = i_p // (NV * H)
    i_h = i_p // NV % H
    i_v = i_p % NV
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    o_h = o_k[:, None] * SK + o_v[None, :] * SV
    o_S = o_k[:, None] * V + o_v[None, :]
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    o_b = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]
    p_states = states + i_p.to(tl.int64) * C * BK * BV + o_b
    p_checkpoints = checkpoints + i_p.to(tl.int64) * (L // C) * BK * BV + o_b
    # a tile's shares of dq and dk lie one text after the other
    o_share = i_v.to(tl.int64) * (T if PACKED else N * T) * H
    b_A = tl.load(A + o_S, mask=m_S, other=0) if RATED else tl.zeros([BK, BV], tl.float32)
    b_D = tl.load(D + o_v, mask=m_v, other=0) if SKIP else tl.zeros([BV], tl.float32)
    b_S = enter_state(
        h0, products, segments, i_s, i_n, i_j, i_h, o_h, o_S, m_S, length, L,
        H, K * V, False, HAS_H0, SEGMENTS,
    )  # fmt: skip
    for i_c in range(0, tokens, C):
        tl.store(p_checkpoints + i_c // C * BK * BV, b_S)
        # the state after the last chunk is needed by nobody
        for i in range(0 if i_c + C >= tokens else C):
            row = (first + i_c + i) * H + i_h
            b_k, b_v, b_w = load_token(k, v, w, row, True, o_k, o_v, K, V)
            b_e = strength(b_k, b_w, RATED)
            b_S = b_S * factor(b_A, b_k, b_e, RATED) + b_k[:, None] * (b_e * b_v)[None, :]
    # G is the gradient of the state after a token, without that token's own read
    b_G = enter_state(
        dht, products, dsegments, i_s, i_n, i_j, i_h, o_h, o_S, m_S, length, L,
        H, K * V, True, HAS_DHT, SEGMENTS,
    )  # fmt: skip
    b_dA, b_dD = tl.zeros([BK, BV], tl.float32), tl.zeros([BV], tl.float32)
    chunks = (tokens + C - 1) // C
    for j in range(chunks):
        i_c = (chunks - 1 - j) * C
        n = tl.minimum(tokens - i_c, C)
        tl.debug_barrier()
        b_S = tl.load(p_checkpoints + i_c // C * BK * BV)
        for i in range(n):
            tl.store(p_states + i * BK * BV, b_S)
            row = (first + i_c + i) * H + i_h
            b_k, b_v, b_w = load_token(k, v, w, row, True, o_k, o_v, K, V)
            b_e = strength(b_k, b_w, RATED)
            b_S = b_S * factor(b_A, b_k, b_e, RATED) + b_k[:, None] * (b_e * b_v)[None, :]
        tl.debug_barrier()
        # [sketch:bwd]
        for i in range(n):
            row = (first + i_c + n - 1 - i) * H + i_h
            b_k, b_v, b_w = load_token(k, v, w, row, True, o_k, o_v, K, V)
            b_q = tl.load(q + row * K + o_k, mask=m_k, other=0).to(tl.float32)
            b_do = tl.load(do + row * V + o_v, mask=m_v, other=0).to(tl.float32)
            b_e = strength(b_k, b_w, RATED)
            b_a = factor(b_A, b_k, b_e, RATED)
            b_S = tl.load(p_states + (n - 1 - i) * BK * BV)
            b_u = b_e * b_v
            # o = s S^T q + D v, S = a S' + k u^T with u = e v
            b_dq = tl.sum((b_S * b_a + b_k[:, None] * b_u[None, :]) * (b_do * scale)[None, :], 1)
            b_G += b_q[:, None] * (b_do * scale)[None, :]
            b_du = tl.sum(b_G * b_k[:, None], 0)
            b_dk = tl.sum(b_G * b_u[None, :], 1)
            if RATED:
                # a = exp(A w), e = w
                b_da = b_G * b_S * b_a
                b_dA += b_da * b_e[None, :]
                b_dw = b_du * b_v + tl.sum(b_da * b_A, 0)
            else:
                # a = 1 - k^2 e, e = w / (1 + w l), l = |k|^2
                b_da = b_G * b_S
                b_de = b_du * b_v - tl.sum(b_da * (b_k * b_k)[:, None], 0)
                b_dl = -tl.sum(b_de * b_e * b_e, 0)
                b_dk += 2 * b_k * (b_dl - tl.sum(b_da * b_e[None, :], 1))
                b_r = 1 / (1 + b_w * tl.sum(b_k * b_k, 0))
                b_dw = b_de * b_r * b_r
            b_G *= b_a
            # [/sketch:bwd]
            b_dD += b_do * b_v
            b_dv = b_du * b_e + b_D * b_do
            tl.store(dq + (o_share + row) * K + o_k, b_dq.to(dq.dtype.element_ty), mask=m_k)
            tl.store(dk + (o_share + row) * K + o_k, b_dk.to(dk.dtype.element_ty), mask=m_k)
            tl.store(dv + row * V + o_v, b_dv.to(dv.dtype.element_ty), mask=m_v)
            tl.store(dw + row * V + o_v, b_dw.to(dw.dtype.element_ty), mask=m_v)
    if RATED:
        tl.store(dA + i_s.to(tl.int64) * K * V + o_S, b_dA, mask=m_S)
    if SKIP:
        tl.store(dD + i_s.to(tl.int64) * V + o_v, b_dD, mask=m_v)
    if STORE_DH0:
        if i_j == 0:
            tl.store(dh0 + (i_n.to(tl.int64) * H + i_h) * K * V + o_h, b_G, mask=m_S)
