r"""mLSTM: linear attention with an exponential input gate, a running maximum and a normaliser, in Triton.

.. math:: A_{tj} = q_t^\top k_j\, e^{b_t - b_j + i_j - m_t}, \qquad
    o_t = \frac{s\,(\sum_j A_{tj} v_j + \xi_t\, C^\top q_t)}
    {\max(|s\,(\sum_j A_{tj} + \xi_t\, n^\top q_t)|,\; e^{-m_t})}

A sequence is cut into segments, so that few long sequences fill the chip. Two launches forward:
`mlstm_write_kernel` sums what every segment writes, times e^-m of the segment's own largest gate;
`mlstm_forward_kernel` adds the earlier segments' parts up, each at the larger of two stabilisers, and goes
from chunk to chunk. Where one segment is enough the first is not launched.

Kept for the backward are two float32 numbers a token and head: m_t and the denominator. With
:math:`r_t = 1 / \max(|den_t|, e^{-m_t})` the output is r times a linear attention, so the backward, in
`mlstm_backward.py`, is three more of them.

Products of float32 inputs are "ieee", not TF32; all sums and states are float32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import padded
from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.mlstm_backward import (
    mlstm_gates_kernel,
    mlstm_gradient_kernel,
    mlstm_rows_kernel,
)
from effattn_lite.kernels.mlstm_state import bound, chunk_gates, last_of, state_before
from effattn_lite.kernels.mlstm_step import mlstm_step_kernel

TABLE = {
    # summed axis: (C, BV, warps, stages)
    "bfloat16": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 2)},
    "float16": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 8, 1)},
    "float32": {64: (16, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
"""Tiles by dtype; all fit 99 KiB of shared memory. Turing, whose products are plain FMAs, takes float32's;
float16's are smaller than bfloat16's, since its states are read as TF32."""

NO_SPECIALIZE = ["T", "L", "N"]
"""Arguments whose value must not cause another compilation: every length of text would."""


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def mlstm_write_kernel(
    k, v, i, f, mt, r, d, segments, nsegments, marks, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What one segment's tokens write into an empty state: C [segments, H, K, V] and n [segments, H, K].

    One program a segment, head and tile [BK, BV]. Forward, the segment's own stabiliser moves along, and
    marks [segments, H, 2] keeps it and the segment's decay; a sequence's last segment is needed by nobody.
    REVERSE: what the queries (k) read, with the gradients (v) and r, d of `mlstm_rows_kernel`, adds to the
    gradient of the state before them; mt is known, marks [segments, H] keeps the log of the decay; the first
    segment is needed by nobody.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0)
    i_s = i_p // (NK * NV * H)
    i_h = i_p // (NK * NV) % H
    o_k = i_p // NV % NK * BK + tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    unread = i_j == 0 if REVERSE else (i_j + 1) * L >= length
    if (i_n >= N) | unread:
        return
    o_c = tl.arange(0, C)
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    b_S = tl.zeros([BK, BV], tl.float32)
    b_n = tl.zeros([BK], tl.float32)
    b_F = tl.sum(b_n, 0)
    b_m = b_F - 1e30
    for i_b in range(0, tokens, C):
        # the chunk's first token
        i_c = (tokens - 1) // C * C - i_b if REVERSE else i_b
        n = tl.minimum(tokens - i_c, C)
        row = (first + i_c + o_c) * H + i_h
        m_c = o_c < n
        b_kt = tl.load(k + row[None, :] * K + o_k[:, None], mask=m_c[None, :] & (o_k < K)[:, None], other=0)
        b_v = tl.load(v + row[:, None] * V + o_v[None, :], mask=m_c[:, None] & (o_v < V)[None, :], other=0)
        b_i, b_b = chunk_gates(i, f, row, m_c)
        b_sum = last_of(b_b, o_c, n)
        b_F += b_sum
        if REVERSE:
            m_begin, m_end = (
                tl.load(mt + (first + i_c - 1) * H + i_h),
                tl.load(mt + (first + i_c + n - 1) * H + i_h),
            )
            b_w = tl.exp(b_b + m_begin - tl.load(mt + row, mask=m_c, other=1e30))
            b_w *= tl.load(r + row, mask=m_c, other=0) * scale
            kept = tl.exp(b_sum + m_begin - m_end)
            b_x = b_w * tl.load(d + row, mask=m_c, other=0)
        else:
            left = b_sum - b_b + b_i
            m_new = tl.maximum(b_m + b_sum, tl.max(left, 0))
            b_w, kept, b_m = tl.exp(left - m_new), tl.exp(b_m + b_sum - m_new), m_new
            b_x = b_w
        # [BK, C] @ [C, BV]
        b_S = b_S * kept + dot_wide(b_kt, b_v * b_w[:, None], b_kt.dtype)
        b_n = b_n * kept + tl.sum(b_kt * b_x[None, :], 1)
    i_sh = i_s.to(tl.int64) * H + i_h
    p_S = segments + i_sh * K * V + o_k[:, None] * V + o_v[None, :]
    tl.store(p_S, b_S, mask=(o_k < K)[:, None] & (o_v < V)[None, :])
    if i_p % NV == 0:
        tl.store(nsegments + i_sh * K + o_k, b_n, mask=o_k < K)
    if i_p % (NK * NV) == 0:
        if REVERSE:
            m_begin, m_end = tl.load(mt + (first - 1) * H + i_h), tl.load(mt + (first + tokens - 1) * H + i_h)
            tl.store(marks + i_sh, m_begin + b_F - m_end)
        else:
            tl.store(marks + 2 * i_sh, b_F)
            tl.store(marks + 2 * i_sh + 1, b_m)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def mlstm_forward_kernel(
    q, k, v, i, f, C0, n0, m0, segments, nsegments, marks, o, CT, nT, mT, mt, den, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, PACKED: tl.constexpr, HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr,
    STORE_HT: tl.constexpr,
):  # fmt: skip
    """o of one segment, head and tile of V columns, chunk by chunk; K is whole, since the scores sum over it.

    mt and den [B, T, H]: every token's stabiliser and denominator, for the backward.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0)
    i_s = i_p // (NV * H)
    i_h = i_p // NV % H
    i_v = i_p % NV
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k, m_v = o_k < K, o_v < V
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    o_S, m_S = o_k[:, None] * V + o_v[None, :], m_k[:, None] & m_v[None, :]
    b_S, b_n, b_m = state_before(
        C0, n0, m0, segments, nsegments, marks, i_s, i_n, i_j, i_h, o_S, m_S, o_k, m_k,
        H, K, V, HAS_H0, SEGMENTS,
    )  # fmt: skip
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    # [sketch:fwd]
    for i_c in range(0, tokens, C):
        n = tl.minimum(tokens - i_c, C)
        row = (first + i_c + o_c) * H + i_h
        m_c = o_c < n
        b_q = tl.load(q + row[:, None] * K + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0)
        b_kt = tl.load(k + row[None, :] * K + o_k[:, None], mask=m_c[None, :] & m_k[:, None], other=0)
        b_v = tl.load(v + row[:, None] * V + o_v[None, :], mask=m_c[:, None] & m_v[None, :], other=0)
        # 1 local gates: the stabiliser of every token is its largest weight, so no exponent is positive
        b_i, b_b = chunk_gates(i, f, row, m_c)
        b_D = b_b[:, None] - b_b[None, :] + b_i[None, :]
        b_D = tl.where(o_c[:, None] >= o_c[None, :], b_D, float("-inf"))
        b_mt = tl.maximum(b_b + b_m, tl.max(b_D, 1))
        since = tl.exp(b_b + b_m - b_mt)
        # 2 intra-chunk, [C, BK] @ [BK, C] @ [C, BV], and 4 inter-chunk, [C, BK] @ [BK, BV]
        b_A = tl.dot(b_q, b_kt, input_precision="ieee") * tl.exp(b_D - b_mt[:, None])
        b_den = (tl.sum(b_A, 1) + since * tl.sum(b_q * b_n[None, :], 1)) * scale
        b_o = dot_wide(b_q, b_S, b_q.dtype) * since[:, None]
        b_o += tl.dot(b_A.to(b_v.dtype), b_v, input_precision="ieee")
        # 3 chunk state: [BK, C] @ [C, BV] -> [BK, BV], and the normaliser, as if v were 1
        b_sum, m_end = last_of(b_b, o_c, n), last_of(b_mt, o_c, n)
        left, kept = tl.exp(b_sum - b_b + b_i - m_end), tl.exp(b_sum + b_m - m_end)
        b_S = tl.dot(b_kt, (b_v * left[:, None]).to(b_v.dtype), b_S * kept, input_precision="ieee")
        b_n = b_n * kept + tl.sum(b_kt * left[None, :], 1)
        b_m = m_end
        # 5 output: an average where the memory holds enough, a sum where it does not
        b_o *= (scale / tl.maximum(tl.abs(b_den), bound(b_mt)))[:, None]
        tl.store(
            o + row[:, None] * V + o_v[None, :], b_o.to(o.dtype.element_ty), mask=m_c[:, None] & m_v[None, :]
        )
        if i_v == 0:
            tl.store(mt + row, b_mt, mask=m_c)
            tl.store(den + row, b_den, mask=m_c)
    # [/sketch:fwd]
    if STORE_HT:
        if (i_j + 1) * L >= length:
            i_nh = i_n.to(tl.int64) * H + i_h
            tl.store(CT + i_nh * K * V + o_S, b_S, mask=m_S)
            if i_v == 0:
                tl.store(nT + i_nh * K + o_k, b_n, mask=m_k)
                tl.store(mT + i_nh, b_m)


