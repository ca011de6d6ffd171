r"""Attention to memory slots: the pass of gated linear attention that scores the slots, its softmax, a step.

.. math:: x_t = s\,\tilde K_t^\top q_t, \qquad
    \tilde K_t = \tilde K_{t-1} \operatorname{Diag}(e^{g_t}) + k_t s_t^\top, \qquad
    p_t = \operatorname{softmax}(x_t)

The second pass, which reads values with p, is the gated-decay engine with s for keys. The first decays along
what it reads out, not along what it sums over. But with the gradient dx of its output it is the same form,

.. math:: \sum_t dx_t^\top x_t =
    s \sum_{j \le t} (q_t^\top k_j) \sum_m dx_{tm}\, s_{jm}\, e^{G_{tm} - G_{jm}},

as the engine has with dx for queries, s for keys, k for values and q for do. So the first pass is that
engine's dq, and its gradients are the engine's output (dq), its dv (dk), its dk (ds) and its dg. Only the
first pass itself, which has no dx yet, needs a kernel of its own.

Products of float32 inputs are "ieee", not TF32; all sums and states are float32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import padded
from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.gated_decay import tiles
from effattn_lite.kernels.gated_decay_chunk import crossing, enter_segment, first_decays, grow
from effattn_lite.kernels.slots_shares import slots_shares_gradient_kernel, slots_shares_kernel
from effattn_lite.kernels.slots_step import slots_step_kernel

SHARES = {"C": 32, "BD": 32}
"""Tokens and slots of a tile of the shares."""

ROWS = 16
"""Rows of a tile of the softmax and of its gradient."""


@triton.jit
def softmax_rows(b_x, mask):
    """Softmax along the last axis of [rows, BM], over what the mask lets through."""
    b_x = tl.where(mask, b_x, float("-inf"))
    b_e = tl.exp(b_x - tl.max(b_x, 1)[:, None])
    return b_e / tl.sum(b_e, 1)[:, None]


@triton.jit(do_not_specialize=["T", "L", "N"])
def slots_score_kernel(
    q, k, s, g, h0, segments, totals, p, ht, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
    BS: tl.constexpr, PACKED: tl.constexpr, HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr,
    STORE_HT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """p [tokens, H, M] of one segment, head and tile of M slots, chunk by chunk; K is whole.

    h0 and the segments' states are [M, K], ht is [K, M]. WHOLE: one tile holds all slots, and p is the
    softmax; else p is x itself.
    """
    NM: tl.constexpr = (M + BM - 1) // BM
    LEVELS: tl.constexpr = 4 if C == 16 else 5 if C == 32 else 6
    i_p = tl.program_id(0)
    i_s = i_p // (NM * H)
    i_h = i_p // NM % H
    o_m = i_p % NM * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    o_c = tl.arange(0, C)
    m_m, m_k = o_m < M, o_k < K
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    b_S = enter_segment(
        h0, segments, totals, i_s, i_n, i_j, i_h, o_m[None, :], o_k[:, None], length, L,
        H, M, K, True, False, HAS_H0, SEGMENTS,
    )  # fmt: skip
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    # [sketch:fwd]
    for i_c in range(0, tokens, C):
        m_c = i_c + o_c < tokens
        row = (first + i_c + o_c) * H + i_h
        o_s, m_s = (row * M)[:, None] + o_m[None, :], m_c[:, None] & m_m[None, :]
        b_q = tl.load(q + (row * K)[:, None] + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0)
        b_kt = tl.load(k + (row * K)[None, :] + o_k[:, None], mask=m_c[None, :] & m_k[:, None], other=0)
        b_s, b_g = tl.load(s + o_s, mask=m_s, other=0), tl.load(g + o_s, mask=m_s, other=0)
        # 1 local decay and 2 intra-chunk: [C, BK] @ [BK, C], then by slot
        b_W = tl.dot(b_q, b_kt, input_precision="ieee")
        b_x = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_W, 0.0), 1)[:, None] * b_s
        b_fx, b_fs = first_decays(b_g, True), first_decays(b_g, False)
        for level in tl.static_range(LEVELS):
            b_a = tl.where(crossing(C, level), b_W, 0.0).to(b_q.dtype)
            # [C, C] @ [C, BM]
            b_x += b_fx * tl.dot(b_a, (b_s * b_fs).to(b_q.dtype), input_precision="ieee")
            b_fx, b_fs = grow(b_fx, b_g, False, level, 0), grow(b_fs, b_g, True, level, 0)
        # 4 inter-chunk: [C, BK] @ [BK, BM]
        b_x = (b_x + b_fx * dot_wide(b_q, b_S, b_q.dtype)) * scale
        # 3 chunk state: [BK, C] @ [C, BM]
        b_keep = tl.exp(tl.sum(b_g, 0))[None, :]
        b_S = tl.dot(b_kt, (b_s * b_fs).to(b_kt.dtype), b_S * b_keep, input_precision="ieee")
        # 5 output
        if WHOLE:
            b_x = softmax_rows(b_x, m_m[None, :])
        tl.store(p + o_s, b_x.to(p.dtype.element_ty), mask=m_s)
    # [/sketch:fwd]
    if STORE_HT:
        if (i_j + 1) * L >= length:
            p_S = ht + (i_n.to(tl.int64) * H + i_h) * K * M
            tl.store(p_S + o_k[:, None] * M + o_m[None, :], b_S, mask=m_k[:, None] & m_m[None, :])


@triton.jit(do_not_specialize=["R"])
def slots_softmax_kernel(x, p, R, M: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr):
    """p = softmax(x) along the last axis of [R, M]; one program ROWS rows."""
    o_m = tl.arange(0, BM)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < R)[:, None] & (o_m < M)[None, :]
    o_x = row[:, None] * M + o_m[None, :]
    b_p = softmax_rows(tl.load(x + o_x, mask=mask, other=0), (o_m < M)[None, :])
    tl.store(p + o_x, b_p.to(p.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def slots_softmax_gradient_kernel(p, dp, dx, R, M: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr):
    """dx = p (dp - sum(p dp)) along the last axis of [R, M]; one program ROWS rows."""
    o_m = tl.arange(0, BM)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < R)[:, None] & (o_m < M)[None, :]
    o_x = row[:, None] * M + o_m[None, :]
    b_p = tl.load(p + o_x, mask=mask, other=0).to(tl.float32)
    b_dp = tl.load(dp + o_x, mask=mask, other=0).to(tl.float32)
    # p, rounded, no longer sums to 1: the mean must be one of these weights
    b_mean = tl.sum(b_p * b_dp, 1) / tl.maximum(tl.sum(b_p, 1), 1e-30)
    tl.store(dx + o_x, (b_p * (b_dp - b_mean[:, None])).to(dx.dtype.element_ty), mask=mask)


def score_tiles(K, M, dtype, *, capability, chunk_size=None):
    """(C, BM, options) of the score kernel: the gated-decay engine's read of a [K, M] state."""
    return tiles(K, M, dtype, channel=True, capability=capability, chunk_size=chunk_size)[0]


