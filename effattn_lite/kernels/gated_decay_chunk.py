r"""Blocks of one chunk whose decay depends on the token: its sums, its scores, the state that enters it.

A chunk may hold gates of 0 and of -20 nats side by side. So every exponent is at most 0, and a sum of gates,
never the difference of two large sums: `since` adds them from the chunk's start to a token's read, `left`
from behind a token's write to the chunk's end. With a bonus a token is read before its own decay.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-128.0)
"""Log decay that stands for any below it: its exponential is 0 in float32, and sums of it stay finite."""

GRAIN = tl.constexpr(1024.0)
"""Steps a nat of `between`'s coarse part: sums of 128 of them below -FLOOR are exact in float32."""


@triton.jit
def head_sums(p_g, step, n, C: tl.constexpr, REVERSE: tl.constexpr):
    """Decays of one gate a token: (since [C], left [C], total, D [C, C]).

    D holds e^(sum of g over j < r <= i) for i >= j, else 0; with REVERSE its rows are j, its columns i. Each
    gate is split into a multiple of 2^-10, whose sums are exact, and a rest, whose sums are small: their
    differences keep the digits that a difference of plain sums would lose.
    """
    o_c = tl.arange(0, C)
    b_g = tl.maximum(tl.load(p_g + o_c * step, mask=o_c < n, other=0), FLOOR)
    b_next = tl.maximum(tl.load(p_g + (o_c + 1) * step, mask=o_c + 1 < n, other=0), FLOOR)
    b_coarse = tl.floor(b_g * GRAIN) / GRAIN
    b_far = tl.cumsum(b_coarse, 0)
    b_near = tl.cumsum(b_g - b_coarse, 0)
    if REVERSE:
        b_x = (b_far[None, :] - b_far[:, None]) + (b_near[None, :] - b_near[:, None])
        seen = o_c[None, :] >= o_c[:, None]
    else:
        b_x = (b_far[:, None] - b_far[None, :]) + (b_near[:, None] - b_near[None, :])
        seen = o_c[:, None] >= o_c[None, :]
    b_D = tl.exp(tl.where(seen, tl.minimum(b_x, 0.0), float("-inf")))
    return tl.cumsum(b_g, 0), tl.cumsum(b_next, 0, reverse=True), tl.sum(b_g, 0), b_D


@triton.jit
def first_decays(b_g, OWN: tl.constexpr):
    """Decays within blocks of one token: its own gate's, or none."""
    if OWN:
        b_f = tl.exp(b_g)
    else:
        b_f = tl.full(b_g.shape, 1.0, tl.float32)
    return b_f


