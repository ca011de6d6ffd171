"""One token of a selective scan, and the state that enters a segment: blocks of all its kernels."""

import triton
import triton.language as tl


@triton.jit
def load_token(k, v, w, row, live, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """k [BK], v and w [BV] of one row, float32; zeros, which change no state, where it is not live."""
    b_k = tl.load(k + row * K + o_k, mask=live & (o_k < K), other=0).to(tl.float32)
    b_v = tl.load(v + row * V + o_v, mask=live & (o_v < V), other=0).to(tl.float32)
    b_w = tl.load(w + row * V + o_v, mask=live & (o_v < V), other=0).to(tl.float32)
    return b_k, b_v, b_w


@triton.jit
def strength(b_k, b_w, RATED: tl.constexpr):
    """How strongly a value channel is written, [BV]: the step size w; or beta's implicit step."""
    if RATED:
        return b_w
    else:
        return b_w / (1 + b_w * tl.sum(b_k * b_k, 0))


@triton.jit
def factor(b_A, b_k, b_e, RATED: tl.constexpr):
    """What one token keeps of every entry of the state, [BK, BV], within [0, 1]."""
    if RATED:
        return tl.exp(b_A * b_e[None, :])
    else:
        return 1 - (b_k * b_k)[:, None] * b_e[None, :]


@triton.jit
def enter_state(
    h0, products, segments, i_s, i_n, i_j, i_h, o_h, o_S, m_S, length, L, H: tl.constexpr, KV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The state that enters segment i_j of sequence i_n: h0, then what the earlier segments keep and write.

    With REVERSE time runs backwards: the segments after this one come first.

    Args:
        h0: [N, H, KV] entries, read at o_h.
        products, segments: factors and writes of whole segments, [segments, H, KV], read at o_S.
    """
    b_S = tl.zeros_like(o_S).to(tl.float32)
    if HAS_H0:
        b_S += tl.load(h0 + (i_n.to(tl.int64) * H + i_h) * KV + o_h, mask=m_S, other=0)
    if SEGMENTS:
        last = tl.maximum((length + L - 1) // L, 1) - 1
        before = last - i_j if REVERSE else i_j
        begin = i_s - i_j + (last if REVERSE else 0)
        o_p = (begin.to(tl.int64) * H + i_h) * KV + o_S
        for _ in range(before):
            b_S *= tl.load(products + o_p, mask=m_S, other=0)
            b_S += tl.load(segments + o_p, mask=m_S, other=0)
            o_p += -H * KV if REVERSE else H * KV
    return b_S
