r"""TTT-Linear in Triton: one program a sequence and head carries its inner model through the mini-batches.

.. math:: Z = K W' + b', \qquad \Delta = \eta \odot \nabla_Z \ell, \qquad
    O = Q + \mathrm{LN}\bigl(Q W + b - \bigl((Q K^\top + 1) \odot [i \ge j]\bigr) \Delta\bigr), \qquad
    W \leftarrow W - K^\top \Delta

The step is not linear in the state, so nothing can be summed ahead of time: mini-batches follow one another,
and only sequences and heads run side by side. The inner model stays on chip. One launch forward; for the
backward, in `ttt_linear_backward.py`, the forward leaves a copy of the model every few mini-batches.

Products of float32 inputs are "ieee"; those of 16-bit inputs TF32, since a state in 16 bits would lose steps
that are small beside it. All sums and states are float32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.ttt_linear_backward import ttt_linear_backward_kernel
from effattn_lite.kernels.ttt_linear_blocks import find_text, gradients, mul, normalise

NO_SPECIALIZE = ["T", "N", "every"]
"""Arguments whose value must not cause another compilation: every length of text would."""


@triton.jit(do_not_specialize=NO_SPECIALIZE)
def ttt_linear_forward_kernel(
    q, k, v, eta, w, b, ln_weight, ln_bias, S0, s0, D0, d0, c0, o, S1, s1, D1, d1, kept_W, kept_b, cu_seqlens,
    T, N, every, H: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, KEEP: tl.constexpr,
    STORE_HT: tl.constexpr,
):  # fmt: skip
    """o and the final state of one sequence and head, mini-batch by mini-batch of SIZE tokens.

    c0 [N] int32: tokens of the mini-batch in which the state stopped. With KEEP the model at the beginning of
    every `every`-th mini-batch goes to kept_W [slots, H, K, K] and kept_b [slots, H, K].
    """
    i_n, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    first, length = find_text(i_n, cu_seqlens, T, PACKED)
    i_nh = i_n.to(tl.int64) * H + i_h
    o_k = tl.arange(0, BK)
    o_t = tl.arange(0, BT)
    m_k = o_k < K
    # a tile's offsets from the mini-batch's first token, which may lie before the text
    o_x = o_k[:, None] + o_t[None, :] * (H * K)
    # tokens are columns: every product's rows are channels, which the warps share out
    o_W, m_W = o_k[:, None] + o_k[None, :] * K, m_k[:, None] & m_k[None, :]
    b_w = tl.load(w + i_h * K * K + o_W, mask=m_W, other=0)
    b_b = tl.load(b + i_h * K + o_k, mask=m_k, other=0)
    gamma = tl.load(ln_weight + i_h * K + o_k, mask=m_k, other=0)[:, None]
    beta = tl.load(ln_bias + i_h * K + o_k, mask=m_k, other=0)[:, None]
    IEEE: tl.constexpr = k.dtype.element_ty == tl.float32
    p_W, p_b = i_nh * K * K + o_W, i_nh * K + o_k
    c = 0
    if HAS_H0:
        b_w += tl.load(S0 + p_W, mask=m_W, other=0)
        b_b += tl.load(s0 + p_b, mask=m_k, other=0)
        c = tl.load(c0 + i_n)
    slot = first // (SIZE * every) + 2 * i_n
    if STORE_HT:
        if length == 0:
            b_D = tl.load(D0 + p_W, mask=m_W, other=0) if HAS_H0 else tl.zeros_like(b_w)
            b_d = tl.load(d0 + p_b, mask=m_k, other=0) if HAS_H0 else tl.zeros_like(b_b)
            tl.store(D1 + p_W, b_D, mask=m_W)
            tl.store(d1 + p_b, b_d, mask=m_k)
    # [sketch:fwd]
    for j in range(0, tl.where(length > 0, (length + c + SIZE - 1) // SIZE, 0)):
        if KEEP:
            if j % every == 0:
                i_kept = (slot + j // every) * H + i_h
                tl.store(kept_W + i_kept * K * K + o_W, b_w, mask=m_W)
                tl.store(kept_b + i_kept * K + o_k, b_b, mask=m_k)
        # column r of the tile is token r of the mini-batch, whether it belongs to this text or not
        t = j * SIZE - c + o_t
        m_t = (o_t < SIZE) & (t >= 0) & (t < length)
        m_x = m_t[None, :] & m_k[:, None]
        row0 = (first + j * SIZE - c) * H + i_h
        x0 = row0 * K
        b_q, b_k, b_v = (
            tl.load(q + x0 + o_x, mask=m_x, other=0).to(tl.float32),
            tl.load(k + x0 + o_x, mask=m_x, other=0).to(tl.float32),
            tl.load(v + x0 + o_x, mask=m_x, other=0).to(tl.float32),
        )
        b_kt = tl.trans(b_k)
        b_eta = tl.load(eta + row0 + o_t * H, mask=m_t, other=0)[None, :].to(tl.float32)
        # 1 gradients of all tokens at the mini-batch's start, [BK, BK] @ [BK, BT]
        b_g, _, _, _ = gradients(
            b_w, b_b, b_k, b_v, D0, d0, p_W, p_b, j, gamma, beta, m_W, m_k, K, IEEE, HAS_H0
        )
        b_h = b_eta * b_g
        # 2 what token i reads of the steps up to its own: [BK, BT] @ [BT, BT]; the 1 is the bias
        b_A = tl.where(o_t[:, None] <= o_t[None, :], mul(b_kt, b_q, IEEE) + 1, 0.0)
        b_z, _ = normalise(mul(b_w, b_q, IEEE) + b_b[:, None] - mul(b_h, b_A, IEEE), m_k, K)
        b_o = (b_q + gamma * b_z + beta).to(o.dtype.element_ty)
        tl.store(o + x0 + o_x, b_o, mask=m_x)
        # 3 all steps at once: [BK, BT] @ [BT, BK]
        b_step, b_s = mul(b_h, b_kt, IEEE), tl.sum(b_h, 1)
        b_w -= b_step
        b_b -= b_s
        if STORE_HT:
            if (j + 1) * SIZE - c >= length:
                whole = (length + c) % SIZE == 0
                b_D, b_d = tl.where(whole, 0.0, -b_step), tl.where(whole, 0.0, -b_s)
                if HAS_H0:
                    goes_on = (j == 0) & (not whole)
                    b_D += tl.load(D0 + p_W, mask=m_W & goes_on, other=0)
                    b_d += tl.load(d0 + p_b, mask=m_k & goes_on, other=0)
                tl.store(D1 + p_W, b_D, mask=m_W)
                tl.store(d1 + p_b, b_d, mask=m_k)
    # [/sketch:fwd]
    if STORE_HT:
        tl.store(S1 + p_W, b_w - tl.load(w + i_h * K * K + o_W, mask=m_W, other=0), mask=m_W)
        tl.store(s1 + p_b, b_b - tl.load(b + i_h * K + o_k, mask=m_k, other=0), mask=m_k)


def tiles(dtype):
    """(BK, warps): a tile holds the inner model of the largest head, in registers."""
    return (32, 4) if dtype == torch.float32 else (64, 4)


def variants():
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        BK, warps = tiles(dtype)
        tensors = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), f"*{kind}")
        tensors |= {"c0": "*i32", "cu_seqlens": "*i32"} | dict.fromkeys(NO_SPECIALIZE, "i32")
        sizes = dict(H=4, K=BK, SIZE=16, BT=16, BK=BK, PACKED=True, HAS_H0=True, HAS_DHT=True)
        sizes |= dict(KEEP=True, STORE_HT=True)
        for kernel in (ttt_linear_forward_kernel, ttt_linear_backward_kernel):
            constants = {n: x for n, x in sizes.items() if n in kernel.arg_names}
            signature = {
                n: "constexpr" if n in constants else tensors.get(n, "*fp32") for n in kernel.arg_names
            }
            options = {"num_warps": warps, "num_stages": 1}
            yield f"{kernel.fn.__name__}-{kind}", kernel, signature, constants, options