def variants(capability=90):
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    kinds = {"bf16": (torch.bfloat16, 256), "fp16": (torch.float16, 256), "fp32": (torch.float32, 128)}
    for kind, (dtype, most) in kinds.items():
        for axis in (64, 128, 256):
            if axis <= most:
                yield from _variants(axis, dtype, kind, capability)


def _variants(axis, dtype, kind, capability):
    tensors = dict.fromkeys(("q", "k", "v", "s", "p", "o", "dp", "dx", "w", "dw", "ds"), f"*{kind}")
    wide = ("g", "h0", "segments", "totals", "ht", "x", "Sk", "Sv", "z", "c", "dg", "dz", "out_dz")
    wide += ("out_Sk", "out_Sv", "out_z", "out_c")
    tensors |= dict.fromkeys(wide, "*fp32") | {"cu_seqlens": "*i32", "scale": "fp32"}
    tensors |= dict.fromkeys(("T", "L", "N", "R"), "i32")
    C, BM, options = score_tiles(axis, axis, dtype, capability=capability)
    whole = padded(axis)
    sizes = dict(H=4, K=axis, V=axis, M=axis, D=4 * axis, BS=4, PACKED=True, HAS_H0=True, SEGMENTS=True)
    sizes |= dict(STORE_HT=True, AVERAGE=True, ROWS=ROWS)
    for label, kernel, launch, more in (
        ("score", slots_score_kernel, options, dict(C=C, BK=whole, BM=BM, WHOLE=BM >= axis)),
        ("softmax", slots_softmax_kernel, {}, dict(BM=whole)),
        ("dx", slots_softmax_gradient_kernel, {}, dict(BM=whole)),
        ("shares", slots_shares_kernel, {}, SHARES),
        ("ds", slots_shares_gradient_kernel, {}, SHARES),
        ("step", slots_step_kernel, {}, dict(BK=16, BV=16, BM=whole)),
    ):
        constants = {n: x for n, x in (sizes | more).items() if n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else tensors[n] for n in kernel.arg_names}
        yield f"{label}-{kind}-{axis}", kernel, signature, constants, {"num_warps": 4} | launch
