"""Tiles: which one a program works on, how it is loaded and stored, which blocks its rows want."""

import triton
import triton.language as tl


@triton.jit
def load_tile(p, stride, rows, COLS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CUT: tl.constexpr):
    """Tile [R, C] at p of a matrix of COLS columns, rows `stride` apart; CUT: only `rows` rows are left."""
    o_r, o_c = tl.arange(0, R), tl.arange(0, C)
    p_x = p + o_r[:, None] * stride + o_c[None, :]
    if CUT:
        return tl.load(p_x, mask=(o_r[:, None] < rows) & (o_c[None, :] < COLS), other=0.0)
    elif COLS < C:
        return tl.load(p_x, mask=o_c[None, :] < COLS, other=0.0)
    else:
        return tl.load(p_x)


@triton.jit
def store_tile(p, b_x, stride, rows, COLS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Store tile b_x [R, C] at p, its first `rows` rows and COLS columns, in the dtype of the memory."""
    o_r, o_c = tl.arange(0, R), tl.arange(0, C)
    p_x = p + o_r[:, None] * stride + o_c[None, :]
    tl.store(p_x, b_x.to(p.dtype.element_ty), mask=(o_r[:, None] < rows) & (o_c[None, :] < COLS))


@triton.jit
def load_rows(p_x, live, COLS: tl.constexpr, C: tl.constexpr):
    """Rows at the pointers p_x [R], wherever they lie, as a tile [R, C]; 0 where a row is not live."""
    o_c = tl.arange(0, C)[None, :]
    return tl.load(p_x[:, None] + o_c, mask=live[:, None] & (o_c < COLS), other=0.0)


@triton.jit
def store_rows(p_x, b_x, live, COLS: tl.constexpr, C: tl.constexpr):
    """Store a tile [R, C] row by row at the pointers p_x [R], in the dtype of the memory."""
    o_c = tl.arange(0, C)[None, :]
    tl.store(p_x[:, None] + o_c, b_x.to(p_x.dtype.element_ty), mask=live[:, None] & (o_c < COLS))


@triton.jit
def locate(cu_seqlens, tiles, Tq, Tk, NT, VARLEN: tl.constexpr, REVERSE: tl.constexpr):
    """This program's tile and sequence: (row of batch and head, tile, first token, Tq, Tk).

    With VARLEN the tile comes from the table of `launch.tile_table`; a tile of no sequence has Tq = Tk = 0.
    REVERSE: later tiles first, since the causal ones cost most.
    """
    i_p = tl.program_id(0)
    i_t, i_bh = i_p % NT, i_p // NT
    if VARLEN:
        i_n = tl.load(tiles + 2 * i_t)
        i_t = tl.load(tiles + 2 * i_t + 1)
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int64)
        eos = tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1).to(tl.int64)
        T = tl.where(i_n < 0, 0, eos - bos).to(tl.int32)
        return i_bh, i_t, bos, T, T
    else:
        if REVERSE:
            i_t = NT - 1 - i_t
        return i_bh, i_t, i_bh.to(tl.int64) * 0, Tq, Tk


@triton.jit
def inner_blocks(lo_any, lo_all, hi_all, hi_any, end, BLOCK: tl.constexpr):
    """Blocks that some or all rows of a tile want, each row wanting a range.

    Given are the ranges' smallest and largest beginning, smallest and largest end, and the end of all.
    Returns block numbers a <= b <= c <= d: [a, d) is wanted by some row, [b, c) wholly by every row.
    """
    a = tl.maximum(lo_any, 0) // BLOCK
    d = tl.maximum(tl.cdiv(tl.maximum(tl.minimum(hi_any, end), 0), BLOCK), a)
    b = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(lo_all, 0), BLOCK), a), d)
    c = tl.maximum(tl.minimum(tl.maximum(tl.minimum(hi_all, end), 0) // BLOCK, d), b)
    return a, b, c, d


@triton.jit
def edge_block(n, before, a, b, c):
    """Number of the n-th block that not every row wants whole: `before` from 0 on, [a, b), then c on."""
    i = tl.where(n < before, n, n - before + a)
    return tl.where(i < b, i, i - b + c)
