"""Blocks of softmax attention: the pattern's mask and ranges, the cap, one step of the online softmax."""

import triton
import triton.language as tl

from effattn_lite.kernels.common.tile import inner_blocks


@triton.jit
def lower(t, window, GRAIN: tl.constexpr):
    """First position in the window of position t; the window moves in steps of GRAIN."""
    if GRAIN == 1:
        return t + 1 - window
    else:
        return (t // GRAIN + 1) * GRAIN - window


@triton.jit
def visible(
    t,
    j,
    Tk,
    window,
    sinks,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Whether position t sees key j, for t and j of shapes that broadcast."""
    see = j < Tk
    if CAUSAL:
        see = see & (j <= t)
    if WINDOW:
        near = j >= lower(t, window, GRAIN)
        if not CAUSAL:
            near = near & (j < t + window)
        if SINKS:
            near = near | (j < sinks)
        see = see & near
    return see


@triton.jit
def key_blocks(
    first, last, Tk, window, sinks, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """Blocks of keys that positions first to last see, as in `inner_blocks`, and number of sink blocks."""
    lo_any, lo_all = first * 0, first * 0
    hi_all, hi_any = first * 0 + Tk, first * 0 + Tk
    before = first * 0
    if WINDOW:
        lo_any, lo_all = lower(first, window, GRAIN), lower(last, window, GRAIN)
        hi_all, hi_any = first + window, last + window
        if SINKS:  # not causal, they may lie behind the window
            hi_any = tl.maximum(hi_any, sinks)
    if CAUSAL:
        hi_all, hi_any = first + 1, last + 1
    a, b, c, d = inner_blocks(lo_any, lo_all, hi_all, hi_any, Tk, BN)
    if SINKS:
        before = tl.cdiv(tl.minimum(sinks, a * BN), BN)
    return a, b, c, d, before


@triton.jit
def query_blocks(
    first, last, T, Tk, window, sinks, BM: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """Blocks of queries that see keys first to last, as in `inner_blocks`; query i is at Tk - T + i."""
    lo_any, lo_all = first * 0, first * 0
    hi_all, hi_any = first * 0 + T, first * 0 + T
    if WINDOW:
        # key j is in the window of t while lower(t) <= j, and, not causal, from t > j - window on
        lo_any, lo_all = first - window + 1 - (Tk - T), last - window + 1 - (Tk - T)
        hi_all = (first + window) // GRAIN * GRAIN - (Tk - T)
        hi_any = (last + window) // GRAIN * GRAIN - (Tk - T)
        if SINKS:  # seen by all, if not causal from the first query on
            lo_any, lo_all = tl.where(first < sinks, 0, lo_any), tl.where(last < sinks, 0, lo_all)
            hi_any, hi_all = tl.where(first < sinks, T, hi_any), tl.where(last < sinks, T, hi_all)
    if CAUSAL:
        lo_any, lo_all = first - (Tk - T), last - (Tk - T)
    return inner_blocks(lo_any, lo_all, hi_all, hi_any, T, BM)


@triton.jit
def capped(b_s, scale, softcap, SOFTCAP: tl.constexpr):
    """Products, or with a cap c the scores c tanh(scale b_s / c); an exp that overflows gives tanh = 1."""
    if SOFTCAP:
        b_s = softcap * (1 - 2 / (1 + tl.exp2(b_s * (scale / softcap * 2.8853900817779268))))
    return b_s


@triton.jit
def online_step(b_o, b_m, b_l, b_s, b_v, scale, GUARD: tl.constexpr):
    """Add a block of keys to the running output b_o [BM, BV], maximum b_m and sum b_l [BM].

    Args: scores b_s [BM, BN], values b_v [BN, BV]; b_m counts scale * b_s, exponents of 2.
    GUARD: a row may have seen nothing yet, so that its maximum is -inf.
    """
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_top = b_m_new
    if GUARD:
        b_top = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s * scale - b_top[:, None])
    b_shrink = tl.exp2(b_m - b_top)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    # [BM, BN] @ [BN, BV] -> [BM, BV]; float32 inputs: float32 products, not TF32
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
    return b_o, b_m_new, b_l


@triton.jit
def load_exponent(p_lse, live):
    """lse at the pointers, in exponents of 2; +inf, which makes each weight 0, where a row sees nothing."""
    b_lse = tl.load(p_lse, mask=live, other=float("-inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)


@triton.jit
def load_lse(lse, rows, BM: tl.constexpr):
    """`load_exponent` of BM rows side by side, of which `rows` are there."""
    o_r = tl.arange(0, BM)
    return load_exponent(lse + o_r, o_r < rows)
