"""One token of mLSTM: gates, memory, normaliser and read-out in one launch."""

import triton
import triton.language as tl

from effattn_lite.kernels.mlstm_state import bound, log_sigmoid


@triton.jit
def mlstm_step_kernel(
    q, k, v, i, f, C0, n0, m0, o, C1, n1, m1, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o [N, H, V] and the next state, in place too.

    One program a sequence and head: it alone reads n and m, so it may write them where they were.
    """
    i_nh = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_q = tl.load(q + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32) * scale
    b_k = tl.load(k + i_nh * K + o_k, mask=m_k, other=0).to(tl.float32)
    b_i, b_m = tl.load(i + i_nh).to(tl.float32), tl.load(m0 + i_nh)
    faded = b_m + log_sigmoid(tl.load(f + i_nh).to(tl.float32))
    b_m = tl.maximum(faded, b_i)
    kept, b_k = tl.exp(faded - b_m), b_k * tl.exp(b_i - b_m)
    b_n = tl.load(n0 + i_nh * K + o_k, mask=m_k, other=0) * kept + b_k
    b_r = 1 / tl.maximum(tl.abs(tl.sum(b_q * b_n, 0)), bound(b_m))
    tl.store(n1 + i_nh * K + o_k, b_n, mask=m_k)
    tl.store(m1 + i_nh, b_m)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < V
        o_S, m_S = i_nh * K * V + o_k[:, None] * V + o_v[None, :], m_k[:, None] & m_v[None, :]
        b_v = tl.load(v + i_nh * V + o_v, mask=m_v, other=0).to(tl.float32)
        b_S = tl.load(C0 + o_S, mask=m_S, other=0) * kept + b_k[:, None] * b_v[None, :]
        b_o = tl.sum(b_q[:, None] * b_S, 0) * b_r
        tl.store(o + i_nh * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
        tl.store(C1 + o_S, b_S, mask=m_S)