def tiles(axis, dtype, *, capability, chunk_size=None):
    """(C, BK, BV, options) of a read for a summed axis of that size; C is at most `chunk_size`."""
    BK = padded(axis)
    kind = "float32" if capability < 80 else str(dtype).removeprefix("torch.")
    if kind == "bfloat16" and capability // 10 not in (9, 10):
        # where products are issued by a warp, 64 columns of a state spill registers
        kind = "float16"
    C, BV, warps, stages = TABLE[kind][max(64, BK)]
    return min(C, chunk_size or C), BK, BV, {"num_warps": warps, "num_stages": stages}


def square(K, V, dtype, *, capability):
    """(C, BK, BV, options) of the write, whose tiles need no whole axis."""
    wide = dtype != torch.bfloat16 or capability < 80
    BK, BV = min(padded(K), 32 if wide else 64), min(padded(V), 32 if wide else 64)
    return 32, BK, BV, {"num_warps": 4, "num_stages": 1 if wide else 2}


def variants(capability=90):
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    kinds = {"bf16": (torch.bfloat16, 256), "fp16": (torch.float16, 256), "fp32": (torch.float32, 128)}
    for kind, (dtype, most) in kinds.items():
        for axis in (64, 128, 256):
            if axis <= most:
                yield from _variants(axis, dtype, kind, capability)


