"""One token of the delta rule: decay, read the key, write the difference and read the query in one launch."""

import triton
import triton.language as tl


@triton.jit
def delta_step_kernel(
    q, k, v, g, beta, state, o, out_state, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """o [N, HV, V] and the next state, in place too; one program a sequence, value head, tile of V columns.

    GATE: 0 no decay, 1 one a head, 2 one a key channel.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0).to(tl.int64)
    i_nh = i_p // NV
    i_q = i_nh // (HV // H)  # HV is a multiple of H, so sequences need no word of their own
    o_k = tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_S = i_nh * K * V + o_k[:, None] * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    b_q = tl.load(q + i_q * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_k = tl.load(k + i_q * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_v = tl.load(v + i_nh * V + o_v, mask=m_v, other=0).to(tl.float32)
    b_S = tl.load(state + o_S, mask=m_S, other=0)
    if GATE == 1:
        b_S *= tl.exp(tl.load(g + i_nh).to(tl.float32))
    if GATE == 2:
        b_S *= tl.exp(tl.load(g + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32))[:, None]
    b_new = tl.load(beta + i_nh).to(tl.float32) * (b_v - tl.sum(b_k[:, None] * b_S, 0))
    b_S += b_k[:, None] * b_new[None, :]
    b_o = tl.sum(b_q[:, None] * b_S, 0) * scale
    tl.store(o + i_nh * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    tl.store(out_state + o_S, b_S, mask=m_S)
