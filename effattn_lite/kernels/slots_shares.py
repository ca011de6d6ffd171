r"""ABC's gates: every token's share of the running sum of weights e^s, a slot by itself, and their gradient.

.. math:: z_t = \ln(e^{z_{t-1}} + e^{s_t}), \qquad w_t = \sigma(s_t - z_{t-1}), \qquad g_t = \ln(1 - w_t)

z is summed in blocks of tokens by an associative scan; w and g come from the odds of the token against all
before it, so a small share keeps its digits. The gradient needs g alone: with D the gradient of z and
:math:`x_t = s_t - z_{t-1}`, :math:`dx_t = w_t (e^{g_t} dw_t - dg_t)`, :math:`D_{t-1} = e^{g_t} D_t - dx_t`
and :math:`ds_t = dx_t + w_t D_t`, a recurrence from the right.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.common.scan import find_segment

EMPTY = tl.constexpr(1e4)
"""How much less than the first token's weight, in nats, an empty memory weighs."""

NOTHING = tl.constexpr(-1e30)
"""Log of a weight of no token; differences of it are finite."""


@triton.jit
def log_add(a, b):
    """ln(e^a + e^b)."""
    return tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def affine(a, x, b, y):
    """D -> b (a D + x) + y, first the earlier map."""
    return a * b, b * x + y


@triton.jit
def softplus(x):
    """ln(1 + e^x)."""
    b_e = tl.exp(-tl.abs(x))
    # 1 + e is 1 + d, rounded: the logarithm of that, times e / d, has all digits of ln(1 + e)
    b_d = (1 + b_e) - 1
    return tl.maximum(x, 0.0) + tl.where(b_d == 0, b_e, tl.log(1 + b_e) * (b_e / tl.maximum(b_d, 1e-30)))


@triton.jit
def weights_of(p_s, mask):
    """Logs of the tokens' weights, NOTHING where there is no token: float16 itself has no such number."""
    return tl.where(mask, tl.load(p_s, mask=mask, other=0).to(tl.float32), NOTHING)


@triton.jit
def shares_of(s, past):
    """The share of a token of weight e^s after tokens that weigh e^past together, and log(1 - share)."""
    b_x = s - past
    return tl.exp(-softplus(-b_x)), -softplus(b_x)


@triton.jit(do_not_specialize=["T", "N"])
def slots_shares_kernel(
    s, z, c, w, g, out_z, cu_seqlens, T, N,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """w, g [tokens, D] and out_z [N, D] of one sequence and tile of BD of the D = H M slots."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_p = tl.program_id(0)
    o_d = i_p % ND * BD + tl.arange(0, BD)
    o_c = tl.arange(0, C)
    m_d = o_d < D
    # segments as long as the text: one a sequence
    i_n, _, first, length = find_segment(i_p // ND, cu_seqlens, T, tl.maximum(T, 1), N, BS, PACKED)
    if i_n >= N:
        return
    o_z = i_n.to(tl.int64) * D + o_d
    b_z = tl.load(z + o_z, mask=m_d, other=0)
    if length > 0:
        b_first = tl.load(s + first * D + o_d, mask=m_d, other=0).to(tl.float32)
        b_c = tl.load(c + i_n * (D // M) + o_d // M, mask=m_d, other=1)
        b_z = tl.where(b_c > 0, b_z, b_first - EMPTY)
    for i_c in range(0, length, C):
        row = first + i_c + o_c
        mask = (i_c + o_c < length)[:, None] & m_d[None, :]
        p = row[:, None] * D + o_d[None, :]
        b_s = weights_of(s + p, mask)
        # what lies before a token: the block's tokens but one, and all blocks before
        b_one = weights_of(s + p - D, mask & (o_c > 0)[:, None])
        b_past = log_add(tl.associative_scan(b_one, 0, log_add), b_z[None, :])
        b_w, b_g = shares_of(b_s, b_past)
        tl.store(w + p, b_w.to(w.dtype.element_ty), mask=mask)
        tl.store(g + p, b_g, mask=mask)
        # the sum grows: its largest value is the last
        b_z = tl.max(log_add(b_past, b_s), 0)
    tl.store(out_z + o_z, b_z, mask=m_d)


@triton.jit
def shares_step(p_dw, p_dg, p_g, mask):
    """e^g, the share w and dx of tokens; where there is none 1, 0 and 0."""
    b_g = tl.load(p_g, mask=mask, other=0)
    b_keep = tl.exp(b_g)
    # 1 - e^g, by its series where the difference has lost digits
    b_near = -b_g * (1 + b_g / 2 * (1 + b_g / 3 * (1 + b_g / 4)))
    b_w = tl.where(b_g > -0.05, b_near, 1 - b_keep)
    b_dw = tl.load(p_dw, mask=mask, other=0).to(tl.float32)
    return b_keep, b_w, b_w * (b_keep * b_dw - tl.load(p_dg, mask=mask, other=0))


@triton.jit(do_not_specialize=["T", "N"])
def slots_shares_gradient_kernel(
    dw, dg, dz, g, c, ds, out_dz, cu_seqlens, T, N,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """ds [tokens, D] and out_dz [N, D], from the last token to the first; tiles as in the forward."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_p = tl.program_id(0)
    o_d = i_p % ND * BD + tl.arange(0, BD)
    o_c = tl.arange(0, C)
    m_d = o_d < D
    i_n, _, first, length = find_segment(i_p // ND, cu_seqlens, T, tl.maximum(T, 1), N, BS, PACKED)
    if i_n >= N:
        return
    o_z = i_n.to(tl.int64) * D + o_d
    b_D = tl.load(dz + o_z, mask=m_d, other=0)
    for i_c in range(0, length, C):
        # row 0 of a block is its last token
        back = length - 1 - i_c - o_c
        mask = (back >= 0)[:, None] & m_d[None, :]
        p = (first + back)[:, None] * D + o_d[None, :]
        b_keep, b_w, b_dx = shares_step(dw + p, dg + p, g + p, mask)
        # what lies behind a token: the block's tokens but one, and all blocks behind
        behind = ((back >= -1) & (o_c > 0))[:, None] & m_d[None, :]
        b_a, b_no, b_b = shares_step(dw + p + D, dg + p + D, g + p + D, behind)
        b_a, b_b = tl.associative_scan((b_a, -b_b), 0, affine)
        b_after = b_a * b_D[None, :] + b_b
        tl.store(ds + p, (b_dx + b_w * b_after).to(ds.dtype.element_ty), mask=mask)
        b_before = b_keep * b_after - b_dx
        b_D = tl.sum(tl.where((o_c == C - 1)[:, None], b_before, 0.0), 0)
    if length > 0:
        b_c = tl.load(c + i_n * (D // M) + o_d // M, mask=m_d, other=1)
        b_D = tl.where(b_c > 0, b_D, 0.0)
    tl.store(out_dz + o_z, b_D, mask=m_d)
