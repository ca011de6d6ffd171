r"""Linear attention whose decay depends on the token: one Triton engine for Mamba-2, GLA, HGRN2 and RWKV-6.

.. math:: S_t = \operatorname{Diag}(e^{g_t})\,S_{t-1} + k_t v_t^\top, \qquad o_t = s\,S_t^\top q_t

A sequence is cut into segments, so that few long sequences fill the chip. Two launches, and no state of a
chunk is in memory: `gated_decay_write_kernel` sums what every segment writes and how much it decays;
`gated_decay_read_kernel` adds up the earlier segments' states into the one that enters its own, then goes
from chunk to chunk: scores, read, update. Where one segment is enough the first is not launched.

The same two kernels, run from the right with q and k in each other's place and do for v, give dv and the
gradient of the initial state. On the way they leave the gradient of every chunk's last state, from which
`gated_decay_gradient_kernel` computes dq, dk and dg in one more pass from the left.

Products of float32 inputs are "ieee", not TF32; all sums and states are float32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import padded
from effattn_lite.kernels.common.scan import dot_wide, find_segment
from effattn_lite.kernels.gated_decay_chunk import (
    channel_scores,
    enter_segment,
    first_decays,
    grow,
    head_sums,
)
from effattn_lite.kernels.gated_decay_gradient import gated_decay_gradient_kernel
from effattn_lite.kernels.gated_decay_step import gated_decay_step_kernel

READ = {
    # larger of K and V: (C, BV, warps, stages)
    ("bfloat16", False): {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    ("bfloat16", True): {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
    ("float16", False): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 8, 1)},
    ("float16", True): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("float32", False): {64: (16, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("float32", True): {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
"""Tiles by dtype and by whether every channel has its gate. All fit 99 KiB of shared memory, so Ampere, Ada,
Hopper and Blackwell share them; Turing, whose products are plain FMAs, takes float32's. float16's are smaller
than bfloat16's, since its states are read as TF32."""

