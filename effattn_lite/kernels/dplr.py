r"""A state whose transition is a diagonal plus a matrix of rank 1, run both ways: one Triton engine.

.. math:: y_t = S_{t-1}^\top a_t, \qquad
    S_t = \operatorname{Diag}(e^{g_t})\,S_{t-1} + b_t y_t^\top + k_t v_t^\top, \qquad o_t = s\,S_t^\top q_t

The gradients obey the same system from the right, readers and writers exchanged: with r the gradient of y and
:math:`dS_t` that of :math:`S_t`, the token's own read-out included,

.. math:: r_t = dS_t^\top b_t, \qquad dv_t = dS_t^\top k_t, \qquad
    dS_{t-1} = \operatorname{Diag}(e^{g_t})\,dS_t + a_t r_t^\top + s\,q_{t-1} do_{t-1}^\top

So three kernels do all, each with REVERSE for the right. `dplr_prepare_kernel` makes of all chunks at once
what does not ask for the state; then one program a head and value tile goes through the text with the state
in registers; `dplr_gradients_kernel` gives what two readers receive from all that they met.

Products of float32 inputs are "ieee", of float16 inputs TF32 on float32 numbers, since a state may leave
float16's range; sums and states are float32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import padded
from effattn_lite.kernels.common.scan import dot_wide
from effattn_lite.kernels.delta import work
from effattn_lite.kernels.delta_blocks import find_sequence, load_columns, load_rows, store_rows
from effattn_lite.kernels.dplr_local import dplr_gradients_kernel
from effattn_lite.kernels.dplr_prepare import dplr_prepare_kernel
from effattn_lite.kernels.dplr_step import dplr_step_kernel


@triton.jit(do_not_specialize=["T", "N"])
def dplr_states_kernel(
    w1, w2, u1, u2, z1, z2, v, total, s0, o, st, h, y, cu_seqlens, scale, T, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BS: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr, REVERSE: tl.constexpr, HAS_S0: tl.constexpr,
    OUTPUT: tl.constexpr, STATES: tl.constexpr, STORE_ST: tl.constexpr,
):  # fmt: skip
    """A sequence's head and tile of V columns, chunk by chunk; K is whole.

    With OUTPUT it writes the second read-out, o [tokens, H, V]; with STATES the state that enters every
    chunk, h [chunks, H, K, V], and the first read-out, y [tokens, H, V]; with STORE_ST the last state.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    DTYPE: tl.constexpr = tl.float16 if HALF else w1.dtype.element_ty
    i_p = tl.program_id(0)
    i_n, i_h = i_p // (NV * H), i_p // NV % H
    o_k, o_v, o_c = tl.arange(0, BK), i_p % NV * BV + tl.arange(0, BV), tl.arange(0, C)
    o_S = o_k[:, None] * V + o_v[None, :]
    m_S = (o_k < K)[:, None] & (o_v < V)[None, :]
    first, length, i_s = find_sequence(i_n, cu_seqlens, T, C, BS, PACKED)
    chunks = (length + C - 1) // C
    b_S = tl.zeros([BK, BV], tl.float32)
    if HAS_S0:
        b_S += tl.load(s0 + (i_n.to(tl.int64) * H + i_h) * K * V + o_S, mask=m_S, other=0)
    # [sketch:fwd]
    for i in range(chunks):
        i_c = chunks - 1 - i if REVERSE else i
        i_g = (i_s + i_c).to(tl.int64) * H + i_h
        m_c = i_c * C + o_c < length
        row = (first + i_c * C + o_c) * H + i_h
        # both read-outs: [C, BK] @ [BK, BV]
        b_y = load_rows(u1, row, m_c, o_v, V) + dot_wide(load_rows(w1, row, m_c, o_k, K), b_S, DTYPE)
        if STATES:
            tl.store(h + i_g * K * V + o_S, b_S.to(h.dtype.element_ty), mask=m_S)
            store_rows(y, row, m_c, o_v, b_y, V)
        if OUTPUT:
            if DTYPE == tl.float32:
                # plain FMAs: else the operands of both products wait in registers at once
                tl.debug_barrier()
            b_o = load_rows(u2, row, m_c, o_v, V) + dot_wide(load_rows(w2, row, m_c, o_k, K), b_S, DTYPE)
            store_rows(o, row, m_c, o_v, b_o * scale, V)
        # both writes: [BK, C] @ [C, BV]
        b_S *= tl.exp(tl.load(total + i_g * K + o_k, mask=o_k < K, other=0))[:, None]
        b_S += dot_wide(load_columns(z1, row, m_c, o_k, K), b_y, DTYPE)
        b_S += dot_wide(load_columns(z2, row, m_c, o_k, K), load_rows(v, row, m_c, o_v, V), DTYPE)
    # [/sketch:fwd]
    if STORE_ST:
        tl.store(st + (i_n.to(tl.int64) * H + i_h) * K * V + o_S, b_S, mask=m_S)


