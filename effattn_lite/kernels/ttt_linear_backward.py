r"""Gradients of TTT-Linear: mini-batches from right to left, each from the inner model it began with.

That model is not kept: the forward left one every few mini-batches. A program makes those between two of
them again, from left to right, into memory of its own, then goes back through them.

With P the argument of the second layer norm, :math:`\Delta = \eta \odot g` and
:math:`M = (Q K^\top + 1) \odot [i \ge j]`, from dP and the gradients (G, G_b) of the model that leaves:

.. math:: d\Delta = -M^\top dP - K G - 1 G_b^\top, \qquad dA = -(dP\,\Delta^\top) \odot [i \ge j], \qquad
    dg = \eta \odot d\Delta

g is itself a gradient through a layer norm, a projection over a deviation, so dg goes once more through the
same projection (it is symmetric), and to the normalised z and the deviation that it depends on.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.ttt_linear_blocks import (
    find_text,
    gradients,
    mul,
    normalise,
    project,
)


@triton.jit
def second_order(b_dg, b_g, b_e, b_z, sigma, gamma, m_k, K: tl.constexpr):
    """From the gradient by g, those by the inner error e, the norm's argument, and gamma (one a token)."""
    b_u = gamma * b_e
    b_du = project(b_dg, b_z, sigma, m_k, K)
    b_de = gamma * b_du
    # by the normalised z: through the projection's last term, and through e
    b_dz = gamma * b_de
    b_dz -= (b_dg * (tl.sum(b_u * b_z, 0) / K)[None, :] + b_u * (tl.sum(b_dg * b_z, 0) / K)[None, :]) / sigma
    b_dZ = project(b_dz, b_z, sigma, m_k, K) - b_z * (tl.sum(b_g * b_dg, 0) / K)[None, :] / sigma
    return b_de, b_dZ, b_du * b_e + b_de * b_z


@triton.jit
def leave(
    b_k, b_dZ, dD1, dd1, dD0, dd0, p_Wt, p_b, m_W, m_k, over, IEEE: tl.constexpr, HAS_DHT: tl.constexpr
):
    """Store the gradient of the state's D and d, since W' is W less D; over: the text ends in j = 0 too."""
    b_D, b_d = -mul(b_k, tl.trans(b_dZ), IEEE), -tl.sum(b_dZ, 1)
    if HAS_DHT:
        b_D += tl.load(dD1 + p_Wt, mask=m_W & over, other=0)
        b_d += tl.load(dd1 + p_b, mask=m_k & over, other=0)
    tl.store(dD0 + p_Wt, b_D, mask=m_W)
    tl.store(dd0 + p_b, b_d, mask=m_k)


@triton.jit
def remake(
    k, v, eta, D0, d0, q_W, q_b, b_w, b_b, gamma, beta, first, length, c, i_h, j0, count, p_W, p_b, o_x, o_W,
    m_W, o_t, o_k, m_k, H: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, IEEE: tl.constexpr,
    HAS_H0: tl.constexpr,
):  # fmt: skip
    """Store at q_W and q_b the models that `count` mini-batches begin with, from j0's (W^T, b) on."""
    for i in range(0, count):
        j = j0 + i
        tl.store(q_W + i * K * K + o_W, b_w, mask=m_W)
        tl.store(q_b + i * K + o_k, b_b, mask=m_k)
        t = j * SIZE - c + o_t
        m_t = (o_t < SIZE) & (t >= 0) & (t < length)
        m_x = m_t[None, :] & m_k[:, None]
        row0 = (first + j * SIZE - c) * H + i_h
        x0 = row0 * K
        b_k = tl.load(k + x0 + o_x, mask=m_x, other=0).to(tl.float32)
        b_v = tl.load(v + x0 + o_x, mask=m_x, other=0).to(tl.float32)
        b_g, _, _, _ = gradients(
            b_w, b_b, b_k, b_v, D0, d0, p_W, p_b, j, gamma, beta, m_W, m_k, K, IEEE, HAS_H0
        )
        b_h = b_g * tl.load(eta + row0 + o_t * H, mask=m_t, other=0)[None, :]
        b_w -= mul(b_h, tl.trans(b_k), IEEE)
        b_b -= tl.sum(b_h, 1)