GRADIENT = {
    # larger of K and V: (C, BK, warps, stages)
    ("bfloat16", False): {64: (64, 64, 8, 1), 128: (32, 64, 8, 2), 256: (32, 16, 8, 1)},
    ("bfloat16", True): {64: (16, 64, 8, 2), 128: (16, 64, 8, 1), 256: (16, 16, 8, 1)},
    ("float16", False): {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 8, 1)},
    ("float16", True): {64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("float32", False): {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("float32", True): {64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
"""The same of the gradient. The read that leaves it the chunks' states cuts chunks of the same C."""

NO_SPECIALIZE = ["T", "L", "N"]
"""Arguments whose value must not cause another compilation: every length of text would."""


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def gated_decay_write_kernel(
    y, v, g, segments, totals, cu_seqlens, scale, T, L, N,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BS: tl.constexpr, CHANNEL: tl.constexpr, BONUS: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """What one segment's tokens write, as if it began with an empty state, and its total log decay.

    segments [segments, H, K, V], totals [segments, H, K] or [segments, H]. One program a segment, value head
    and tile [BK, BV]. A sequence's last segment is needed by nobody, with REVERSE its first.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    LEVELS: tl.constexpr = 4 if C == 16 else 5 if C == 32 else 6
    i_p = tl.program_id(0)
    i_s = i_p // (NK * NV * H)
    i_h = i_p // (NK * NV) % H
    o_k = i_p // NV % NK * BK + tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k, m_v = o_k < K, o_v < V
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    unread = i_j == 0 if REVERSE else (i_j + 1) * L >= length
    if (i_n >= N) | unread:
        return
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    b_S = tl.zeros([BK, BV], tl.float32)
    b_sum = tl.zeros([BK], tl.float32)
    chunks = (tokens + C - 1) // C
    for i in range(chunks):
        i_c = (chunks - 1 - i if REVERSE else i) * C
        n = tl.minimum(tokens - i_c, C)
        row = first + i_c + o_c
        m_c = o_c < n
        p_y = (row * (H // GROUP) + i_h // GROUP)[None, :] * K + o_k[:, None]
        b_y = tl.load(y + p_y, mask=m_c[None, :] & m_k[:, None], other=0)
        b_v = tl.load(
            v + ((row * H + i_h) * V)[:, None] + o_v[None, :], mask=m_c[:, None] & m_v[None, :], other=0
        )
        if CHANNEL:
            p_g = g + ((row * H + i_h) * K)[None, :] + o_k[:, None]
            b_g = tl.load(p_g, mask=m_c[None, :] & m_k[:, None], other=0)
            b_t = tl.sum(b_g, 1)
            b_keep = tl.exp(b_t)[:, None]
            b_w = first_decays(b_g, REVERSE and not BONUS)
            for level in tl.static_range(LEVELS):
                b_w = grow(b_w, b_g, not REVERSE, level, 1)
        else:
            b_since, b_left, b_t, _ = head_sums(g + (first + i_c) * H + i_h, H, n, C, REVERSE)
            b_keep = tl.exp(b_t)
            b_w = tl.exp(b_since if REVERSE else b_left)[None, :]
        b_y = (b_y * (b_w * scale)).to(b_v.dtype)
        # [BK, C] @ [C, BV]
        b_S = tl.dot(b_y, b_v, b_S * b_keep, input_precision="ieee")
        b_sum += b_t
    i_sh = i_s.to(tl.int64) * H + i_h
    p_S = segments + i_sh * K * V + o_k[:, None] * V + o_v[None, :]
    tl.store(p_S, b_S, mask=m_k[:, None] & m_v[None, :])
    if i_p % NV == 0:
        if CHANNEL:
            tl.store(totals + i_sh * K + o_k, b_sum, mask=m_k)
        elif i_p // NV % NK == 0:
            tl.store(totals + i_sh + 0 * o_k, b_sum, mask=tl.arange(0, BK) == 0)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def gated_decay_read_kernel(
    x, y, v, g, u, h0, segments, totals, o, ht, states, cu_seqlens, read_scale, write_scale, T, L, N,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BS: tl.constexpr, CHANNEL: tl.constexpr, BONUS: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr, STORE_HT: tl.constexpr,
):  # fmt: skip
    """o of one segment, value head and tile of V columns, chunk by chunk; K is whole: the scores sum over it.

    Readers x find what writers y left: q and k; with REVERSE k and q, and v is do. Then the state before each
    chunk, the gradient of the chunk's last state, goes to `states`, [segments, L // C, H, K, V].
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    LEVELS: tl.constexpr = 4 if C == 16 else 5 if C == 32 else 6
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
    o_S, m_S = o_k[:, None] * V + o_v[None, :], m_k[:, None] & m_v[None, :]
    b_S = enter_segment(
        h0, segments, totals, i_s, i_n, i_j, i_h, o_k[:, None], o_v[None, :], length, L,
        H, K, V, CHANNEL, REVERSE, HAS_H0, SEGMENTS,
    )  # fmt: skip
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    chunks = (tokens + C - 1) // C
    # [sketch:fwd]
    for i in range(chunks):
        i_c = (chunks - 1 - i if REVERSE else i) * C
        n = tl.minimum(tokens - i_c, C)
        row = first + i_c + o_c
        m_c = o_c < n
        o_x = (row * (H // GROUP) + i_h // GROUP) * K
        o_yt, o_x = o_x[None, :] + o_k[:, None], o_x[:, None] + o_k[None, :]
        o_o = ((row * H + i_h) * V)[:, None] + o_v[None, :]
        b_x = tl.load(x + o_x, mask=m_c[:, None] & m_k[None, :], other=0)
        b_yt = tl.load(y + o_yt, mask=m_c[None, :] & m_k[:, None], other=0)
        b_v = tl.load(v + o_o, mask=m_c[:, None] & m_v[None, :], other=0)
        if REVERSE:
            p_S = states + ((i_s.to(tl.int64) * (L // C) + i_c // C) * H + i_h) * K * V
            tl.store(p_S + o_S, b_S.to(states.dtype.element_ty), mask=m_S)
        if CHANNEL:
            o_g = (row * H + i_h) * K
            b_gx = tl.load(g + o_g[:, None] + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0)
            b_gy = tl.load(g + o_g[None, :] + o_k[:, None], mask=m_c[None, :] & m_k[:, None], other=0)
            b_y = tl.load(y + o_x, mask=m_c[:, None] & m_k[None, :], other=0).to(tl.float32)
            if BONUS:
                b_y *= tl.load(u + i_h * K + o_k, mask=m_k, other=0)[None, :]
            # 1 local decay and 2 intra-chunk scores
            b_A, b_xd, b_yd = channel_scores(
                b_x, b_yt, tl.sum(b_x * b_y, 1), b_gx, b_gy, BONUS, REVERSE, LEVELS
            )
            b_past = dot_wide(b_xd, b_S, b_x.dtype)  # [C, BK] @ [BK, BV]
            b_keep = tl.exp(tl.sum(b_gy, 1))[:, None]
        else:
            b_since, b_left, b_total, b_D = head_sums(g + (first + i_c) * H + i_h, H, n, C, REVERSE)
            b_A = tl.dot(b_x, b_yt, input_precision="ieee") * b_D
            b_past = dot_wide(b_x, b_S, b_x.dtype) * tl.exp(b_left if REVERSE else b_since)[:, None]
            b_yd = b_yt * tl.exp(b_since if REVERSE else b_left)[None, :]
            b_keep = tl.exp(b_total)
        b_in = tl.dot(b_A.to(b_v.dtype), b_v, input_precision="ieee")  # [C, C] @ [C, BV]
        # 3 chunk state and 4 inter-chunk: [BK, C] @ [C, BV] -> [BK, BV]
        b_S = tl.dot((b_yd * write_scale).to(b_v.dtype), b_v, b_S * b_keep, input_precision="ieee")
        # 5 output
        b_o = (b_in * write_scale + b_past) * read_scale
        tl.store(o + o_o, b_o.to(o.dtype.element_ty), mask=m_c[:, None] & m_v[None, :])
    # [/sketch:fwd]
    if STORE_HT:
        ends = i_j == 0 if REVERSE else (i_j + 1) * L >= length
        if ends:
            tl.store(ht + (i_n.to(tl.int64) * H + i_h) * K * V + o_S, b_S, mask=m_S)


def tiles(K, V, dtype, *, channel, capability, chunk_size=None):
    """(C, BV, options) of the read and (C, BK, options) of the gradient; C is at most `chunk_size`."""
    kind = "float32" if capability < 80 else str(dtype).removeprefix("torch.")
    found = []
    for table, axis in ((READ, V), (GRADIENT, K)):
        C, width, warps, stages = table[kind, channel][max(64, padded(max(K, V)))]
        if capability // 10 not in (9, 10):
            # where products are issued by a warp, 64 columns of a state spill registers
            width = min(width, 32)
        options = dict(num_warps=warps, num_stages=stages)
        found.append((min(C, chunk_size or C), min(width, padded(axis)), options))
    return found


def square(K, V, dtype, *, channel, capability):
    """(C, BK, BV, options) of the write, whose tiles need no whole axis."""
    wide = dtype != torch.bfloat16 or capability < 80
    BK, BV = min(padded(K), 32 if wide else 64), min(padded(V), 32 if wide else 64)
    return 16 if wide else 32, BK, BV, {"num_warps": 4, "num_stages": 1 if wide else 2}


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
    tensors = dict.fromkeys(("q", "k", "x", "y", "v", "do", "o", "dq", "dk"), f"*{kind}")
    wide = ("g", "u", "h0", "segments", "totals", "ht", "dg", "du", "state", "out_state")
    tensors |= dict.fromkeys(wide, "*fp32") | dict.fromkeys(("scale", "read_scale", "write_scale"), "fp32")
    tensors |= {"states": "*bf16" if kind == "bf16" else "*fp32", "cu_seqlens": "*i32"}
    tensors |= dict.fromkeys(NO_SPECIALIZE, "i32")
    (C, BV, options), (E, BK, spread) = tiles(axis, axis, dtype, channel=channel, capability=capability)
    D, EK, EV, plain = square(axis, axis, dtype, channel=channel, capability=capability)
    sizes = dict(H=4, GROUP=1, K=axis, V=axis, BS=4, PACKED=True, CHANNEL=channel, BONUS=channel)
    sizes |= dict(HAS_H0=True, SEGMENTS=True, STORE_HT=True)
    for label, kernel, launch, more in (
        ("read", gated_decay_read_kernel, options, dict(C=C, BK=padded(axis), BV=BV, REVERSE=False)),
        ("dv", gated_decay_read_kernel, options, dict(C=E, BK=padded(axis), BV=BV, REVERSE=True)),
        ("gradient", gated_decay_gradient_kernel, spread, dict(C=E, BK=BK, BV=padded(axis))),
        ("write", gated_decay_write_kernel, plain, dict(C=D, BK=EK, BV=EV, REVERSE=False)),
        ("step", gated_decay_step_kernel, {"num_warps": 4}, dict(BK=padded(axis), BV=16)),
    ):
        constants = {n: x for n, x in (sizes | more).items() if n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else tensors[n] for n in kernel.arg_names}
        yield f"{label}-{name}", kernel, signature, constants, launch
