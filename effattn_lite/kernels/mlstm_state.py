"""Blocks of the mLSTM engine: a chunk's gates, and the states that enter a segment from either side."""

import triton
import triton.language as tl

LIMIT = tl.constexpr(80.0)
"""As in `ops/engines/mlstm.py`."""


@triton.jit
def log_sigmoid(x):
    """log(sigmoid(x)) to full precision: log(1 + u) alone would round a forget gate near 1 to 1."""
    u = tl.exp(-tl.abs(x))
    rounded = (1 + u) - 1
    log1p = tl.where(rounded == 0, u, tl.log(1 + u) * (u / tl.where(rounded == 0, 1.0, rounded)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def chunk_gates(i, f, row, m_c):
    """Gates of a chunk's rows: i, and the log decay from the chunk's start up to and with each token, [C].

    Rows beyond the text (m_c False) decay nothing and write nothing.
    """
    b_i = tl.where(m_c, tl.load(i + row, mask=m_c, other=0).to(tl.float32), -1e30)
    b_f = tl.load(f + row, mask=m_c, other=0).to(tl.float32)
    return b_i, tl.cumsum(tl.where(m_c, log_sigmoid(b_f), 0.0), 0)


@triton.jit
def bound(m):
    """The least denominator, e^-m, kept inside the range of float32."""
    return tl.exp(-tl.minimum(tl.maximum(m, -LIMIT), LIMIT))


@triton.jit
def last_of(b_x, o_c, n):
    """Entry n - 1 of a vector over the chunk."""
    return tl.sum(tl.where(o_c == n - 1, b_x, 0.0), 0)


@triton.jit
def state_before(
    C0, n0, m0, segments, nsegments, marks, i_s, i_n, i_j, i_h, o_S, m_S, o_k, m_k,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The state that enters segment i_j: the initial one, then what the earlier segments write.

    Every segment's part is kept times e^-m of its own largest gate; two parts meet at the larger stabiliser.

    Args:
        segments, nsegments: what every segment writes, [segments, H, K, V] and [segments, H, K].
        marks: [segments, H, 2]: log decay over the segment, and its stabiliser.
        o_S, m_S: offsets of the tile in [K, V]; o_k, m_k: its keys, [BK].

    Returns:
        tile of C, n [BK], m.
    """
    b_S = tl.zeros_like(o_S).to(tl.float32)
    b_n = tl.zeros_like(o_k).to(tl.float32)
    b_m = tl.sum(b_n, 0)
    if HAS_H0:
        i_nh = i_n.to(tl.int64) * H + i_h
        b_S += tl.load(C0 + i_nh * K * V + o_S, mask=m_S, other=0)
        b_n += tl.load(n0 + i_nh * K + o_k, mask=m_k, other=0)
        b_m += tl.load(m0 + i_nh)
    if SEGMENTS:
        i_sh = (i_s - i_j).to(tl.int64) * H + i_h
        for _ in range(i_j):
            b_F, m_s = tl.load(marks + 2 * i_sh), tl.load(marks + 2 * i_sh + 1)
            m_new = tl.maximum(b_m + b_F, m_s)
            kept, new = tl.exp(b_m + b_F - m_new), tl.exp(m_s - m_new)
            b_S = b_S * kept + tl.load(segments + i_sh * K * V + o_S, mask=m_S, other=0) * new
            b_n = b_n * kept + tl.load(nsegments + i_sh * K + o_k, mask=m_k, other=0) * new
            b_m = m_new
            i_sh += H
    return b_S, b_n, b_m


@triton.jit
def state_after(
    dC, dn, dsegments, dnsegments, dmarks, i_s, i_n, i_j, i_h, o_S, m_S, o_k, m_k, length, L,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_DHT: tl.constexpr, SEGMENTS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that leaves segment i_j: of the final one, then of the later segments' reads.

    dmarks [segments, H]: log of what a segment keeps of a state, stabilisers included. Without NORM the
    normaliser's part is left at 0. Else as above.
    """
    b_S = tl.zeros_like(o_S).to(tl.float32)
    b_n = tl.zeros_like(o_k).to(tl.float32)
    if HAS_DHT:
        i_nh = i_n.to(tl.int64) * H + i_h
        b_S += tl.load(dC + i_nh * K * V + o_S, mask=m_S, other=0)
        if NORM:
            b_n += tl.load(dn + i_nh * K + o_k, mask=m_k, other=0)
    if SEGMENTS:
        last = tl.maximum((length + L - 1) // L, 1) - 1
        i_sh = (i_s - i_j + last).to(tl.int64) * H + i_h
        for _ in range(last - i_j):
            kept = tl.exp(tl.load(dmarks + i_sh))
            b_S = b_S * kept + tl.load(dsegments + i_sh * K * V + o_S, mask=m_S, other=0)
            if NORM:
                b_n = b_n * kept + tl.load(dnsegments + i_sh * K + o_k, mask=m_k, other=0)
            i_sh -= H
    return b_S, b_n
