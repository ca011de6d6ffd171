r"""Linear attention with a fixed decay: one Triton engine for RetNet, lightning attention and RWKV-5.

.. math:: S_t = \operatorname{Diag}(e^{g})\,S_{t-1} + k_t v_t^\top, \qquad o_t = s\,S_t^\top q_t

A sequence is cut into segments, so that few long sequences fill the chip. Two launches, and no state of a
chunk is ever in memory: `decay_write_kernel` sums what every segment writes; `decay_read_kernel` adds up the
earlier segments' states into the one that enters its own, then goes from chunk to chunk: scores, read,
update. Where one segment is enough the first is not launched.

The backward is the same read with other tensors, since a gradient is a linear attention too:

======  =========  ==  ==  ==  ==============
output  direction  q   k   v   decay acts on
======  =========  ==  ==  ==  ==============
o       forward    q   k   v   the rows of S
dv      backward   k   q   do  the rows of dS
dq      forward    do  v   k   the columns of S^T
dk      backward   v   do  q   the columns of dS^T
======  =========  ==  ==  ==  ==============

Products of float32 inputs are "ieee", not TF32; all sums and states are float32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import padded
from effattn_lite.kernels.common.output import intra_columns, intra_rows
from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.common.state import load_state
from effattn_lite.kernels.decay_constants import decay_constants_kernel
from effattn_lite.kernels.decay_step import decay_step_kernel

TABLE = {
    # summed axis: (C, BV, warps, stages)
    ("bfloat16", False): {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 64, 8, 2)},
    ("bfloat16", True): {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
    ("float16", False): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 8, 1)},
    ("float16", True): {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("float32", False): {64: (16, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("float32", True): {64: (16, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
"""Tiles by dtype and by whether every channel has its decay. All fit 99 KiB of shared memory, so Ampere, Ada,
Hopper and Blackwell share them; Turing, whose products are plain FMAs, takes float32's. float16's are smaller
than bfloat16's, since its states are read as TF32."""

