"""One token of a selective scan: fade, write and read in one launch."""

import triton
import triton.language as tl

from effattn_lite.kernels.selective_scan_token import factor, load_token, strength


@triton.jit
def selective_scan_step_kernel(
    q, k, v, w, A, D, state, o, out_state, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RATED: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """o [N, H, V] and the next state, in place too; one program a sequence, head and tile of V columns."""
    NV: tl.constexpr = (V + BV - 1) // BV
    SK: tl.constexpr = 1 if RATED else V
    SV: tl.constexpr = K if RATED else 1
    i_p = tl.program_id(0).to(tl.int64)
    i_nh = i_p // NV
    o_k = tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    o_h = o_k[:, None] * SK + o_v[None, :] * SV
    b_k, b_v, b_w = load_token(k, v, w, i_nh, True, o_k, o_v, K, V)
    b_q = tl.load(q + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_A = tl.zeros([BK, BV], tl.float32)
    if RATED:
        b_A = tl.load(A + o_k[:, None] * V + o_v[None, :], mask=m_S, other=0)
    b_e = strength(b_k, b_w, RATED)
    b_S = tl.load(state + i_nh * K * V + o_h, mask=m_S, other=0)
    b_S = b_S * factor(b_A, b_k, b_e, RATED) + b_k[:, None] * (b_e * b_v)[None, :]
    b_o = tl.sum(b_q[:, None] * b_S, 0) * scale
    if SKIP:
        b_o += tl.load(D + o_v, mask=m_v, other=0) * b_v
    tl.store(o + i_nh * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    tl.store(out_state + i_nh * K * V + o_h, b_S, mask=m_S)