@triton.jit
def grow(b_f, b_g, LEFT: tl.constexpr, LEVEL: tl.constexpr, AXIS: tl.constexpr):
    """Decays within blocks of 2^(LEVEL + 1) tokens, from those within their halves.

    b_f holds e^(sum of g from the block's start to a token); what lies in a second half decays by its first
    half too. With LEFT it holds e^(sum of g from behind a token to the block's end), and a first half decays
    by its second.

    Args:
        b_f, b_g: decays and gates, [C, BK] for AXIS 0, [BK, C] for AXIS 1.
    """
    HALF: tl.constexpr = 2**LEVEL
    C: tl.constexpr = b_g.shape[AXIS]
    BK: tl.constexpr = b_g.shape[1 - AXIS]
    if AXIS == 0:
        second = tl.arange(0, 2)[None, :, None, None] == 1
        b_x = tl.reshape(b_g, (C // HALF // 2, 2, HALF, BK))
        b_sum = tl.sum(tl.sum(tl.where(second == LEFT, b_x, 0.0), 2), 1)[:, None, None, :]
        b_x = tl.reshape(b_f, (C // HALF // 2, 2, HALF, BK))
        b_x = tl.where(second == LEFT, b_x, b_x * tl.exp(b_sum))
        return tl.reshape(b_x, (C, BK))
    else:
        second = tl.arange(0, 2)[None, None, :, None] == 1
        b_x = tl.reshape(b_g, (BK, C // HALF // 2, 2, HALF))
        b_sum = tl.sum(tl.sum(tl.where(second == LEFT, b_x, 0.0), 3), 2)[:, :, None, None]
        b_x = tl.reshape(b_f, (BK, C // HALF // 2, 2, HALF))
        b_x = tl.where(second == LEFT, b_x, b_x * tl.exp(b_sum))
        return tl.reshape(b_x, (BK, C))


@triton.jit
def crossing(C: tl.constexpr, LEVEL: tl.constexpr):
    """Pairs of a row in the second and a column in the first half of a block of 2^(LEVEL + 1), [C, C]."""
    o_h = tl.arange(0, C) // 2**LEVEL
    return (o_h[:, None] % 2 == 1) & (o_h[:, None] == o_h[None, :] + 1)


@triton.jit
def channel_scores(
    b_x, b_yt, b_own, b_gx, b_gy, BONUS: tl.constexpr, REVERSE: tl.constexpr, LEVELS: tl.constexpr
):
    """Scores [C, C] of readers x with writers y whose channels have a gate each; x and y with their decays.

    A pair is computed where the two tokens part: in the smallest of the blocks of 2, 4, 8, ... C tokens that
    holds both. From the middle of that block the reader and the writer each decay by exponents <= 0, and one
    product gives all pairs of all blocks of a size: right for any gate, and no token's score depends on a
    later one.

    Args:
        b_x, b_yt: [C, BK] and [BK, C]; readers are behind their writers, with REVERSE before them.
        b_own: scores of the tokens with themselves, [C].
        b_gx, b_gy: gates, [C, BK] and [BK, C].
        BONUS: a token is read before its own decay.
        LEVELS: log2 of C.
    """
    C: tl.constexpr = b_x.shape[0]
    o_c = tl.arange(0, C)
    # the token's own gate is met by the later of a pair
    b_fx = first_decays(b_gx, not REVERSE and not BONUS)
    b_fy = first_decays(b_gy, REVERSE and not BONUS)
    b_A = tl.where(o_c[:, None] == o_c[None, :], b_own[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        # [C, BK] @ [BK, C] -> [C, C]
        b_a = tl.dot((b_x * b_fx).to(b_x.dtype), (b_yt * b_fy).to(b_x.dtype), input_precision="ieee")
        pairs = tl.trans(crossing(C, level)) if REVERSE else crossing(C, level)
        b_A = tl.where(pairs, b_a, b_A)
        b_fx = grow(b_fx, b_gx, REVERSE, level, 0)
        b_fy = grow(b_fy, b_gy, not REVERSE, level, 1)
    return b_A, b_x * b_fx, b_yt * b_fy


@triton.jit
def enter_segment(
    h0, segments, totals, i_s, i_n, i_j, i_h, o_k, o_v, length, L, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, CHANNEL: tl.constexpr, REVERSE: tl.constexpr, HAS_H0: tl.constexpr,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The state that enters segment i_j of sequence i_n: h0, then what earlier segments wrote, each decayed.

    With REVERSE time runs backwards: the segments after this one come first.

    Args:
        h0, segments: [N, H, K, V] and [segments, H, K, V], float32.
        totals: log decay of each segment, [segments, H, K] or [segments, H].
        o_k, o_v: rows and columns of the tile, of two axes that broadcast, in either order.
    """
    o_S = o_k * V + o_v
    m_S = (o_k < K) & (o_v < V)
    b_S = tl.zeros_like(o_S).to(tl.float32)
    if HAS_H0:
        b_S += tl.load(h0 + (i_n.to(tl.int64) * H + i_h) * K * V + o_S, mask=m_S, other=0)
    if SEGMENTS:
        last = tl.maximum((length + L - 1) // L, 1) - 1
        before = last - i_j if REVERSE else i_j
        i_sh = (i_s - i_j + (last if REVERSE else 0)).to(tl.int64) * H + i_h
        for _ in range(before):
            if CHANNEL:
                b_t = tl.load(totals + i_sh * K + o_k, mask=o_k < K, other=0)
            else:
                b_t = tl.load(totals + i_sh)
            b_S = b_S * tl.exp(b_t) + tl.load(segments + i_sh * K * V + o_S, mask=m_S, other=0)
            i_sh += -H if REVERSE else H
    return b_S