def _variants(axis, dtype, kind, capability):
    tokens = ("q", "k", "v", "o", "do", "a", "b", "c", "x", "out", "i", "f", "di", "df")
    tensors = dict.fromkeys(tokens, f"*{kind}") | {"cu_seqlens": "*i32"}
    tensors |= dict.fromkeys(("scale", "read_scale", "write_scale"), "fp32")
    tensors |= dict.fromkeys((*NO_SPECIALIZE, "ROWS"), "i32")
    C, BK, BV, options = tiles(axis, dtype, capability=capability)
    D, EK, EV, plain = square(axis, axis, dtype, capability=capability)
    sizes = dict(H=4, K=axis, V=axis, A=axis, X=axis, BS=4, PACKED=True, HAS_H0=True, HAS_DHT=True)
    sizes |= dict(SEGMENTS=True, STORE_HT=True, HELD=True)
    tall = dict(C=C, BK=BK, BV=BV, BA=BK, BX=BV, NX=1, BT=128)
    flat = dict(C=D, BK=EK, BV=EV)
    for label, kernel, launch, more in (
        ("forward", mlstm_forward_kernel, options, tall),
        ("dq", mlstm_gradient_kernel, options, tall | dict(REVERSE=False, NORM=True)),
        ("dk", mlstm_gradient_kernel, options, tall | dict(REVERSE=True, NORM=True)),
        ("dv", mlstm_gradient_kernel, options, tall | dict(REVERSE=True, NORM=False)),
        ("write", mlstm_write_kernel, plain, flat | dict(REVERSE=False)),
        ("dwrite", mlstm_write_kernel, plain, flat | dict(REVERSE=True)),
        ("rows", mlstm_rows_kernel, {"num_warps": 4}, dict(BR=32, BV=BK)),
        ("gates", mlstm_gates_kernel, {"num_warps": 4}, tall),
        ("step", mlstm_step_kernel, {"num_warps": 4}, dict(BK=BK, BV=16)),
    ):
        constants = {n: x for n, x in (sizes | more).items() if n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else tensors.get(n, "*fp32") for n in kernel.arg_names}
        yield f"{label}-{kind}-{axis}", kernel, signature, constants, launch
