"""Tiles of neighbouring tokens, and the list of all blocks of keys that a tile's tokens chose.

A row of a tile is one query head of one token; tokens that are not alone in their tile look up in a mask
which blocks of the list are theirs. Every list is ascending: nothing depends on the order of the programs.
"""

import triton
import triton.language as tl

from effattn_lite.kernels.block_sparse_lists import locate_block


@triton.jit
def token_tile(
    counts, cu_seqlens, tiles, T, Tk, NQ, HS, GS: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The BM rows that this program owns: BT tokens, and as many of the GS query heads of a set as fit.

    Returns:
        i_b, i_s: batch row and set (int64); line: row of its list (int64); whole, every: entries of that.
        bos: its sequence's first token (int64); off, Tk: place of its first query among its Tk keys.
        b_t: token of each row, counted in its sequence; b_h: its query head; live: whether there is one.
    """
    GT: tl.constexpr = GS if GS < BM else BM  # heads of a token in a tile
    PER: tl.constexpr = (GS + GT - 1) // GT
    i_g, i_p = tl.program_id(0) % PER, tl.program_id(0) // PER
    i_t, i_bs = i_p % NQ, (i_p // NQ).to(tl.int64)
    if CAUSAL and not VARLEN:  # later ones first, since they have most to do
        i_t = NQ - 1 - i_t
    i_x, bos, T_n = locate_block(cu_seqlens, tiles, i_t, T, VARLEN)
    off = T_n * 0
    if VARLEN:
        Tk = T_n
    else:
        off = Tk - T
    line = i_bs * NQ + i_t
    whole, every = tl.load(counts + 2 * line), tl.load(counts + 2 * line + 1)
    o_r = tl.arange(0, BM)
    b_t, b_g = i_x * BT + o_r // GT, i_g * GT + o_r % GT
    live = (o_r // GT < BT) & (b_g < GS) & (b_t < T_n)
    b_h = i_bs % HS * GS + b_g
    return i_bs // HS, i_bs % HS, line, whole, every, bos, off, Tk, b_t, b_h, live


@triton.jit(do_not_specialize=["T", "Tk", "NQ", "n", "NK", "CAP"])
def token_sparse_rows_kernel(
    indices, mask, lists, counts, cu_seqlens, tiles, T, Tk, NQ, n, HS, NK, CAP,
    BS: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, INDICES: tl.constexpr,
):  # fmt: skip
    """The list of one tile of BT <= R tokens, [B, HS, NQ, CAP], and its counts (whole, all), [B, HS, NQ, 2].

    Whole are the blocks that lie behind no token of the tile. The mask is [B, HS, T, NK], of uint8. With
    INDICES, block numbers [B, T, HS, n], its rows are written first: whatever comes twice is there once.
    """
    line = tl.program_id(0).to(tl.int64)
    i_s, i_t = line // NQ, (line % NQ).to(tl.int32)  # row of batch and set
    i_x, bos, T_n = locate_block(cu_seqlens, tiles, i_t, T, VARLEN)
    off = T_n * 0
    if VARLEN:
        Tk = T_n
    else:
        off = Tk - T
    o_t, o_c = i_x * BT + tl.arange(0, R), tl.arange(0, C)[None, :]
    live = (tl.arange(0, R) < BT) & (o_t < T_n)
    # blocks of keys before `whole` are behind every token, those from `end` on before all
    whole, end = Tk // BS, tl.minimum(tl.cdiv(Tk, BS), NK)
    b_end = o_t * 0 + end  # [R]
    if CAUSAL:
        whole = tl.minimum((i_x * BT + off + 1) // BS, whole)
        b_end = tl.minimum((o_t + off) // BS + 1, end)
    b_end = tl.where(live, b_end, 0)
    p_mask = (mask + (i_s * T + bos + o_t) * NK)[:, None]
    if INDICES:
        # the whole row: the gradient of the keys reads it too
        for c in range(0, NK, C):
            b_zero = tl.zeros([R, C], tl.uint8)
            tl.store(p_mask + c + o_c, b_zero, mask=live[:, None] & (c + o_c < NK))
        tl.debug_barrier()
        p_index = (indices + ((i_s // HS * T + bos + o_t) * HS + i_s % HS) * n)[:, None]
        for c in range(0, n, C):
            b_i = tl.load(p_index + c + o_c, mask=live[:, None] & (c + o_c < n), other=-1)
            tl.store(p_mask + b_i, tl.full([R, C], 1, tl.uint8), mask=(b_i >= 0) & (b_i < b_end[:, None]))
        tl.debug_barrier()
    lists += line * CAP
    n_whole, n_all = end * 0, end * 0
    o_c = tl.arange(0, C)
    for c in range(0, tl.max(b_end, 0), C):
        b_in = tl.load(p_mask + c + o_c[None, :], mask=c + o_c[None, :] < b_end[:, None], other=0)
        b_any = tl.max(b_in.to(tl.int32), 0)  # [C]
        tl.store(lists + n_all + tl.cumsum(b_any, 0) - 1, c + o_c, mask=b_any > 0)
        n_all += tl.sum(b_any, 0)
        n_whole += tl.sum(tl.where(c + o_c < whole, b_any, 0), 0)
    tl.store(counts + 2 * line, n_whole)
    tl.store(counts + 2 * line + 1, n_all)


@triton.jit(do_not_specialize=["T", "Tk", "NK", "NT", "CAP"])
def token_sparse_columns_kernel(
    mask, lists, counts, cu_seqlens, tiles, T, Tk, NK, NT, CAP,
    BS: tl.constexpr, SETS: tl.constexpr, C: tl.constexpr, J: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The lists of J blocks of keys, [B, HKV, NT, CAP], and their lengths, in counts [B, HKV, NT, 2].

    Entry g T + t is token t of the sequence, in the g-th of the SETS sets of the key head. The mask is
    [B, HKV SETS, T, NK].
    """
    i_p, NC = tl.program_id(0), tl.cdiv(NT, J)
    o_t = i_p % NC * J + tl.arange(0, J)
    i_h = (i_p // NC).to(tl.int64)  # row of batch and key head
    if VARLEN:
        i_n = tl.load(tiles + 2 * o_t, mask=o_t < NT, other=-1)
        o_j = tl.load(tiles + 2 * o_t + 1, mask=o_t < NT, other=0)
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int32)
        b_T = tl.where(i_n < 0, 0, tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1).to(tl.int32) - bos)
        b_Tk = b_T
    else:
        o_j, bos, b_T, b_Tk = o_t, o_t * 0, o_t * 0 + T, tl.where(o_t < NT, Tk, 0)
    live = (o_j * BS < b_Tk) & (o_j < NK)
    lo, hi = o_j * 0, tl.where(live, b_T, 0)
    if CAUSAL:  # the first token that sees something of the block
        lo = tl.maximum(o_j * BS - (b_Tk - b_T), 0)
    begin, end = tl.min(tl.where(live, lo, T), 0), tl.max(hi, 0)
    p_list = lists + (i_h * NT + o_t) * CAP  # [J]
    b_n = o_j * 0
    for g in range(SETS):
        p_row = mask + ((i_h * SETS + g) * T + bos) * NK + o_j  # [J]
        for c in range(begin, end, C):
            b_i = c + tl.arange(0, C)[:, None]
            m_in = (b_i >= lo[None, :]) & (b_i < hi[None, :])
            b_in = tl.load(p_row[None, :] + b_i.to(tl.int64) * NK, mask=m_in, other=0).to(tl.int32)  # [C, J]
            place = b_n[None, :] + tl.cumsum(b_in, 0) - 1
            tl.store(p_list[None, :] + place, g * T + b_i + place * 0, mask=b_in > 0)
            b_n += tl.sum(b_in, 0)
    p_count = counts + (i_h * NT + o_t) * 2
    tl.store(p_count, b_n, mask=o_t < NT)
    tl.store(p_count + 1, b_n * 0, mask=o_t < NT)