@triton.jit(do_not_specialize=["T", "N", "every"])
def ttt_linear_backward_kernel(
    q, k, v, eta, ln_weight, ln_bias, D0, d0, c0, do, dS1, ds1, dD1, dd1, kept_W, kept_b, made_W, made_b,
    dq, dk, dv, deta, dln_weight, dln_bias, dS0, ds0, dD0, dd0, cu_seqlens,
    T, N, every, H: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, HAS_DHT: tl.constexpr,
):  # fmt: skip
    """All gradients of one sequence and head; those of ln_weight and ln_bias, dS0 and ds0 are [N, H, ...].

    made_W [N, H, every, K, K] and made_b [N, H, every, K] are this program's memory.
    """
    i_n, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    first, length = find_text(i_n, cu_seqlens, T, PACKED)
    i_nh = i_n.to(tl.int64) * H + i_h
    o_k = tl.arange(0, BK)
    o_t = tl.arange(0, BT)
    m_k = o_k < K
    # a tile's offsets from the mini-batch's first token, which may lie before the text
    o_x = o_k[:, None] + o_t[None, :] * (H * K)
    # tokens are columns, as in the forward; W^T lies at o_W, W at o_Wt
    o_W, m_W = o_k[:, None] + o_k[None, :] * K, m_k[:, None] & m_k[None, :]
    o_Wt = o_k[:, None] * K + o_k[None, :]
    gamma = tl.load(ln_weight + i_h * K + o_k, mask=m_k, other=0)[:, None]
    beta = tl.load(ln_bias + i_h * K + o_k, mask=m_k, other=0)[:, None]
    IEEE: tl.constexpr = k.dtype.element_ty == tl.float32
    p_W, p_Wt, p_b = i_nh * K * K + o_W, i_nh * K * K + o_Wt, i_nh * K + o_k
    b_Gb = tl.zeros([BK], tl.float32)
    b_dgamma, b_dbeta = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    c = tl.load(c0 + i_n) if HAS_H0 else 0
    # a text that ends inside a mini-batch gives back the steps of that one, W less W'
    ends = (length > 0) & ((length + c) % SIZE != 0)
    if HAS_DHT:
        b_G = tl.load(dS1 + p_Wt, mask=m_W, other=0) + tl.load(dD1 + p_Wt, mask=m_W & ends, other=0)
        b_Gb += tl.load(ds1 + p_b, mask=m_k, other=0) + tl.load(dd1 + p_b, mask=m_k & ends, other=0)
        if HAS_H0:  # a branch of its own: without it dD0 is None, which a condition known late would compile
            if length == 0:
                tl.store(dD0 + p_Wt, tl.load(dD1 + p_Wt, mask=m_W, other=0), mask=m_W)
                tl.store(dd0 + p_b, tl.load(dd1 + p_b, mask=m_k, other=0), mask=m_k)
    else:
        b_G = tl.zeros([BK, BK], tl.float32)
    # the gradient of the model, G, stays in dS0: registers are full without it
    tl.store(dS0 + p_Wt, b_G, mask=m_W)
    batches = tl.where(length > 0, (length + c + SIZE - 1) // SIZE, 0)
    slot = first // (SIZE * every) + 2 * i_n
    q_W, q_b = made_W + i_nh * every * K * K, made_b + i_nh * every * K
    for i_g in range(0, (batches + every - 1) // every):
        group = (batches - 1) // every - i_g
        count = tl.minimum(batches - group * every, every)
        i_kept = (slot + group) * H + i_h
        b_w = tl.load(kept_W + i_kept * K * K + o_W, mask=m_W, other=0)
        b_b = tl.load(kept_b + i_kept * K + o_k, mask=m_k, other=0)
        remake(
            k, v, eta, D0, d0, q_W, q_b, b_w, b_b, gamma, beta, first, length, c, i_h, group * every, count,
            p_W, p_b, o_x, o_W, m_W, o_t, o_k, m_k, H, K, SIZE, IEEE, HAS_H0,
        )  # fmt: skip
        # what one thread stored another reads
        tl.debug_barrier()
        for i_b in range(0, count):
            i = count - 1 - i_b
            j = group * every + i
            t = j * SIZE - c + o_t
            m_t = (o_t < SIZE) & (t >= 0) & (t < length)
            m_x = m_t[None, :] & m_k[:, None]
            row0 = (first + j * SIZE - c) * H + i_h
            x0 = row0 * K
            b_k = tl.load(k + x0 + o_x, mask=m_x, other=0).to(tl.float32)
            b_eta = tl.load(eta + row0 + o_t * H, mask=m_t, other=0)[None, :]
            # 1 the forward again
            b_v = tl.load(v + x0 + o_x, mask=m_x, other=0).to(tl.float32)
            b_w = tl.load(q_W + i * K * K + o_W, mask=m_W, other=0)
            b_b = tl.load(q_b + i * K + o_k, mask=m_k, other=0)
            b_g, _, _, _ = gradients(
                b_w, b_b, b_k, b_v, D0, d0, p_W, p_b, j, gamma, beta, m_W, m_k, K, IEEE, HAS_H0
            )
            b_h = b_eta * b_g
            b_q = tl.load(q + x0 + o_x, mask=m_x, other=0).to(tl.float32)
            # rows j, columns i: what token i reads of the step of token j
            see = o_t[:, None] <= o_t[None, :]
            b_A = tl.where(see, mul(tl.trans(b_k), b_q, IEEE) + 1, 0.0)
            b_p, sigma_p = normalise(mul(b_w, b_q, IEEE) + b_b[:, None] - mul(b_h, b_A, IEEE), m_k, K)
            # 2 the read-out
            b_do = tl.load(do + x0 + o_x, mask=m_x, other=0).to(tl.float32)
            b_dgamma, b_dbeta = b_dgamma + tl.sum(b_do * b_p, 1), b_dbeta + tl.sum(b_do, 1)
            b_dP = project(b_do * gamma, b_p, sigma_p, m_k, K)
            b_dA = tl.where(see, -mul(tl.trans(b_h), b_dP, IEEE), 0.0)
            b_wt = tl.load(q_W + i * K * K + o_Wt, mask=m_W, other=0)
            b_dq = b_do + mul(b_wt, b_dP, IEEE) + mul(b_k, b_dA, IEEE)
            tl.store(dq + x0 + o_x, b_dq.to(dq.dtype.element_ty), mask=m_x)
            # 3 the steps, and the model that the first token reads
            b_dh = -mul(b_dP, tl.trans(b_A), IEEE) - b_Gb[:, None]
            b_dh -= mul(tl.load(dS0 + p_W, mask=m_W, other=0), b_k, IEEE)
            b_dh = tl.where(m_x, b_dh, 0.0)
            b_G = tl.load(dS0 + p_Wt, mask=m_W, other=0)
            b_dk = mul(b_q, tl.trans(b_dA), IEEE) - mul(b_G, b_h, IEEE)
            b_Gb += tl.sum(b_dP, 1)
            # every thread has read G before one writes it
            tl.debug_barrier()
            tl.store(dS0 + p_Wt, b_G + mul(b_q, tl.trans(b_dP), IEEE), mask=m_W)
            # 4 the inner gradient, once more: what it is made of would not stay in registers until here
            b_v = tl.load(v + x0 + o_x, mask=m_x, other=0).to(tl.float32)
            b_w = tl.load(q_W + i * K * K + o_W, mask=m_W, other=0)
            b_g, b_e, b_z, sigma = gradients(
                b_w, b_b, b_k, b_v, D0, d0, p_W, p_b, j, gamma, beta, m_W, m_k, K, IEEE, HAS_H0
            )
            tl.store(deta + row0 + o_t * H, tl.sum(b_dh * b_g, 0), mask=m_t)
            b_de, b_dZ, b_dg = second_order(b_eta * b_dh, b_g, b_e, b_z, sigma, gamma, m_k, K)
            b_dgamma, b_dbeta = b_dgamma + tl.sum(b_dg, 1), b_dbeta + tl.sum(b_de, 1)
            tl.store(dv + x0 + o_x, (-b_de).to(dv.dtype.element_ty), mask=m_x)
            b_wt = tl.load(q_W + i * K * K + o_Wt, mask=m_W, other=0)
            b_dk += b_de + mul(b_wt, b_dZ, IEEE)
            # 5 the model at the mini-batch's start
            if HAS_H0:
                if j == 0:
                    b_dk -= mul(tl.load(D0 + p_Wt, mask=m_W, other=0), b_dZ, IEEE)
                    over = ends & (batches == 1)
                    leave(b_k, b_dZ, dD1, dd1, dD0, dd0, p_Wt, p_b, m_W, m_k, over, IEEE, HAS_DHT)
            tl.store(dk + x0 + o_x, b_dk.to(dk.dtype.element_ty), mask=m_x)
            tl.debug_barrier()
            b_G = tl.load(dS0 + p_Wt, mask=m_W, other=0) + mul(b_k, tl.trans(b_dZ), IEEE)
            b_Gb += tl.sum(b_dZ, 1)
            if HAS_DHT:
                if ends & (j == batches - 1):
                    b_G -= tl.load(dD1 + p_Wt, mask=m_W, other=0)
                    b_Gb -= tl.load(dd1 + p_b, mask=m_k, other=0)
            tl.debug_barrier()
            tl.store(dS0 + p_Wt, b_G, mask=m_W)
            tl.debug_barrier()
        tl.debug_barrier()
    tl.store(ds0 + p_b, b_Gb, mask=m_k)
    tl.store(dln_weight + p_b, b_dgamma, mask=m_k)
    tl.store(dln_bias + p_b, b_dbeta, mask=m_k)
