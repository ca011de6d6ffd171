"""One token: read with a, fade, write the answer and the value, read the query, in one launch."""

import triton
import triton.language as tl


@triton.jit
def dplr_step_kernel(
    q, k, v, g, a, b, state, o, out_state, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o [N, H, V] and the next state, in place too; one program a sequence, head and tile of V columns."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0).to(tl.int64)
    i_nh = i_p // NV
    o_k = tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_S = i_nh * K * V + o_k[:, None] * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    b_q = tl.load(q + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_k = tl.load(k + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_g = tl.load(g + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_a = tl.load(a + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_b = tl.load(b + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_v = tl.load(v + i_nh * V + o_v, mask=m_v, other=0).to(tl.float32)
    b_S = tl.load(state + o_S, mask=m_S, other=0)
    b_y = tl.sum(b_a[:, None] * b_S, 0)
    b_S = tl.exp(b_g)[:, None] * b_S + b_b[:, None] * b_y[None, :] + b_k[:, None] * b_v[None, :]
    b_o = tl.sum(b_q[:, None] * b_S, 0) * scale
    tl.store(o + i_nh * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    tl.store(out_state + o_S, b_S, mask=m_S)
