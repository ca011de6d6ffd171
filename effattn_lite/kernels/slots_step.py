"""One token of attention to memory slots: both memories, the softmax and, for averages, the shares."""

import triton
import triton.language as tl

from effattn_lite.kernels.slots_shares import EMPTY, log_add, shares_of


@triton.jit
def slots_step_kernel(
    q, k, v, s, g, Sk, Sv, z, c, o, out_Sk, out_Sv, out_z, out_c, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """o [N, H, V] and the next state, in place too; one program a sequence and head.

    AVERAGE: s is the log of a weight, g is not read, and z and c are carried.
    """
    i_nh = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, BM)
    m_m = o_m < M
    b_s = tl.load(s + i_nh * M + o_m, mask=m_m, other=0).to(tl.float32)
    if AVERAGE:
        b_c = tl.load(c + i_nh)
        b_z = tl.load(z + i_nh * M + o_m, mask=m_m, other=0)
        b_z = tl.where(b_c > 0, b_z, b_s - EMPTY)
        tl.store(out_z + i_nh * M + o_m, log_add(b_z, b_s), mask=m_m)
        tl.store(out_c + i_nh, b_c + 1)
        b_s, b_g = shares_of(b_s, b_z)
        b_s = tl.where(m_m, b_s, 0.0)
    else:
        b_g = tl.load(g + i_nh * M + o_m, mask=m_m, other=0)
    b_keep = tl.exp(b_g)
    b_x = tl.zeros([BM], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_S = i_nh * K * M + o_k[:, None] * M + o_m[None, :]
        m_S = (o_k < K)[:, None] & m_m[None, :]
        b_q = tl.load(q + i_nh * K + o_k, mask=o_k < K, other=0).to(tl.float32)
        b_k = tl.load(k + i_nh * K + o_k, mask=o_k < K, other=0).to(tl.float32)
        b_S = tl.load(Sk + p_S, mask=m_S, other=0) * b_keep[None, :] + b_k[:, None] * b_s[None, :]
        tl.store(out_Sk + p_S, b_S, mask=m_S)
        b_x += tl.sum(b_q[:, None] * b_S, 0)
    b_x = tl.where(m_m, b_x * scale, float("-inf"))
    b_p = tl.exp(b_x - tl.max(b_x, 0))
    b_p = b_p / tl.sum(b_p, 0)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        p_S = i_nh * M * V + o_m[:, None] * V + o_v[None, :]
        m_S = m_m[:, None] & (o_v < V)[None, :]
        b_v = tl.load(v + i_nh * V + o_v, mask=o_v < V, other=0).to(tl.float32)
        b_S = tl.load(Sv + p_S, mask=m_S, other=0) * b_keep[:, None] + b_s[:, None] * b_v[None, :]
        tl.store(out_Sv + p_S, b_S, mask=m_S)
        b_o = tl.sum(b_p[:, None] * b_S, 0)
        tl.store(o + i_nh * V + o_v, b_o.to(o.dtype.element_ty), mask=o_v < V)
