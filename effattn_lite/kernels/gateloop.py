r"""GateLoop's own kernels: q and k turned by their angle, the gradient of that, and one token of decoding.

.. math:: \hat x = (\cos\Theta \odot x,\; \sin\Theta \odot x), \qquad
    dx = \cos\Theta \odot d\hat x_1 + \sin\Theta \odot d\hat x_2, \qquad
    d\Theta = x \odot (\cos\Theta \odot d\hat x_2 - \sin\Theta \odot d\hat x_1)

What is between the turn and its gradient is the engine `gated_decay`. All angles are float32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common.launch import cdiv, on_device, padded

ROWS = 8
"""Tokens and heads of a program of the turn."""


@triton.jit
def turn_kernel(q, k, g, angle, q2, k2, g2, M, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """q2, k2, g2 [M, 2 K] of q, k, g [M, K], one row a token and head."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    o_k = tl.arange(0, BK)[None, :]
    m_x = (row < M) & (o_k < K)
    p_x, p_y = row * K + o_k, row * 2 * K + o_k
    b_angle = tl.load(angle + p_x, mask=m_x, other=0)
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)
    b_q = tl.load(q + p_x, mask=m_x, other=0).to(tl.float32)
    b_k = tl.load(k + p_x, mask=m_x, other=0).to(tl.float32)
    b_g = tl.load(g + p_x, mask=m_x, other=0)
    tl.store(q2 + p_y, (b_cos * b_q).to(q2.dtype.element_ty), mask=m_x)
    tl.store(q2 + p_y + K, (b_sin * b_q).to(q2.dtype.element_ty), mask=m_x)
    tl.store(k2 + p_y, (b_cos * b_k).to(k2.dtype.element_ty), mask=m_x)
    tl.store(k2 + p_y + K, (b_sin * b_k).to(k2.dtype.element_ty), mask=m_x)
    tl.store(g2 + p_y, b_g, mask=m_x)
    tl.store(g2 + p_y + K, b_g, mask=m_x)