TABLE = {
    # K: (half chunk, BV, warps, stages)
    "bfloat16": {64: (16, 32, 4, 2), 128: (16, 32, 4, 2), 256: (16, 16, 8, 2)},
    "float16": {64: (16, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "float32": {64: (16, 16, 4, 1), 128: (16, 16, 16, 1), 256: (16, 16, 16, 1)},
}
"""Half chunks and tiles by dtype and padded K; Turing, whose products are plain FMAs, takes float32's."""


def tiles(K, dtype, *, capability, chunk_size=None):
    """(HC, BK, BV, options) of the kernel that carries the state.

    A chunk of 2 HC tokens is no longer than `chunk_size`, or 32.
    """
    BK = padded(K)
    kind = "float32" if capability < 80 else str(dtype).removeprefix("torch.")
    HC, BV, warps, stages = TABLE[kind][max(64, BK)]
    if chunk_size is not None:
        HC = min(HC, max(16, chunk_size // 2))
    return HC, BK, BV, {"num_warps": warps, "num_stages": stages}


def square(K, V, dtype, *, capability):
    """(BK, BK of the gradients, BV, options) of the kernels that go over K and V by tiles."""
    wide = dtype != torch.bfloat16 or capability < 80
    BK, BV = (min(padded(n), 32 if wide else 64) for n in (K, V))
    return BK, min(BK, 32), BV, {"num_warps": 4, "num_stages": 1}


def variants(capability=90):
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    kinds = {"bf16": (torch.bfloat16, 256), "fp16": (torch.float16, 256), "fp32": (torch.float32, 128)}
    for kind, (dtype, most) in kinds.items():
        for axis in (64, 128, 256):
            if axis <= most:
                yield from _variants(axis, dtype, kind, capability)


def _variants(axis, dtype, kind, capability):
    scratch, precision = work(dtype, capability)
    made = "*bf16" if scratch == torch.bfloat16 else "*fp32"
    signature = dict.fromkeys(("x1", "x2", "y1", "y2", "v", "o", "dx1", "dx2"), f"*{kind}")
    signature |= dict.fromkeys(("q", "k", "a", "b"), f"*{kind}")
    signature |= dict.fromkeys(("w1", "w2", "u1", "u2", "z1", "z2", "h", "y", "d1", "d2", "e1", "e2"), made)
    signature |= dict.fromkeys(
        ("g", "total", "s0", "st", "state", "out_state", "dg", "reads1", "reads2"), "*fp32"
    )
    signature |= {"S": made, "other": made, "cu_seqlens": "*i32", "scale": "fp32", "T": "i32", "N": "i32"}
    HC, BK, BV, options = tiles(axis, dtype, capability=capability)
    EK, LK, EV, flat = square(axis, axis, dtype, capability=capability)
    sizes = dict(H=4, K=axis, V=axis, BS=4, HC=HC, C=2 * HC, PACKED=True, HALF=kind == "fp16", HAS_S0=True)
    sizes |= dict(STORE_ST=True, PRECISION=precision)
    tall, wide, near = dict(BK=BK, BV=BV), dict(BK=EK, BV=EV), dict(BK=LK, BV=EV)
    left, right = dict(REVERSE=False), dict(REVERSE=True)
    for label, kernel, launch, more in (
        ("left", dplr_prepare_kernel, flat, wide | left | dict(OUTPUT=True)),
        ("right", dplr_prepare_kernel, flat, wide | right | dict(OUTPUT=True)),
        ("output", dplr_states_kernel, options, tall | left | dict(OUTPUT=True, STATES=False)),
        ("states", dplr_states_kernel, options, tall | left | dict(OUTPUT=False, STATES=True)),
        ("adjoint", dplr_states_kernel, options, tall | right | dict(OUTPUT=True, STATES=True)),
        ("readers", dplr_gradients_kernel, flat, near | left),
        ("writers", dplr_gradients_kernel, flat, near | right),
        ("step", dplr_step_kernel, {"num_warps": 4}, dict(BK=BK, BV=16)),
    ):
        constants = {n: x for n, x in (sizes | more).items() if n in kernel.arg_names}
        types = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
        yield f"{label}-{kind}-{axis}", kernel, types, constants, launch
