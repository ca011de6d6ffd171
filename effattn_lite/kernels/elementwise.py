r"""A leaky sum a channel: the Triton kernels of HGRN, and what every element-wise recurrence shares.

.. math:: h_t = e^{g_t} \odot h_{t-1} + x_t

A channel is a lane, and a token is a step of its loop: no product, no exchange between lanes, so memory sets
the pace. A warp owns 64 channels; loads run some tokens ahead of the sum. Where channels alone do not fill
the chip, a sequence is cut into segments: `leak_write_kernel` finds what each leaves, `leak_read_kernel`
joins those before its own and goes through its tokens. Only e^g is ever multiplied: no decay is too strong.

The gradient is the same sum from right to left: :math:`dh_t = do_t + e^{g_{t+1}} dh_{t+1}`,
:math:`dx_t = dh_t`, :math:`dg_t = e^{g_t} h_{t-1} dh_t`. All sums are float32.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import power_of_2
from effattn_lite.kernels.common.scan import find_segment

NO_SPECIALIZE = ["T", "L", "N"]
"""Arguments whose value must not cause another compilation: every length of text would."""


@triton.jit
def left_over(
    h0, ends, i_s, i_n, i_j, o_d, m_d, length, L, D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
    REVERSE: tl.constexpr, HAS_H0: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """What the segments before this one, and h0 before them, leave for it: [BD]; REVERSE: those after it.

    Args:
        h0, ends: [N, D] and [segments, 2, D]: of a segment its log decay and what its tokens leave.
    """
    b_h = tl.zeros([BD], tl.float32)
    # log decay between the end of a segment and the start of this one
    b_w = tl.zeros([BD], tl.float32)
    if SEGMENTS:
        STEP: tl.constexpr = 2 * D if REVERSE else -2 * D
        count = tl.maximum((length + L - 1) // L, 1)
        before = count - 1 - i_j if REVERSE else i_j
        p_e = ends + i_s.to(tl.int64) * 2 * D + o_d[None, :]
        o_j = tl.arange(0, BJ)
        for i in range(0, before, BJ):
            # the nearest segment has age 0
            age = (i + o_j)[:, None]
            m_e = (age < before) & m_d[None, :]
            p_j = p_e + (age + 1) * STEP
            # decays are those of the segments nearer than this one: sums of them, never a difference
            b_g = tl.load(p_j - STEP, mask=m_e & (age > 0), other=0)
            b_e = tl.load(p_j + D, mask=m_e, other=0)
            b_h += tl.sum(tl.exp(b_w[None, :] + tl.cumsum(b_g, 0)) * b_e, 0)
            b_w += tl.sum(b_g, 0)
        if before > 0:
            b_w += tl.load(ends + (i_s.to(tl.int64) * 2 * D + before * STEP) + o_d, mask=m_d, other=0)
    if HAS_H0:
        b_h += tl.exp(b_w) * tl.load(h0 + i_n.to(tl.int64) * D + o_d, mask=m_d, other=0)
    return b_h


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def leak_write_kernel(
    x, g, ends, cu_seqlens, T, L, N, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    STAGES: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Log decay of each segment and what its own tokens leave: ends [segments, 2, D].

    A sequence's last segment (REVERSE: its first) is needed by nobody.
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    i_s = tl.program_id(0) // ND
    o_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    unread = i_j == 0 if REVERSE else (i_j + 1) * L >= length
    if (i_n >= N) | unread:
        return
    tokens = tl.minimum(length - i_j * L, L)
    STEP: tl.constexpr = -1 if REVERSE else 1
    first += i_j * L + (tokens - 1 if REVERSE else 0)
    b_h = tl.zeros([BD], tl.float32)
    b_w = tl.zeros([BD], tl.float32)
    for i in tl.range(0, tokens, num_stages=STAGES):
        row = (first + STEP * i) * D + o_d
        b_x = tl.load(x + row, mask=m_d, other=0).to(tl.float32)
        b_g = tl.load(g + row, mask=m_d, other=0).to(tl.float32)
        # what a gradient adds at token t decays before token t - 1 sees it
        b_h = (b_h + b_x) * tl.exp(b_g) if REVERSE else b_h * tl.exp(b_g) + b_x
        b_w += b_g
    p_e = ends + i_s.to(tl.int64) * 2 * D + o_d
    tl.store(p_e, b_w, mask=m_d)
    tl.store(p_e + D, b_h, mask=m_d)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def leak_read_kernel(
    x, g, h0, ends, o, ht, cu_seqlens, T, L, N, D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
    BS: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr, HAS_H0: tl.constexpr,
    SEGMENTS: tl.constexpr, STORE_HT: tl.constexpr,
):  # fmt: skip
    """o [B, T, D] of one segment and 64 channels, token by token; the last segment stores ht [N, D]."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_s = tl.program_id(0) // ND
    o_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    # [sketch:fwd]
    b_h = left_over(h0, ends, i_s, i_n, i_j, o_d, m_d, length, L, D, BD, BJ, False, HAS_H0, SEGMENTS)
    tokens = tl.minimum(length - i_j * L, L)
    first += i_j * L
    for i in tl.range(0, tokens, num_stages=STAGES):
        row = (first + i) * D + o_d
        b_x = tl.load(x + row, mask=m_d, other=0).to(tl.float32)
        b_g = tl.load(g + row, mask=m_d, other=0).to(tl.float32)
        b_h = b_h * tl.exp(b_g) + b_x
        tl.store(o + row, b_h.to(o.dtype.element_ty), mask=m_d)
    # [/sketch:fwd]
    if STORE_HT:
        if (i_j + 1) * L >= length:
            tl.store(ht + i_n.to(tl.int64) * D + o_d, b_h, mask=m_d)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def leak_gradient_kernel(
    do, g, o, h0, dht, ends, dx, dg, dh0, cu_seqlens, T, L, N, D: tl.constexpr, BD: tl.constexpr,
    BJ: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr, HAS_H0: tl.constexpr,
    HAS_DHT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dx, dg [B, T, D] of one segment, from its last token to its first; the first stores dh0 [N, D]."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_s = tl.program_id(0) // ND
    o_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_n, i_j, first, length = find_segment(i_s, cu_seqlens, T, L, N, BS, PACKED)
    if i_n >= N:
        return
    b_dh = left_over(dht, ends, i_s, i_n, i_j, o_d, m_d, length, L, D, BD, BJ, True, HAS_DHT, SEGMENTS)
    p_n = i_n.to(tl.int64) * D + o_d
    b_h0 = tl.load(h0 + p_n, mask=m_d, other=0) if HAS_H0 else tl.zeros([BD], tl.float32)
    tokens = tl.minimum(length - i_j * L, L)
    for i in tl.range(0, tokens, num_stages=STAGES):
        t = i_j * L + tokens - 1 - i
        row = (first + t) * D + o_d
        b_do = tl.load(do + row, mask=m_d, other=0).to(tl.float32)
        b_g = tl.load(g + row, mask=m_d, other=0).to(tl.float32)
        b_before = tl.load(o + row - D, mask=m_d & (t > 0), other=0).to(tl.float32)
        b_dx = b_do + b_dh
        b_dh = b_dx * tl.exp(b_g)
        tl.store(dx + row, b_dx.to(dx.dtype.element_ty), mask=m_d)
        b_dg = b_dh * tl.where(t > 0, b_before, b_h0)
        tl.store(dg + row, b_dg.to(dg.dtype.element_ty), mask=m_d)
    if HAS_H0:
        if i_j == 0:
            tl.store(dh0 + p_n, b_dh, mask=m_d)


@triton.jit
def leak_step_kernel(x, g, state, o, out_state, SIZE, BLOCK: tl.constexpr):
    """One token of N D channels: o and the next state, in place too."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = p < SIZE
    b_g = tl.load(g + p, mask=m, other=0).to(tl.float32)
    b_x = tl.load(x + p, mask=m, other=0).to(tl.float32)
    b_h = tl.load(state + p, mask=m, other=0) * tl.exp(b_g) + b_x
    tl.store(o + p, b_h.to(o.dtype.element_ty), mask=m)
    tl.store(out_state + p, b_h, mask=m)


def tiles(D, capability):
    """Constants of a launch: channels a program, segments joined at a time, tokens that loads run ahead."""
    # Turing cannot copy to shared memory in the background
    stages = 1 if 0 < capability < 80 else 6
    return dict(BD=min(64, max(16, power_of_2(D))), BJ=8, STAGES=stages)


def variants(capability=90):
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    from effattn_lite.kernels import elementwise_average as average

    leak = (leak_write_kernel, leak_read_kernel, leak_gradient_kernel)
    both = (average.average_write_kernel, average.average_read_kernel, average.average_gradient_kernel)
    for kind in ("bf16", "fp16", "fp32"):
        for kernel in (*leak, *both):
            reverse = "gradient" in kernel.fn.__name__
            yield _variant(kernel, kind, capability, REVERSE=reverse)
        yield _variant(leak_step_kernel, kind, capability)
        yield _variant(average.average_step_kernel, kind, capability)
    yield _variant(average.average_read_kernel, "bf16", capability, SLOPES=False)
    yield _variant(average.average_write_kernel, "bf16", capability, REVERSE=True)


def _variant(kernel, kind, capability, **more):
    constants = tiles(2048, capability) | dict(D=2048, BS=4, PACKED=True, HAS_H0=True, HAS_DHT=True)
    constants |= dict(SEGMENTS=True, STORE_HT=True, REVERSE=False, SLOPES=True, BLOCK=256) | more
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    narrow = dict.fromkeys(("x", "k", "v", "do", "o", "dx", "dk", "dv"), f"*{kind}")
    others = dict.fromkeys(("T", "L", "N", "SIZE"), "i32") | {"cu_seqlens": "*i32", "marks": "*i32"}
    known = narrow | others | dict.fromkeys(constants, "constexpr")
    signature = {name: known.get(name, "*fp32") for name in kernel.arg_names}
    name = "-".join([kernel.fn.__name__, kind, *(f"{n}{x}" for n, x in more.items())])
    return name, kernel, signature, constants, {"num_warps": 1}
