r"""Selective scans: one Triton engine for Mamba and Longhorn.

.. math:: S_t = a_t \odot S_{t-1} + k_t\,(\epsilon_t \odot v_t)^\top, \qquad
    o_t = s\, S_t^\top q_t + D \odot v_t

The factor a of an entry is :math:`e^{w_v A_{vk}}` (RATED) or :math:`1 - k_k^2 \epsilon_v`; neither factors
nor states of all tokens are ever in memory. One program owns a segment of a sequence and a tile of value
channels and keeps their states in registers while it goes from token to token. Every factor lies in [0, 1]
and only products of factors are formed, so any decay is exact.

A sequence is cut into segments where there are too few channels to fill the chip.
`selective_scan_write_kernel` multiplies a segment's factors and sums what it writes; every other kernel joins
the earlier segments into the state that enters its own. Where one segment is enough it is not launched.

The gradient of the state runs from right to left, :math:`G_t = q_t\,(s\, do_t)^\top + a_{t+1} \odot G_{t+1}`,
and meets the states, which are made again: from the segment's start to the start of every chunk, then inside
the chunk (`kernels/selective_scan_gradient.py`).
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import power_of_2
from effattn_lite.kernels.common.scan import find_segment
from effattn_lite.kernels.selective_scan_gradient import selective_scan_gradient_kernel
from effattn_lite.kernels.selective_scan_step import selective_scan_step_kernel
from effattn_lite.kernels.selective_scan_token import enter_state, factor, load_token, strength

TABLE = {16: (32, 1, 1), 32: (32, 1, 2), 64: (32, 2, 4), 128: (32, 4, 8), 256: (16, 4, 8)}
"""States, at most: (value channels of a tile, warps, warps of the gradient). A warp has 1024 entries of a
state at most; in the gradient, which keeps four such tiles, 512: they fit 255 registers a thread."""

UNROLL = 4
"""Tokens whose loads may run ahead of the arithmetic, and whose outputs are stored together."""

CHUNK = 16
"""Tokens whose states the gradient keeps for a moment, in memory that stays in the L2 cache."""

NO_SPECIALIZE = ["T", "L", "N"]
"""Arguments whose value must not cause another compilation: every length of text would."""


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def selective_scan_write_kernel(
    q, k, v, w, do, A, products, segments, dsegments, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    U: tl.constexpr, RATED: tl.constexpr, GRADIENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One segment as if it began empty: its factors' product and its write, [segments, H, K, V].

    GRADIENT: what it writes to the gradient of the state before it, too. Token t reaches back through all
    factors up to its own, and their product is there: one sweep from left to right makes all three.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0)
    i_s = i_p // (NV * H)
    i_h = i_p // NV % H
    o_k = tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    m_S = (o_k < K)[:, None] & (o_v < V)[None, :]
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    b_A = tl.zeros([BK, BV], tl.float32)
    if RATED:
        b_A = tl.load(A + o_k[:, None] * V + o_v[None, :], mask=m_S, other=0)
    b_P, b_S, b_G = b_A * 0 + 1, b_A * 0, b_A * 0
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    for i in range(0, tokens, U):
        for u in tl.static_range(U):
            live = i + u < tokens
            row = (first + i + u) * H + i_h
            b_k, b_v, b_w = load_token(k, v, w, row, live, o_k, o_v, K, V)
            b_e = strength(b_k, b_w, RATED)
            b_a = factor(b_A, b_k, b_e, RATED)
            b_P *= b_a
            b_S = b_S * b_a + b_k[:, None] * (b_e * b_v)[None, :]
            if GRADIENT:
                b_q = tl.load(q + row * K + o_k, mask=live & (o_k < K), other=0).to(tl.float32)
                b_do = tl.load(do + row * V + o_v, mask=live & (o_v < V), other=0).to(tl.float32)
                b_G += b_P * (b_q[:, None] * (b_do * scale)[None, :])
    o_S = (i_s.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    tl.store(products + o_S, b_P, mask=m_S)
    tl.store(segments + o_S, b_S, mask=m_S)
    if GRADIENT:
        tl.store(dsegments + o_S, b_G, mask=m_S)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def selective_scan_read_kernel(
    q, k, v, w, A, D, h0, products, segments, o, ht, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    U: tl.constexpr, RATED: tl.constexpr, SKIP: tl.constexpr, PACKED: tl.constexpr, HAS_H0: tl.constexpr,
    SEGMENTS: tl.constexpr, STORE_HT: tl.constexpr,
):  # fmt: skip
    """o of one segment, head and tile of value channels, and the last state of a sequence.

    h0 and ht lie in memory at k SK + v SV: [V, K] with RATED, else [K, V]; A [K, V].
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    SK: tl.constexpr = 1 if RATED else V
    SV: tl.constexpr = K if RATED else 1
    i_p = tl.program_id(0)
    i_s = i_p // (NV * H)
    i_h = i_p // NV % H
    o_k, o_u = tl.arange(0, BK), tl.arange(0, U)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    o_h = o_k[:, None] * SK + o_v[None, :] * SV
    o_S = o_k[:, None] * V + o_v[None, :]
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    b_A = tl.load(A + o_S, mask=m_S, other=0) if RATED else tl.zeros([BK, BV], tl.float32)
    b_S = enter_state(
        h0, products, segments, i_s, i_n, i_j, i_h, o_h, o_S, m_S, length, L,
        H, K * V, False, HAS_H0, SEGMENTS,
    )  # fmt: skip
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    # [sketch:fwd]
    for i in range(0, tokens, U):
        b_o = tl.zeros([U, BV], tl.float32)
        for u in tl.static_range(U):
            live = i + u < tokens
            row = (first + i + u) * H + i_h
            b_k, b_v, b_w = load_token(k, v, w, row, live, o_k, o_v, K, V)
            b_q = tl.load(q + row * K + o_k, mask=live & m_k, other=0).to(tl.float32)
            # what this token keeps of every entry, and how strongly it writes: made here, never stored
            b_e = strength(b_k, b_w, RATED)
            b_S = b_S * factor(b_A, b_k, b_e, RATED) + b_k[:, None] * (b_e * b_v)[None, :]
            # the token just written is read too: [BK] @ [BK, BV] -> [BV]
            b_y = tl.sum(b_q[:, None] * b_S, 0) * scale
            b_o = tl.where((o_u == u)[:, None], b_y[None, :], b_o)
        o_o = ((first + i + o_u) * H + i_h)[:, None] * V + o_v[None, :]
        m_o = (i + o_u < tokens)[:, None] & m_v[None, :]
        if SKIP:
            b_o += tl.load(D + o_v, mask=m_v, other=0)[None, :] * tl.load(v + o_o, mask=m_o, other=0)
        tl.store(o + o_o, b_o.to(o.dtype.element_ty), mask=m_o)
    # [/sketch:fwd]
    if STORE_HT:
        if (i_j + 1) * L >= length:
            tl.store(ht + (i_n.to(tl.int64) * H + i_h) * K * V + o_h, b_S, mask=m_S)


