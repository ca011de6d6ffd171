"""Blocks of a chunkwise scan: which tokens a program owns, and products of what decays."""

import triton
import triton.language as tl


@triton.jit
def find_segment(i_s, cu_seqlens, T, L, N, BS: tl.constexpr, PACKED: tl.constexpr):
    """The sequence and the place in it of segment i_s, when every sequence is cut into segments of L tokens.

    An empty sequence has one segment of no token, so that somebody passes its state through. With PACKED only
    the device knows how many segments there are: a program past the last one gets i_n >= N and must return.

    Returns:
        i_n, sequence; i_j, its segment; first, row of the sequence's first token (int64); length, its tokens.
    """
    if PACKED:
        o_n = tl.arange(0, BS)
        b_first = tl.load(cu_seqlens + o_n, mask=o_n < N, other=0).to(tl.int64)
        b_len = tl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=0).to(tl.int64) - b_first
        b_count = tl.where(o_n < N, tl.maximum((b_len + L - 1) // L, 1), 0)
        b_done = tl.cumsum(b_count, 0)
        i_n = tl.sum((b_done <= i_s).to(tl.int32), 0)
        i_j = i_s - tl.sum(tl.where(b_done <= i_s, b_count, 0), 0).to(tl.int32)
        first = tl.sum(tl.where(o_n == i_n, b_first, 0), 0)
        length = tl.sum(tl.where(o_n == i_n, b_len, 0), 0).to(tl.int32)
    else:
        count = (T + L - 1) // L
        i_n = i_s // count
        i_j = i_s - i_n * count
        first = i_n.to(tl.int64) * T
        length = T
    return i_n, i_j, first, length


@triton.jit
def dot_wide(a, b, DTYPE: tl.constexpr):
    """a @ b for factors that may leave float16's range: float16 is multiplied as TF32, others as they are."""
    if DTYPE == tl.float16:
        # as many bits of mantissa as float16, as many of exponent as float32
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        c = tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")
    return c
