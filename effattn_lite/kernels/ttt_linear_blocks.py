"""Blocks of the TTT-Linear engine: where a text lies, products, the layer norm and its gradient."""

import triton
import triton.language as tl


@triton.jit
def find_text(i_n, cu_seqlens, T, PACKED: tl.constexpr):
    """Row of sequence i_n's first token (int64) and its number of tokens."""
    if PACKED:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = i_n.to(tl.int64) * T
        length = T
    return first, length


@triton.jit
def mul(a, b, IEEE: tl.constexpr):
    """a @ b of float32 tiles: "ieee", or TF32 where the inputs have 16 bits."""
    return tl.dot(a, b, input_precision="ieee" if IEEE else "tf32")


@triton.jit
def normalise(z, m_k, K: tl.constexpr):
    """Columns of z without their mean, over their standard deviation, and that deviation [1, BT]."""
    z = tl.where(m_k[:, None], z - (tl.sum(z, 0) / K)[None, :], 0.0)
    sigma = tl.sqrt(tl.sum(z * z, 0) / K + 1e-6)[None, :]
    return z / sigma, sigma


@triton.jit
def project(u, z, sigma, m_k, K: tl.constexpr):
    """The layer norm's backward: u without what the norm does not see, over the deviation sigma."""
    u = u - (tl.sum(u, 0) / K)[None, :] - z * (tl.sum(u * z, 0) / K)[None, :]
    return tl.where(m_k[:, None], u / sigma, 0.0)


@triton.jit
def inner_gradient(z, target, gamma, beta, m_k, K: tl.constexpr):
    """Gradient of half the squared error of LN(z) by z; also the error, LN(z)'s core and the deviation."""
    z, sigma = normalise(z, m_k, K)
    e = gamma * z + beta - target
    return project(gamma * e, z, sigma, m_k, K), e, z, sigma


@triton.jit
def gradients(
    b_w, b_b, b_k, b_v, D0, d0, p_W, p_b, j, gamma, beta, m_W, m_k, K: tl.constexpr,
    IEEE: tl.constexpr, HAS_H0: tl.constexpr,
):  # fmt: skip
    """`inner_gradient` of a mini-batch's tokens at the inner model W^T, b that it began with.

    In the first, j = 0, the state's D and d, at D0 + p_W and d0 + p_b, are taken off: it stopped inside it.
    """
    b_z = mul(b_w, b_k, IEEE) + b_b[:, None]
    if HAS_H0:
        if j == 0:
            b_z -= mul(tl.load(D0 + p_W, mask=m_W, other=0), b_k, IEEE)
            b_z -= tl.load(d0 + p_b, mask=m_k, other=0)[:, None]
    return inner_gradient(b_z, b_v - b_k, gamma, beta, m_k, K)