def tiles(K, V, *, gradient=False):
    """(BK, BV, options) for K states and V value channels."""
    BK = power_of_2(K)
    BV, warps, more = TABLE[max(16, BK)]
    return BK, min(BV, power_of_2(V)), {"num_warps": more if gradient else warps, "num_stages": 1}


def variants():
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    for kind in ("bf16", "fp16", "fp32"):
        for K in TABLE:
            for rated in (False, True):
                yield from _variants(K, kind, rated)


def _variants(K, kind, rated):
    V = 128
    tensors = dict.fromkeys(("q", "k", "v", "w", "do", "o", "dv"), f"*{kind}") | {"cu_seqlens": "*i32"}
    wide = ("A", "D", "h0", "dht", "products", "segments", "dsegments", "checkpoints", "states")
    tensors |= dict.fromkeys((*wide, "ht", "dq", "dk", "dA", "dD", "dh0", "state", "out_state"), "*fp32")
    tensors |= {"dw": "*fp32", "scale": "fp32"} | dict.fromkeys(NO_SPECIALIZE, "i32")
    sizes = dict(H=1, K=K, V=V, BS=4, U=UNROLL, C=CHUNK, RATED=rated, SKIP=rated, PACKED=True, HAS_H0=True)
    sizes |= dict(HAS_DHT=True, SEGMENTS=True, STORE_HT=True, STORE_DH0=True, GRADIENT=True)
    for label, kernel in (
        ("write", selective_scan_write_kernel),
        ("read", selective_scan_read_kernel),
        ("gradient", selective_scan_gradient_kernel),
        ("step", selective_scan_step_kernel),
    ):
        BK, BV, options = tiles(K, V, gradient=label in ("write", "gradient"))
        constants = {n: x for n, x in (sizes | dict(BK=BK, BV=BV)).items() if n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else tensors[n] for n in kernel.arg_names}
        yield f"{label}-{kind}-{K}-{'rated' if rated else 'keyed'}", kernel, signature, constants, options
