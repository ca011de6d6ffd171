"""Scores of pages: one feature vector a page and key head, times the vectors of that head's queries."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "P", "NT", "NM"])
def page_scores_kernel(
    a, w, s, T, P, NT, NM, H, HKV, a_b, a_t, a_h, w_b, w_p, w_h,
    F: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Scores [BM, BN] of one tile of pages for BM of a key head's T G queries, features BC at a time.

    A score is summed in the same order wherever its page stands, so that equal pages tie: a matrix product
    does so on a GPU, not in the interpreter. Queries may be wider in dtype than the pages' features.
    """
    i_n, i_r = tl.program_id(0) % NT, tl.program_id(0) // NT
    i_m, i_r = i_r % NM, i_r // NM
    i_h, i_b = i_r % HKV, (i_r // HKV).to(tl.int64)
    o_m, o_c, o_p = i_m * BM + tl.arange(0, BM), tl.arange(0, BC), i_n * BN + tl.arange(0, BN)
    o_t, o_h = (o_m // G).to(tl.int64), i_h * G + o_m % G
    a += i_b * a_b + (o_t * a_t + o_h * a_h)[:, None]
    w += i_b * w_b + i_h * w_h + o_p.to(tl.int64)[:, None] * w_p
    b_s = tl.zeros([BM, BN], tl.float32)
    # [sketch:score]
    for c in range(0, F, BC):
        m_c = (c + o_c < F)[None, :]
        b_w = tl.load(w + (c + o_c)[None, :], mask=(o_p < P)[:, None] & m_c, other=0.0)
        b_a = tl.load(a + (c + o_c)[None, :], mask=(o_m < T * G)[:, None] & m_c, other=0.0)
        if DOT:  # [BM, BC] @ [BC, BN] -> [BM, BN]
            b_s = tl.dot(b_a, tl.trans(b_w.to(b_a.dtype)), b_s, input_precision="ieee")
        else:
            b_s += tl.sum(b_a.to(tl.float32)[:, None, :] * b_w.to(tl.float32)[None, :, :], 2)
    # [/sketch:score]
    p_s = s + (((i_b * T + o_t) * H + o_h) * P)[:, None] + o_p[None, :]
    tl.store(p_s, b_s, mask=(o_m < T * G)[:, None] & (o_p < P)[None, :])
