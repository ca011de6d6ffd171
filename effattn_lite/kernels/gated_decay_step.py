"""One token of linear attention with a decay that it chooses: read, decay and write in one launch."""

import triton
import triton.language as tl


@triton.jit
def gated_decay_step_kernel(
    q, k, v, g, u, state, o, out_state, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, CHANNEL: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    """o [N, H, V] and the next state, in place too; one program a sequence, value head and tile of V columns.

    GROUP value heads share a row of q and k.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_p = tl.program_id(0).to(tl.int64)
    i_nh = i_p // NV
    i_h = i_nh % H
    o_k = tl.arange(0, BK)
    o_v = i_p % NV * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_S = i_nh * K * V + o_k[:, None] * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    b_q = tl.load(q + i_nh // GROUP * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_k = tl.load(k + i_nh // GROUP * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_v = tl.load(v + i_nh * V + o_v, mask=m_v, other=0).to(tl.float32)
    b_S = tl.load(state + o_S, mask=m_S, other=0)
    b_g = tl.load(g + i_nh * K + o_k, mask=m_k, other=0) if CHANNEL else tl.load(g + i_nh + 0 * o_k)
    b_kv = b_k[:, None] * b_v[None, :]
    b_next = b_S * tl.exp(b_g)[:, None] + b_kv
    if BONUS:
        b_u = tl.load(u + i_h * K + o_k, mask=m_k, other=0)
        b_S += b_u[:, None] * b_kv
    else:
        b_S = b_next
    b_o = tl.sum(b_q[:, None] * b_S, 0) * scale
    tl.store(o + i_nh * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    tl.store(out_state + o_S, b_next, mask=m_S)
