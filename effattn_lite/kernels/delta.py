r"""The delta rule with no decay, one decay a head or one a key channel: one Triton engine.

.. math:: \tilde S_t = \operatorname{Diag}(e^{g_t})\,S_{t-1}, \qquad
    S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top, \qquad o_t = s\,S_t^\top q_t

A transition is a K x K matrix, so states cannot be summed up segment by segment. Two launches instead: what
does not ask for the state is made of all chunks at once (`delta_prepare`), then one program a head and value
tile goes through the text with the state in registers and writes the output.

The backward is the same system seen from the right. With W, U from the left and W', U' from the right,

.. math:: \Delta = U - W S, \quad S' = \xi_C S + (\zeta K)^\top \Delta, \qquad
    R = U' + W' dS', \quad dS = \xi_C\, dS' + s\,(\xi Q)^\top dO - (\beta \xi K)^\top R

`delta_states_kernel` leaves the state and Delta of every chunk, `delta_gradients_kernel` dS' and R, and all
gradients are products of these within a chunk (`delta_local`).

Products of float32 inputs are "ieee", of float16 inputs TF32 on float32 numbers, since a state may leave
float16's range; sums and states are float32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import padded
from effattn_lite.kernels.common.scan import dot_wide
from effattn_lite.kernels.delta_blocks import find_sequence, load_columns, load_rows, store_rows
from effattn_lite.kernels.delta_local import delta_columns_kernel, delta_rows_kernel
from effattn_lite.kernels.delta_prepare import delta_prepare_kernel, delta_prepare_right_kernel
from effattn_lite.kernels.delta_step import delta_step_kernel

NO_SPECIALIZE = ["T", "N"]
"""Arguments whose value must not cause another compilation: every length of text would."""


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def delta_states_kernel(
    q, k, w, u, p, total, h0, o, ht, h, d, cu_seqlens, scale, T, N,
    HQ: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    HALF: tl.constexpr, HAS_H0: tl.constexpr, OUTPUT: tl.constexpr, STORE_HT: tl.constexpr,
):  # fmt: skip
    """A sequence's value head and tile of V columns, chunk by chunk from the left; K is whole.

    With OUTPUT it writes o and, with STORE_HT, the last state; else the state that enters every chunk, h
    [chunks, HV, K, V], and what every token writes, d [tokens, HV, V]. With a decay a channel q and k are
    the decayed qx and kz of `delta_prepare`, and HQ = HV.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    DTYPE: tl.constexpr = tl.float16 if HALF else w.dtype.element_ty
    i_p = tl.program_id(0)
    i_n, i_h = i_p // (NV * HV), i_p // NV % HV
    i_q = i_h // (HV // HQ)
    o_k, o_v, o_c = tl.arange(0, BK), i_p % NV * BV + tl.arange(0, BV), tl.arange(0, C)
    o_S = o_k[:, None] * V + o_v[None, :]
    m_S = (o_k < K)[:, None] & (o_v < V)[None, :]
    first, length, i_s = find_sequence(i_n, cu_seqlens, T, C, BS, PACKED)
    b_S = tl.zeros([BK, BV], tl.float32)
    if HAS_H0:
        b_S += tl.load(h0 + (i_n.to(tl.int64) * HV + i_h) * K * V + o_S, mask=m_S, other=0)
    # [sketch:fwd]
    for i_c in range(0, length, C):
        m_c = i_c + o_c < length
        row = first + i_c + o_c
        r_v, r_q = row * HV + i_h, row * HQ + i_q
        # [C, BK] @ [BK, BV]
        b_d = load_rows(u, r_v, m_c, o_v, V) - dot_wide(load_rows(w, r_v, m_c, o_k, K), b_S, DTYPE)
        if OUTPUT:
            b_o = dot_wide(load_rows(q, r_q, m_c, o_k, K), b_S, DTYPE)
        else:
            tl.store(h + (i_s.to(tl.int64) * HV + i_h) * K * V + o_S, b_S.to(h.dtype.element_ty), mask=m_S)
            store_rows(d, r_v, m_c, o_v, b_d, V)
        b_write = b_d
        if GATE == 1:
            b_G = tl.load(total + r_v, mask=m_c, other=0)
            b_last = tl.min(b_G, 0)
            b_write = b_d * tl.exp(tl.minimum(b_last - b_G, 0.0))[:, None]
            b_S *= tl.exp(b_last)
        if GATE == 2:
            b_last = tl.load(total + (i_s.to(tl.int64) * HV + i_h) * K + o_k, mask=o_k < K, other=0)
            b_S *= tl.exp(b_last)[:, None]
        b_S += dot_wide(load_columns(k, r_q, m_c, o_k, K), b_write, DTYPE)  # [BK, C] @ [C, BV]
        if OUTPUT:
            if GATE == 1:
                b_o *= tl.exp(b_G)[:, None]
            b_o += dot_wide(load_rows(p, r_v, m_c, o_c, C), b_d, DTYPE)  # [C, C] @ [C, BV]
            store_rows(o, r_v, m_c, o_v, b_o * scale, V)
        i_s += 1
    # [/sketch:fwd]
    if STORE_HT:
        tl.store(ht + (i_n.to(tl.int64) * HV + i_h) * K * V + o_S, b_S, mask=m_S)


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def delta_gradients_kernel(
    q, k, beta, do, w, u, total, dht, dh0, dh, r, cu_seqlens, scale, T, N,
    HQ: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    HALF: tl.constexpr, HAS_DHT: tl.constexpr, STORE_DH0: tl.constexpr,
):  # fmt: skip
    """The same from the right: the gradient that enters every chunk, dh [chunks, HV, K, V], and r as d.

    With a decay a channel q and k are the decayed qx and kx of `delta_prepare`, and HQ = HV.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    DTYPE: tl.constexpr = tl.float16 if HALF else w.dtype.element_ty
    i_p = tl.program_id(0)
    i_n, i_h = i_p // (NV * HV), i_p // NV % HV
    i_q = i_h // (HV // HQ)
    o_k, o_v, o_c = tl.arange(0, BK), i_p % NV * BV + tl.arange(0, BV), tl.arange(0, C)
    o_S = o_k[:, None] * V + o_v[None, :]
    m_S = (o_k < K)[:, None] & (o_v < V)[None, :]
    first, length, i_s = find_sequence(i_n, cu_seqlens, T, C, BS, PACKED)
    chunks = (length + C - 1) // C
    b_dS = tl.zeros([BK, BV], tl.float32)
    if HAS_DHT:
        b_dS += tl.load(dht + (i_n.to(tl.int64) * HV + i_h) * K * V + o_S, mask=m_S, other=0)
    for i in range(chunks):
        i_c = (chunks - 1 - i) * C
        i_g = (i_s + chunks - 1 - i).to(tl.int64) * HV + i_h
        m_c = i_c + o_c < length
        row = first + i_c + o_c
        r_v, r_q = row * HV + i_h, row * HQ + i_q
        tl.store(dh + i_g * K * V + o_S, b_dS.to(dh.dtype.element_ty), mask=m_S)
        # [C, BK] @ [BK, BV]
        b_r = load_rows(u, r_v, m_c, o_v, V) + dot_wide(load_rows(w, r_v, m_c, o_k, K), b_dS, DTYPE)
        store_rows(r, r_v, m_c, o_v, b_r, V)
        b_do = load_rows(do, r_v, m_c, o_v, V) * scale
        b_r *= tl.load(beta + r_v, mask=m_c, other=0).to(tl.float32)[:, None]
        if GATE == 1:
            b_G = tl.load(total + r_v, mask=m_c, other=0)
            b_r *= tl.exp(b_G)[:, None]
            b_do *= tl.exp(b_G)[:, None]
            b_dS *= tl.exp(tl.min(b_G, 0))
        if GATE == 2:
            b_dS *= tl.exp(tl.load(total + i_g * K + o_k, mask=o_k < K, other=0))[:, None]
        # [BK, C] @ [C, BV]
        b_dS += dot_wide(load_columns(q, r_q, m_c, o_k, K), b_do, DTYPE)
        b_dS -= dot_wide(load_columns(k, r_q, m_c, o_k, K), b_r, DTYPE)
    if STORE_DH0:
        tl.store(dh0 + (i_n.to(tl.int64) * HV + i_h) * K * V + o_S, b_dS, mask=m_S)


def work(dtype, capability):
    """Dtype of what kernels hand to one another, and how float32 matrices are inverted."""
    if dtype == torch.bfloat16:
        return torch.bfloat16, "tf32x3"
    return torch.float32, "tf32x3" if dtype == torch.float16 and capability >= 80 else "ieee"


TABLE = {
    # K: (HC of none or a head, HC of a channel, BV, warps, warps of the gradients, stages)
    "bfloat16": {64: (32, 16, 32, 4, 4, 2), 128: (32, 16, 32, 4, 4, 2), 256: (16, 16, 16, 8, 8, 2)},
    "float16": {64: (16, 16, 16, 4, 4, 1), 128: (16, 16, 16, 8, 8, 1), 256: (16, 16, 16, 8, 8, 1)},
    "float32": {64: (16, 16, 16, 4, 4, 1), 128: (16, 16, 16, 8, 4, 1), 256: (16, 16, 16, 8, 8, 1)},
}
"""Half chunks and tiles by dtype and padded K; Turing, whose products are plain FMAs, takes float32's."""