@triton.jit
def turn_gradient_kernel(
    dq2, dk2, dg2, q, k, angle, dq, dk, dg, dangle, M, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr
):
    """dq, dk, dg and dangle [M, K] of the gradients of the turned, [M, 2 K]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    o_k = tl.arange(0, BK)[None, :]
    m_x = (row < M) & (o_k < K)
    p_x, p_y = row * K + o_k, row * 2 * K + o_k
    b_angle = tl.load(angle + p_x, mask=m_x, other=0)
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)
    b_one = tl.load(dq2 + p_y, mask=m_x, other=0).to(tl.float32)
    b_two = tl.load(dq2 + p_y + K, mask=m_x, other=0).to(tl.float32)
    b_q = tl.load(q + p_x, mask=m_x, other=0).to(tl.float32)
    tl.store(dq + p_x, (b_cos * b_one + b_sin * b_two).to(dq.dtype.element_ty), mask=m_x)
    b_dangle = b_q * (b_cos * b_two - b_sin * b_one)
    b_one = tl.load(dk2 + p_y, mask=m_x, other=0).to(tl.float32)
    b_two = tl.load(dk2 + p_y + K, mask=m_x, other=0).to(tl.float32)
    b_k = tl.load(k + p_x, mask=m_x, other=0).to(tl.float32)
    tl.store(dk + p_x, (b_cos * b_one + b_sin * b_two).to(dk.dtype.element_ty), mask=m_x)
    b_dangle += b_k * (b_cos * b_two - b_sin * b_one)
    tl.store(dangle + p_x, b_dangle, mask=m_x)
    b_one = tl.load(dg2 + p_y, mask=m_x, other=0).to(tl.float32)
    b_two = tl.load(dg2 + p_y + K, mask=m_x, other=0).to(tl.float32)
    tl.store(dg + p_x, (b_one + b_two).to(dg.dtype.element_ty), mask=m_x)


@triton.jit
def gateloop_step_kernel(
    q, k, v, g, theta, real, imaginary, o, out_real, out_imaginary, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o [N, H, V] and the next state, in place too; one program a sequence, head and tile of V columns."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_nh = tl.program_id(0).to(tl.int64) // NV
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(0) % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    p_k, p_v = i_nh * K + o_k, i_nh * V + o_v
    p_S = i_nh * K * V + o_k[:, None] * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    b_size = tl.exp(tl.load(g + p_k, mask=m_k, other=0).to(tl.float32))
    b_angle = tl.load(theta + p_k, mask=m_k, other=0).to(tl.float32)
    b_cos, b_sin = (b_size * tl.cos(b_angle))[:, None], (b_size * tl.sin(b_angle))[:, None]
    b_k = tl.load(k + p_k, mask=m_k, other=0).to(tl.float32)
    b_v = tl.load(v + p_v, mask=m_v, other=0).to(tl.float32)
    b_real = tl.load(real + p_S, mask=m_S, other=0)
    b_imaginary = tl.load(imaginary + p_S, mask=m_S, other=0)
    b_next = b_cos * b_real - b_sin * b_imaginary + b_k[:, None] * b_v[None, :]
    b_q = tl.load(q + p_k, mask=m_k, other=0).to(tl.float32)
    b_o = tl.sum(b_q[:, None] * b_next, 0) * scale
    tl.store(o + p_v, b_o.to(o.dtype.element_ty), mask=m_v)
    tl.store(out_real + p_S, b_next, mask=m_S)
    tl.store(out_imaginary + p_S, b_sin * b_real + b_cos * b_imaginary, mask=m_S)


def turn(q, k, g, angle):
    """q, k and g with two halves, [..., 2 K] each."""
    with on_device(q):
        K = q.shape[-1]
        q, k, g, angle = (x.contiguous() for x in (q, k, g, angle))
        q2, k2, g2 = (torch.empty(*x.shape[:-1], 2 * K, dtype=x.dtype, device=x.device) for x in (q, k, g))
        _by_rows(turn_kernel, q, k, g, angle, q2, k2, g2, like=q)
    return q2, k2, g2


def turn_backward(dq2, dk2, dg2, q, k, angle):
    """Gradients of q, k, g and the angle from those of the turned."""
    with on_device(q):
        inputs = [x.contiguous() for x in (dq2, dk2, dg2, q, k, angle)]
        dq, dk, dangle = (torch.empty_like(x) for x in inputs[3:])
        dg = torch.empty(q.shape, dtype=dg2.dtype, device=q.device)
        _by_rows(turn_gradient_kernel, *inputs, dq, dk, dg, dangle, like=q)
    return dq, dk, dg, dangle


def _by_rows(kernel, *tensors, like):
    K = like.shape[-1]
    M = like.numel() // K
    kernel[(cdiv(M, ROWS),)](*tensors, M, K=K, R=ROWS, BK=padded(K), num_warps=4)


def step(q, k, v, g, theta, real, imaginary, out_real, out_imaginary, scale):
    """o of one token; the parts of the next state are written to `out_real` and `out_imaginary`."""
    with on_device(q):
        N, H, K = q.shape
        V = v.shape[-1]
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        q, k, v, g, theta = (x.contiguous() for x in (q, k, v, g, theta))
        gateloop_step_kernel[(N * H * cdiv(V, 16),)](
            q, k, v, g, theta, real, imaginary, o, out_real, out_imaginary, scale,
            K=K, V=V, BK=padded(K), BV=16, num_warps=4,
        )  # fmt: skip
    return o


def variants():
    """Representative compilations, tiled as launched: (name, kernel, signature, constexprs, options)."""
    narrow = ("q", "k", "v", "o", "q2", "k2", "dq2", "dk2", "dq", "dk")
    for kind in ("bf16", "fp16", "fp32"):
        known = dict.fromkeys(narrow, f"*{kind}") | {"M": "i32", "scale": "fp32"}
        for kernel in (turn_kernel, turn_gradient_kernel, gateloop_step_kernel):
            sizes = dict(K=128, V=256, R=ROWS, BK=128, BV=16)
            constants = {name: x for name, x in sizes.items() if name in kernel.arg_names}
            kinds = known | dict.fromkeys(constants, "constexpr")
            signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
            yield f"{kernel.fn.__name__}-{kind}", kernel, signature, constants, {"num_warps": 4}
