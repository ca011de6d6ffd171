r"""A fading average a channel: the Triton kernels of RWKV-4, and of AFT-simple, where nothing fades.

.. math:: o_t = \frac{A_{t-1} + e^{u + k_t} v_t}{B_{t-1} + e^{u + k_t}}, \qquad
    A_t = e^{g} A_{t-1} + e^{k_t} v_t, \qquad B_t = e^{g} B_{t-1} + e^{k_t}

A and B are held as a, b and m, times e^-m. Segments and loops are those of `kernels/elementwise.py`. With
:math:`\ell_t` the logarithm of the denominator, the gradients of A and B are such sums as well, from right to
left, with exponents :math:`-\ell_t`, and are held in the same way, as alpha, beta and nu:

.. math:: dA_{t-1} = e^{g} dA_t + e^{-\ell_t} do_t, \qquad
    dB_{t-1} = e^{g} dB_t - e^{-\ell_t} do_t\, o_t

.. math:: dv_t = e^{u + k_t - \ell_t} do_t + e^{k_t} dA_t, \qquad
    dk_t = e^{u + k_t - \ell_t} do_t (v_t - o_t) + e^{k_t} (v_t\, dA_t + dB_t)

Since :math:`\ell` is at least the exponent of every token that it sums, no exponential is of a number > 0.
Every token shares g, so its gradient is carried forward beside the state, as :math:`\partial A / \partial g`:
nothing cancels. Last, m itself is a part of the state: it hands its gradient to the token that set it.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import find_segment

NO_SPECIALIZE = ["T", "L", "N"]
"""Arguments whose value must not cause another compilation: every length of text would."""


@triton.jit
def join(a, b, m, x, y, n):
    """The sums (a, b), held times e^-m, plus (x, y) e^n: three numbers again. One of m and n is finite."""
    top = tl.maximum(m, n)
    old, new = tl.exp(m - top), tl.exp(n - top)
    return old * a + new * x, old * b + new * y, top


@triton.jit
def left_over(
    b_a, b_b, b_m, ends, b_g, i_s, i_j, o_d, m_d, length, L, D: tl.constexpr, BJ: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The sums before the text, and what the segments before this one add: [BD] each; REVERSE: after it.

    Args:
        b_a, b_b, b_m: the sums with which the sequence begins (REVERSE: ends), [BD].
        ends: [segments, 3, D]: of a segment a, b and m of its own tokens.
    """
    count = tl.maximum((length + L - 1) // L, 1)
    before = count - 1 - i_j if REVERSE else i_j
    skipped = tl.maximum(length - (i_j + 1) * L, 0) if REVERSE else i_j * L
    b_m += b_g * skipped
    if SEGMENTS:
        STEP: tl.constexpr = 3 * D if REVERSE else -3 * D
        p_e = ends + i_s.to(tl.int64) * 3 * D + o_d[None, :]
        o_j = tl.arange(0, BJ)
        for i in range(0, before, BJ):
            # the nearest segment has age 0; between it and this one all are full
            age = (i + o_j)[:, None]
            m_e = (age < before) & m_d[None, :]
            p_j = p_e + (age + 1) * STEP
            b_n = tl.load(p_j + 2 * D, mask=m_e, other=float("-inf")) + b_g[None, :] * (age * L)
            b_top = tl.maximum(b_m, tl.max(b_n, 0))
            # channels outside of the tensor have no exponent at all
            b_top = tl.where(m_d, b_top, 0.0)
            b_w = tl.exp(b_n - b_top[None, :])
            b_old = tl.exp(b_m - b_top)
            b_a = b_old * b_a + tl.sum(b_w * tl.load(p_j, mask=m_e, other=0), 0)
            b_b = b_old * b_b + tl.sum(b_w * tl.load(p_j + D, mask=m_e, other=0), 0)
            b_m = b_top
    return b_a, b_b, b_m


@triton.jit
def load_sums(state, i_n, o_d, m_d, N, D: tl.constexpr, BD: tl.constexpr, HAS: tl.constexpr):
    """a, b and m of one sequence from state [3, N, D]; an empty past has no exponent."""
    b_a, b_b = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    b_m = tl.full([BD], float("-inf"), tl.float32)
    if HAS:
        p_n = state + i_n.to(tl.int64) * D + o_d
        size = tl.cast(N, tl.int64) * D
        b_a = tl.load(p_n, mask=m_d, other=0)
        b_b = tl.load(p_n + size, mask=m_d, other=0)
        b_m = tl.where(b_b > 0, tl.load(p_n + 2 * size, mask=m_d, other=0), b_m)
    return b_a, b_b, b_m


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def average_write_kernel(
    k, v, o, g, ends, cu_seqlens, T, L, N, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    STAGES: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What each segment's own tokens add up to: ends [segments, 3, D].

    k, v are keys and values; REVERSE: the logarithms of the denominators and do, with o.
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    i_s = tl.program_id(0) // ND
    o_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    unread = i_j == 0 if REVERSE else (i_j + 1) * L >= length
    if (i_n >= N) | unread:
        return
    b_g = tl.load(g + o_d, mask=m_d, other=0)
    tokens = tl.minimum(length - i_j * L, L)
    STEP: tl.constexpr = -1 if REVERSE else 1
    first += i_j * L + (tokens - 1 if REVERSE else 0)
    b_a, b_b, b_m = load_sums(ends, i_n, o_d, m_d, N, D, BD, False)
    for i in tl.range(0, tokens, num_stages=STAGES):
        row = (first + STEP * i) * D + o_d
        b_k = tl.load(k + row, mask=m_d, other=0).to(tl.float32)
        b_v = tl.load(v + row, mask=m_d, other=0).to(tl.float32)
        if REVERSE:
            b_o = tl.load(o + row, mask=m_d, other=0).to(tl.float32)
            b_a, b_b, b_m = join(b_a, b_b, b_m + b_g, b_v, -b_v * b_o, -b_k)
        else:
            b_a, b_b, b_m = join(b_a, b_b, b_m + b_g, b_v, 1.0, b_k)
    p_e = ends + i_s.to(tl.int64) * 3 * D + o_d
    tl.store(p_e, b_a, mask=m_d)
    tl.store(p_e + D, b_b, mask=m_d)
    tl.store(p_e + 2 * D, b_m, mask=m_d)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def average_read_kernel(
    k, v, g, u, start, ends, o, end, do, lse, dg, slopes, marks, cu_seqlens, T, L, N,
    D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr, STORE_HT: tl.constexpr,
    SLOPES: tl.constexpr,
):  # fmt: skip
    """o [B, T, D] of one segment and 64 channels; the last segment stores the sums, end [3, N, D].

    SLOPES: for the gradient, lse [B, T, D] instead of o; a segment's share of dg [segments, D]; the sums'
    derivatives by g where it ends, [segments, 3, D]; marks [segments, D]: the last token that set m, or -1.
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    i_s = tl.program_id(0) // ND
    o_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    b_g = tl.load(g + o_d, mask=m_d, other=0)
    b_u = tl.load(u + o_d, mask=m_d, other=0)
    b_a, b_b, b_m = load_sums(start, i_n, o_d, m_d, N, D, BD, HAS_H0)
    b_a, b_b, b_m = left_over(b_a, b_b, b_m, ends, b_g, i_s, i_j, o_d, m_d, length, L, D, BJ, False, SEGMENTS)
    b_da, b_db = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    b_dg, b_mark = tl.zeros([BD], tl.float32), tl.full([BD], -1, tl.int32)
    tokens = tl.minimum(length - i_j * L, L)
    for i in tl.range(0, tokens, num_stages=STAGES):
        row = (first + i_j * L + i) * D + o_d
        b_k = tl.load(k + row, mask=m_d, other=0).to(tl.float32)
        b_v = tl.load(v + row, mask=m_d, other=0).to(tl.float32)
        # read: the past, and this token with its bonus
        b_x, b_y, b_top = join(b_a, b_b, b_m, b_v, 1.0, b_u + b_k)
        b_o = b_x / b_y
        if SLOPES:
            tl.store(lse + row, b_top + tl.log(b_y), mask=m_d)
            b_do = tl.load(do + row, mask=m_d, other=0).to(tl.float32)
            b_dg += b_do * (b_da - b_o * b_db) * tl.exp(b_m - b_top) / b_y
            b_past = tl.exp(b_m + b_g - tl.maximum(b_m + b_g, b_k))
            b_da, b_db = b_past * (b_da + b_a), b_past * (b_db + b_b)
            b_mark = tl.where(b_k >= b_m + b_g, i_j * L + i, b_mark)
        else:
            tl.store(o + row, b_o.to(o.dtype.element_ty), mask=m_d)
        # write
        b_a, b_b, b_m = join(b_a, b_b, b_m + b_g, b_v, 1.0, b_k)
    if SLOPES:
        p_s = i_s.to(tl.int64) * D + o_d
        tl.store(dg + p_s, b_dg, mask=m_d)
        tl.store(marks + p_s, b_mark, mask=m_d)
        p_e = slopes + i_s.to(tl.int64) * 3 * D + o_d
        tl.store(p_e, b_da, mask=m_d)
        tl.store(p_e + D, b_db, mask=m_d)
        tl.store(p_e + 2 * D, b_m, mask=m_d)
    if STORE_HT:
        if (i_j + 1) * L >= length:
            p_n, size = end + i_n.to(tl.int64) * D + o_d, tl.cast(N, tl.int64) * D
            tl.store(p_n, b_a, mask=m_d)
            tl.store(p_n + size, b_b, mask=m_d)
            tl.store(p_n + 2 * size, b_m, mask=m_d)


@triton.jit
def setter(marks, i_s, i_j, o_d, m_d, length, L, D: tl.constexpr, BJ: tl.constexpr):
    """The token of this segment that set the sequence's final m, or -1; and whether no token did, [BD]."""
    count = tl.maximum((length + L - 1) // L, 1)
    p_m = marks + (i_s - i_j).to(tl.int64) * D + o_d[None, :]
    b_last = tl.load(marks + i_s.to(tl.int64) * D + o_d, mask=m_d, other=-1)
    b_final = b_last
    for i in range(0, count, BJ):
        j = (i + tl.arange(0, BJ))[:, None]
        b_j = tl.load(p_m + j * D, mask=(j < count) & m_d[None, :], other=-1)
        b_final = tl.maximum(b_final, tl.max(b_j, 0))
    return tl.where(b_last == b_final, b_last, -1), b_final < 0


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def average_gradient_kernel(
    k, v, g, u, start, end, o, do, dend, lse, ends, slopes, marks, dk, dv, dg, du, dstart, cu_seqlens,
    T, L, N, D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, HAS_DHT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, T, D] of one segment, from its last token to its first, and its shares of dg and du.

    `ends` are those of the reverse write; the sequence's first segment stores dstart [3, N, D].
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    i_s = tl.program_id(0) // ND
    o_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    b_g = tl.load(g + o_d, mask=m_d, other=0)
    b_u = tl.load(u + o_d, mask=m_d, other=0)
    p_n, size = i_n.to(tl.int64) * D + o_d, tl.cast(N, tl.int64) * D
    b_a, b_b, b_m = load_sums(end, i_n, o_d, m_d, N, D, BD, HAS_DHT)
    b_mark, b_none = tl.full([BD], -1, tl.int32), m_d
    b_dm = tl.zeros([BD], tl.float32)
    b_alpha, b_beta, b_nu = load_sums(dend, i_n, o_d, m_d, N, D, BD, False)
    if HAS_DHT:
        # a_T = A_T e^-m: what a, b and m want of m goes to the token that set it
        b_alpha = tl.load(dend + p_n, mask=m_d, other=0)
        b_beta = tl.load(dend + p_n + size, mask=m_d, other=0)
        b_dm = tl.load(dend + p_n + 2 * size, mask=m_d, other=0) - b_alpha * b_a - b_beta * b_b
        b_nu = tl.where(b_m == float("-inf"), 0.0, -b_m)
        b_mark, b_none = setter(marks, i_s, i_j, o_d, m_d, length, L, D, BJ)
    b_alpha, b_beta, b_nu = left_over(
        b_alpha, b_beta, b_nu, ends, b_g, i_s, i_j, o_d, m_d, length, L, D, BJ, True, SEGMENTS
    )
    p_e = slopes + i_s.to(tl.int64) * 3 * D + o_d
    b_slope = b_alpha * tl.load(p_e, mask=m_d, other=0) + b_beta * tl.load(p_e + D, mask=m_d, other=0)
    b_dg = b_slope * tl.exp(b_nu + tl.load(p_e + 2 * D, mask=m_d, other=0))
    b_dg += tl.where(b_mark >= 0, b_dm * (length - 1 - b_mark), 0.0)
    b_du = tl.zeros([BD], tl.float32)
    tokens = tl.minimum(length - i_j * L, L)
    for i in tl.range(0, tokens, num_stages=STAGES):
        t = i_j * L + tokens - 1 - i
        row = (first + t) * D + o_d
        b_k = tl.load(k + row, mask=m_d, other=0).to(tl.float32)
        b_v = tl.load(v + row, mask=m_d, other=0).to(tl.float32)
        b_do = tl.load(do + row, mask=m_d, other=0).to(tl.float32)
        b_o = tl.load(o + row, mask=m_d, other=0).to(tl.float32)
        b_lse = tl.load(lse + row, mask=m_d, other=0)
        b_self = tl.exp(b_u + b_k - b_lse) * b_do
        b_w = tl.exp(b_k + b_nu)
        b_own = b_self * (b_v - b_o)
        b_dk = b_own + b_w * (b_v * b_alpha + b_beta) + tl.where(b_mark == t, b_dm, 0.0)
        b_dv = b_self + b_w * b_alpha
        tl.store(dk + row, b_dk.to(dk.dtype.element_ty), mask=m_d)
        tl.store(dv + row, b_dv.to(dv.dtype.element_ty), mask=m_d)
        b_du += b_own
        b_alpha, b_beta, b_nu = join(b_alpha, b_beta, b_nu + b_g, b_do, -b_do * b_o, -b_lse)
    if i_j == 0:
        b_dg += tl.where(b_none, b_dm * length, 0.0)
        if HAS_H0:
            b_a, b_b, b_m = load_sums(start, i_n, o_d, m_d, N, D, BD, True)
            b_w = tl.where(b_m == float("-inf"), 0.0, tl.exp(b_m + b_nu))
            tl.store(dstart + p_n, b_w * b_alpha, mask=m_d)
            tl.store(dstart + p_n + size, b_w * b_beta, mask=m_d)
            b_dm0 = b_w * (b_a * b_alpha + b_b * b_beta) + tl.where(b_none, b_dm, 0.0)
            tl.store(dstart + p_n + 2 * size, b_dm0, mask=m_d)
    p_s = i_s.to(tl.int64) * D + o_d
    tl.store(dg + p_s, tl.load(dg + p_s, mask=m_d, other=0) + b_dg, mask=m_d)
    tl.store(du + p_s, b_du, mask=m_d)


@triton.jit
def average_step_kernel(
    k, v, g, u, a, b, m, o, out_a, out_b, out_m, SIZE, D: tl.constexpr, BLOCK: tl.constexpr
):
    """One token of N D channels: o and the next sums, in place too."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_p = p < SIZE
    b_g = tl.load(g + p % D, mask=m_p, other=0)
    b_u = tl.load(u + p % D, mask=m_p, other=0)
    b_k = tl.load(k + p, mask=m_p, other=0).to(tl.float32)
    b_v = tl.load(v + p, mask=m_p, other=0).to(tl.float32)
    b_a, b_b = tl.load(a + p, mask=m_p, other=0), tl.load(b + p, mask=m_p, other=0)
    b_m = tl.where(b_b > 0, tl.load(m + p, mask=m_p, other=0), float("-inf"))
    b_x, b_y, _ = join(b_a, b_b, b_m, b_v, 1.0, b_u + b_k)
    tl.store(o + p, (b_x / b_y).to(o.dtype.element_ty), mask=m_p)
    b_a, b_b, b_m = join(b_a, b_b, b_m + b_g, b_v, 1.0, b_k)
    tl.store(out_a + p, b_a, mask=m_p)
    tl.store(out_b + p, b_b, mask=m_p)
    tl.store(out_m + p, b_m, mask=m_p)