def tiles(K, dtype, *, gate, capability, chunk_size=None):
    """(HC, BK, BV, options, options of the gradients) of the kernels that carry the state.

    A chunk of 2 HC tokens is no longer than `chunk_size`, or 32.
    """
    BK = padded(K)
    kind = "float32" if capability < 80 else str(dtype).removeprefix("torch.")
    head, channel, BV, *warps, stages = TABLE[kind][max(64, BK)]
    HC = channel if gate == 2 else head
    if capability != 80 and capability // 10 not in (9, 10):
        # two stages of 64 tokens are more than 99 KiB of shared memory
        HC = min(HC, 16)
    if chunk_size is not None:
        HC = min(HC, max(16, chunk_size // 2))
    return HC, BK, BV, *({"num_warps": n, "num_stages": stages} for n in warps)


def square(K, V, dtype, *, capability):
    """(BK, BV, options of the preparation, of the local gradients): kernels that go over K and V by tiles."""
    wide = dtype != torch.bfloat16 or capability < 80
    BK, BV = (min(padded(n), 32 if wide else 64) for n in (K, V))
    return BK, BV, *({"num_warps": n, "num_stages": 1} for n in (4, 4 if wide else 8))


def variants(capability=90):
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    kinds = {"bf16": (torch.bfloat16, 256), "fp16": (torch.float16, 256), "fp32": (torch.float32, 128)}
    for kind, (dtype, most) in kinds.items():
        for axis in (64, 128, 256):
            for gate in (0, 1, 2):
                if axis <= most:
                    yield from _variants(axis, dtype, kind, gate, capability)


def _variants(axis, dtype, kind, gate, capability):
    name = f"{kind}-{axis}-{('none', 'head', 'channel')[gate]}"
    scratch, precision = work(dtype, capability)
    made = "*bf16" if scratch == torch.bfloat16 else "*fp32"
    signature = dict.fromkeys(("q", "k", "v", "beta", "do", "o", "dv", "dbeta"), f"*{kind}")
    signature |= dict.fromkeys(("w", "u", "p", "qx", "kz", "kx", "h", "d", "dh", "r"), made)
    wide = (
        "g",
        "total",
        "h0",
        "ht",
        "dht",
        "dh0",
        "state",
        "out_state",
        "dq",
        "dk",
        "dg",
        "z",
        "reads",
        "own",
    )
    signature |= dict.fromkeys(wide, "*fp32") | {
        "cu_seqlens": "*i32",
        "scale": "fp32",
        "T": "i32",
        "N": "i32",
    }
    HC, BK, BV, options, right = tiles(axis, dtype, gate=gate, capability=capability)
    EK, EV, plain, local = square(axis, axis, dtype, capability=capability)
    sizes = dict(H=4, HQ=4, HV=4, K=axis, V=axis, BS=4, HC=HC, C=2 * HC, GATE=gate, PACKED=True)
    sizes |= dict(HALF=kind == "fp16", HAS_H0=True, HAS_DHT=True, STORE_HT=True, STORE_DH0=True)
    sizes |= dict(PRECISION=precision, SCORES=True)
    tall, flat = dict(BK=BK, BV=BV), dict(BK=EK, BV=EV)
    for label, kernel, launch, more in (
        ("prepare", delta_prepare_kernel, plain, flat),
        ("right", delta_prepare_right_kernel, plain, flat),
        ("output", delta_states_kernel, options, tall | dict(OUTPUT=True)),
        ("states", delta_states_kernel, options, tall | dict(OUTPUT=False)),
        ("gradients", delta_gradients_kernel, right, tall),
        ("rows", delta_rows_kernel, local, flat),
        ("columns", delta_columns_kernel, local, flat),
        ("step", delta_step_kernel, {"num_warps": 4}, dict(BK=BK, BV=16)),
    ):
        constants = {n: x for n, x in (sizes | more).items() if n in kernel.arg_names}
        types = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
        if gate == 2 and label in ("output", "states", "gradients"):
            types |= dict(q=made, k=made)
        yield f"{label}-{name}", kernel, types, constants, launch