NO_SPECIALIZE = ["T", "L", "N"]
"""Arguments whose value must not cause another compilation: every length of text would."""


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def decay_write_kernel(
    k, v, g, segments, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, CHANNEL: tl.constexpr, WRITE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What one segment's tokens write, as if it began with an empty state: segments [segments, H, K, V].

    One program a segment, head and tile [BK, BV]; a sequence's last segment is needed by nobody.
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
    DIRECTION: tl.constexpr = -1 if REVERSE else 1
    o_c = tl.arange(0, C)
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L + (tokens - 1 if REVERSE else 0)
    b_g = tl.load(g + i_h * K + o_k, mask=o_k < K, other=0) if CHANNEL else tl.load(g + i_h + 0 * o_k)
    b_S = tl.zeros([BK, BV], tl.float32)
    for i_c in range(0, tokens, C):
        n = tl.minimum(tokens - i_c, C)
        row = (first + DIRECTION * (i_c + o_c)) * H + i_h
        m_c = o_c < n
        b_kt = tl.load(k + row[None, :] * K + o_k[:, None], mask=m_c[None, :] & (o_k < K)[:, None], other=0)
        b_v = tl.load(v + row[:, None] * V + o_v[None, :], mask=m_c[:, None] & (o_v < V)[None, :], other=0)
        # exponents count the steps until the chunk is over: none is positive
        left = tl.maximum(n - 1 - o_c, 0) + WRITE
        b_kt = (b_kt * (tl.exp(b_g[:, None] * left[None, :]) * scale)).to(b_v.dtype)
        # [BK, C] @ [C, BV]
        b_S = tl.dot(b_kt, b_v, b_S * tl.exp(b_g * n)[:, None], input_precision="ieee")
    p_S = segments + (i_s.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    tl.store(p_S, b_S, mask=(o_k < K)[:, None] & (o_v < V)[None, :])


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def decay_read_kernel(
    q, k, v, g, u, h0, segments, o, ht, cu_seqlens, read_scale, write_scale, T, L, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr, DECAY: tl.constexpr, READ: tl.constexpr,
    WRITE: tl.constexpr, BONUS: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
    HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr, STORE_HT: tl.constexpr,
):  # fmt: skip
    """o of one segment, head and tile of V columns, chunk by chunk; K is whole, since the scores sum over it.

    K and V are the axes of the role that q, k and v play; the state lies in memory at k SK + v SV.
    DECAY: 0, one decay a head; 1, one a row of the state; 2, one a column.
    READ: steps that the state entering a chunk decays before the first token reads it. WRITE: steps that the
    last token's write decays before the next chunk. 1 and 0 forward, 0 and 1 backward, 0 and 0 with a BONUS.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0)
    i_s = i_p // (NV * H)
    i_h = i_p // NV % H
    o_k = tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k, m_v = o_k < K, o_v < V
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    DIRECTION: tl.constexpr = -1 if REVERSE else 1
    SHIFT: tl.constexpr = 1 - READ - WRITE
    lag = o_c[:, None] - o_c[None, :] - SHIFT
    if DECAY == 0:
        b_g = tl.load(g + i_h)
        b_gs = b_g
        b_D = tl.where(lag >= 0, tl.exp(b_g * tl.maximum(lag, 0)), 0.0)
    elif DECAY == 1:
        b_g = tl.load(g + i_h * K + o_k, mask=m_k, other=0)
        b_gs = b_g[:, None]
        b_u = tl.load(u + i_h * K + o_k, mask=m_k, other=0) if BONUS else b_g
    else:
        b_g = tl.load(g + i_h * V + o_v, mask=m_v, other=0)
        b_gs = b_g[None, :]
        b_u = tl.load(u + i_h * V + o_v, mask=m_v, other=0) if BONUS else b_g
    b_S = load_state(
        h0, segments, i_s, i_n, i_j, i_h, o_k, o_v, b_gs, length, L,
        H, K, V, SK, SV, REVERSE, HAS_H0, SEGMENTS,
    )  # fmt: skip
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L + (tokens - 1 if REVERSE else 0)
    # [sketch:fwd]
    for i_c in range(0, tokens, C):
        n = tl.minimum(tokens - i_c, C)
        row = (first + DIRECTION * (i_c + o_c)) * H + i_h
        m_c = o_c < n
        b_q = tl.load(q + row[:, None] * K + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0)
        b_kt = tl.load(k + row[None, :] * K + o_k[:, None], mask=m_c[None, :] & m_k[:, None], other=0)
        b_v = tl.load(v + row[:, None] * V + o_v[None, :], mask=m_c[:, None] & m_v[None, :], other=0)
        # 1 local decay: steps since the chunk began, steps until it is over; no exponent is positive
        since, left = (o_c + READ)[:, None], tl.maximum(n - 1 - o_c, 0) + WRITE
        # 2 intra-chunk, [C, BK] @ [BK, C] @ [C, BV], and 4 inter-chunk, [C, BK] @ [BK, BV]
        row0 = (first + DIRECTION * i_c) * H + i_h
        if DECAY == 0:
            b_A = tl.dot(b_q, b_kt, input_precision="ieee") * b_D
            b_own = tl.dot(b_A.to(b_v.dtype), b_v, input_precision="ieee")
            b_past = dot_wide(b_q, b_S, b_q.dtype) * tl.exp(b_g * since)
        elif DECAY == 1:
            p_k = k + row0 * K + o_k
            b_own = intra_rows(b_q, b_kt, b_v, p_k, DIRECTION * H * K, b_g, b_u, n, m_k, SHIFT, BONUS, C)
            b_past = dot_wide(b_q * tl.exp(b_g[None, :] * since), b_S, b_q.dtype)
        else:
            p_v = v + row0 * V + o_v
            b_own = intra_columns(b_q, b_kt, b_v, p_v, DIRECTION * H * V, b_g, b_u, n, m_v, SHIFT, BONUS, C)
            b_past = dot_wide(b_q, b_S, b_q.dtype) * tl.exp(b_g[None, :] * since)
        # 3 chunk state: [BK, C] @ [C, BV] -> [BK, BV]
        if DECAY == 1:
            b_kt = (b_kt * (tl.exp(b_gs * left[None, :]) * write_scale)).to(b_v.dtype)
        else:
            b_v = (b_v * (tl.exp(b_gs * left[:, None]) * write_scale)).to(b_q.dtype)
        b_S = tl.dot(b_kt, b_v, b_S * tl.exp(b_gs * n), input_precision="ieee")
        # 5 output
        b_o = ((b_own * write_scale + b_past) * read_scale).to(o.dtype.element_ty)
        tl.store(o + row[:, None] * V + o_v[None, :], b_o, mask=m_c[:, None] & m_v[None, :])
    # [/sketch:fwd]
    if STORE_HT:
        ends = i_j == 0 if REVERSE else (i_j + 1) * L >= length
        if ends:
            p_S = ht + (i_n.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * SK + o_v[None, :] * SV
            tl.store(p_S, b_S, mask=m_k[:, None] & m_v[None, :])


def tiles(axis, dtype, *, channel, capability, chunk_size=None):
    """(C, BK, BV, options) of the read for a summed axis of that size; C is at most `chunk_size`."""
    BK = padded(axis)
    kind = "float32" if capability < 80 else str(dtype).removeprefix("torch.")
    C, BV, warps, stages = TABLE[kind, channel][max(64, BK)]
    if channel and capability // 10 not in (9, 10):
        # where products are issued by a warp, 64 columns of a state spill registers
        BV = min(BV, 32)
    return min(C, chunk_size or C), BK, BV, {"num_warps": warps, "num_stages": stages}


def square(K, V, dtype, *, channel, capability):
    """(C, BK, BV, options) of the kernels whose tiles need no whole axis."""
    wide = dtype != torch.bfloat16 or capability < 80
    BK, BV = padded(K), padded(V)
    BK, BV = min(BK, 32 if wide else 64), min(BV, 32 if wide or channel else 64)
    warps, stages = (4, 1) if wide else (8 if channel else 4, 2)
    return 16 if channel else 32, BK, BV, {"num_warps": warps, "num_stages": stages}


def variants(capability=90):
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    kinds = {"bf16": (torch.bfloat16, 256), "fp16": (torch.float16, 256), "fp32": (torch.float32, 128)}
    for kind, (dtype, most) in kinds.items():
        for axis in (64, 128, 256):
            for channel in (False, True):
                if axis <= most:
                    yield from _variants(axis, dtype, kind, channel, capability)


def _variants(axis, dtype, kind, channel, capability):
    name = f"{kind}-{axis}-{'channel' if channel else 'head'}"
    tensors = dict.fromkeys(("q", "k", "v", "do", "o"), f"*{kind}")
    wide = ("g", "u", "h0", "dht", "segments", "dsegments", "ht", "dg", "du", "state", "out_state")
    tensors |= dict.fromkeys(wide, "*fp32") | {"cu_seqlens": "*i32"}
    tensors |= dict.fromkeys(("scale", "read_scale", "write_scale"), "fp32") | dict.fromkeys(
        NO_SPECIALIZE, "i32"
    )
    C, BK, BV, options = tiles(axis, dtype, channel=channel, capability=capability)
    D, EK, EV, plain = square(axis, axis, dtype, channel=channel, capability=capability)
    sizes = dict(H=4, K=axis, V=axis, BS=4, PACKED=True, CHANNEL=channel, BONUS=channel)
    sizes |= dict(HAS_H0=True, HAS_DHT=True, SEGMENTS=True, STORE_HT=True, READ=int(not channel), WRITE=0)
    tall, flat = dict(C=C, BK=BK, BV=BV, SK=axis, SV=1), dict(C=D, BK=EK, BV=EV)
    for label, kernel, launch, more in (
        ("read", decay_read_kernel, options, tall | dict(DECAY=int(channel), REVERSE=False)),
        ("gradient", decay_read_kernel, options, tall | dict(DECAY=2 * channel, REVERSE=True, SK=1, SV=axis)),
        ("write", decay_write_kernel, plain, flat | dict(REVERSE=False)),
        ("constants", decay_constants_kernel, plain, flat),
        ("step", decay_step_kernel, {"num_warps": 4}, dict(BK=BK, BV=16)),
    ):
        constants = {n: x for n, x in (sizes | more).items() if n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else tensors[n] for n in kernel.arg_names}
        yield f"{label}-{name}", kernel, signature, constants, launch
