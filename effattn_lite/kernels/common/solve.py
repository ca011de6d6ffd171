"""Blocks that solve a triangular system by products of matrices."""

import triton
import triton.language as tl


@triton.jit
def unit_inverse(b_A, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of b_A [C, C] float32, strictly lower or strictly upper triangular; C at most 64.

    Blocks of 2, 4, 8, ... on the diagonal are inverted one after the other: two neighbours with inverses P
    and Q, joined by a block B off the diagonal, have -Q B P there. Every number on the way is an entry of a
    true inverse, so nothing grows that must cancel later, as powers of A would.
    """
    o_c = tl.arange(0, C)
    row, col = o_c[:, None], o_c[None, :]
    b_M = tl.where(row == col, 1.0, tl.where(row // 2 == col // 2, -b_A, 0.0))
    for i in tl.static_range(1, 6):
        if (2 << i) <= C:
            joins = (row // (2 << i) == col // (2 << i)) & (row // (1 << i) != col // (1 << i))
            b_X = tl.dot(b_M, tl.where(joins, b_A, 0.0), input_precision=PRECISION)
            b_M -= tl.dot(b_X, b_M, input_precision=PRECISION)  # [C, C] @ [C, C]
    return b_M
