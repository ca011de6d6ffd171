"""Blocks of a state that is carried from segment to segment of a sequence."""

import triton
import triton.language as tl


@triton.jit
def load_state(
    h0, segments, i_s, i_n, i_j, i_h, o_k, o_v, b_g, length, L,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The state that enters segment i_j of sequence i_n: h0, then the earlier segments' states, each decayed.

    With REVERSE time runs backwards: the segments after this one come first. A segment's state is what its
    own tokens write, so the sum costs one read a segment; they lie in the L2 cache.

    Args:
        h0, segments: [N, H, K, V] and [segments, H, K, V], float32; read at k SK + v SV.
        o_k, o_v: rows and columns of the tile.
        b_g: log decay a token, broadcasting over the tile.
    """
    o_S = o_k[:, None] * SK + o_v[None, :] * SV
    m_S = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_S = tl.zeros_like(o_S).to(tl.float32)
    if HAS_H0:
        b_S += tl.load(h0 + (i_n.to(tl.int64) * H + i_h) * K * V + o_S, mask=m_S, other=0)
    if SEGMENTS:
        # every segment but a sequence's last has L tokens
        last = tl.maximum((length + L - 1) // L, 1) - 1
        before = last - i_j if REVERSE else i_j
        begin = i_s - i_j + (last if REVERSE else 0)
        p_S = segments + (begin.to(tl.int64) * H + i_h) * K * V + o_S
        for i in range(before):
            tokens = tl.minimum(length - (last - i) * L, L) if REVERSE else L
            b_S = b_S * tl.exp(b_g * tokens) + tl.load(p_S, mask=m_S, other=0)
            p_S += -H * K * V if REVERSE else H * K * V
    return b_S
