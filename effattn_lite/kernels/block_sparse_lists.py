"""Lists of chosen blocks: those that a block of queries chose, and those that chose a block of keys.

A pair of blocks is whole if every query of the one sees every key of the other: it needs no mask inside. The
lists keep whole pairs apart from the others, so that one loop runs over these and a second one over those.
Every list is ascending, so nothing depends on the order in which programs run.
"""

import triton
import triton.language as tl


@triton.jit
def locate_block(cu_seqlens, tiles, i_t, T, VARLEN: tl.constexpr):
    """Of the i_t-th block: its number in its sequence, the sequence's first token (int64) and length.

    With VARLEN blocks are looked up in the table of `launch.tile_table`; one of no sequence has length 0.
    """
    if VARLEN:
        i_n = tl.load(tiles + 2 * i_t)
        i_x = tl.load(tiles + 2 * i_t + 1)
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int64)
        eos = tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1).to(tl.int64)
        return i_x, bos, tl.where(i_n < 0, 0, eos - bos).to(tl.int32)
    else:
        return i_t, tl.cast(i_t, tl.int64) * 0, T


@triton.jit
def query_tile(
    counts, cu_seqlens, tiles, T, NQ, H, GS,
    QS: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The tile of queries that this program owns, at most BM of one block; GS heads share a set.

    Returns:
        i_b, i_h: batch row and head (int64); line: row of its list (int64); whole, every: entries of that.
        bos, T: its sequence's first token (int64) and length; first: position of the first query; rows.
    """
    PER: tl.constexpr = (QS + BM - 1) // BM  # tiles of a block
    i_t, i_bh = tl.program_id(0) % (NQ * PER), (tl.program_id(0) // (NQ * PER)).to(tl.int64)
    if CAUSAL and not VARLEN:  # later ones first, since they have most to do
        i_t = NQ * PER - 1 - i_t
    i_r, i_m = i_t // PER, i_t % PER * BM
    i_x, bos, T = locate_block(cu_seqlens, tiles, i_r, T, VARLEN)
    line = i_bh // GS * NQ + i_r
    whole, every = tl.load(counts + 2 * line), tl.load(counts + 2 * line + 1)
    first = i_x * QS + i_m
    rows = tl.minimum(QS - i_m, T - first)
    return i_bh // H, i_bh % H, line, whole, every, bos, T, first, rows


@triton.jit(do_not_specialize=["T", "NQ", "R", "n", "NK", "CAP"])
def block_sparse_rows_kernel(
    indices, mask, lists, counts, cu_seqlens, tiles, T, NQ, R, n, HS, NK, CAP,
    BS: tl.constexpr, QS: tl.constexpr, C: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, INDICES: tl.constexpr,
):  # fmt: skip
    """The list of one block of queries, [B, HS, NQ, CAP], and its counts (whole, all), [B, HS, NQ, 2].

    The mask is [B, HS, R, NK], of uint8. With INDICES, block numbers [B, R, HS, n], its row is written first:
    whatever comes twice is then there once.
    """
    line = tl.program_id(0).to(tl.int64)
    i_r = (line % NQ).to(tl.int32)
    i_x, bos, T = locate_block(cu_seqlens, tiles, i_r, T, VARLEN)
    # blocks of keys before `whole` are seen by every query, those from `end` on by none
    whole, end = T // BS, tl.cdiv(T, BS)
    if CAUSAL:
        whole = tl.minimum((i_x * QS + 1) // BS, whole)
        end = tl.cdiv(tl.minimum(i_x * QS + QS, T), BS)
    end = tl.where((i_r < R) & (i_x * QS < T), tl.minimum(end, NK), 0)
    o_c = tl.arange(0, C)
    i_s = line // NQ  # row of batch and set
    mask += (i_s * R + i_r) * NK
    if INDICES:
        for c in range(0, end, C):
            tl.store(mask + c + o_c, tl.zeros([C], tl.uint8), mask=c + o_c < end)
        tl.debug_barrier()
        indices += ((i_s // HS * R + i_r) * HS + i_s % HS) * n
        for c in range(0, n, C):
            b_i = tl.load(indices + c + o_c, mask=(c + o_c < n) & (i_r < R), other=-1)
            tl.store(mask + b_i, tl.full([C], 1, tl.uint8), mask=(b_i >= 0) & (b_i < end))
        tl.debug_barrier()
    lists += line * CAP
    n_whole, n_all = end * 0, end * 0
    for c in range(0, end, C):
        b_in = tl.load(mask + c + o_c, mask=c + o_c < end, other=0).to(tl.int32)
        tl.store(lists + n_all + tl.cumsum(b_in, 0) - 1, c + o_c, mask=b_in > 0)
        n_all += tl.sum(b_in, 0)
        n_whole += tl.sum(tl.where(c + o_c < whole, b_in, 0), 0)
    tl.store(counts + 2 * line, n_whole)
    tl.store(counts + 2 * line + 1, n_all)


@triton.jit(do_not_specialize=["T", "NQ", "R", "NK", "NT", "CAP"])
def block_sparse_columns_kernel(
    mask, lists, counts, cu_seqlens, tiles, rows, T, NQ, R, NK, NT, CAP,
    BS: tl.constexpr, QS: tl.constexpr, SETS: tl.constexpr, C: tl.constexpr, J: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The lists of J blocks of keys, [B, HKV, NT, CAP], and their counts (whole, others), [B, HKV, NT, 2].

    Entry g NQ + i is block i of the queries, in the g-th of the SETS sets of the key head. Whole pairs fill
    a list from its front, the others from its back.

    Args:
        mask: [B, HKV SETS, R, NK].
        rows: first row of each packed sequence in the mask, [N].
    """
    i_p, NC = tl.program_id(0), tl.cdiv(NT, J)
    o_t = i_p % NC * J + tl.arange(0, J)
    i_h = (i_p // NC).to(tl.int64)  # row of batch and key head
    if VARLEN:
        i_n = tl.load(tiles + 2 * o_t, mask=o_t < NT, other=-1)
        o_j = tl.load(tiles + 2 * o_t + 1, mask=o_t < NT, other=0)
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int32)
        b_T = tl.where(i_n < 0, 0, tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1).to(tl.int32) - bos)
        o_r = tl.load(rows + tl.maximum(i_n, 0))
    else:
        o_j, b_T, o_r = o_t, tl.where(o_t < NT, T, 0), o_t * 0
    # the blocks of queries that see something of the keys, and those that see all of them
    lo, hi = o_j * 0, tl.cdiv(b_T, QS)
    whole_lo, whole_hi = lo, b_T // QS
    if CAUSAL:
        lo, whole_lo = o_j * BS // QS, tl.cdiv(o_j * BS + BS - 1, QS)
    live = (o_j * BS < b_T) & (o_j < NK)
    hi = tl.where(live, tl.minimum(hi, R - o_r), 0)
    begin, end = tl.min(tl.where(live, lo, NQ), 0), tl.max(hi, 0)
    p_list = lists + (i_h * NT + o_t) * CAP  # [J]
    n_whole, n_rest = o_j * 0, o_j * 0
    for g in range(SETS):
        p_row = mask + ((i_h * SETS + g) * R + o_r) * NK + o_j  # [J]
        for c in range(begin, end, C):
            o_i = c + tl.arange(0, C)[:, None]
            m_in = (o_i >= lo[None, :]) & (o_i < hi[None, :])
            b_in = tl.load(p_row[None, :] + o_i.to(tl.int64) * NK, mask=m_in, other=0).to(tl.int32)  # [C, J]
            m_whole = (o_i >= whole_lo[None, :]) & (o_i < whole_hi[None, :])
            b_whole = tl.where(m_whole, b_in, 0)
            b_rest = b_in - b_whole
            front = n_whole[None, :] + tl.cumsum(b_whole, 0) - 1
            back = CAP - n_rest[None, :] - tl.cumsum(b_rest, 0)
            place = tl.where(m_whole, front, back)
            tl.store(p_list[None, :] + place, g * NQ + o_i + place * 0, mask=b_in > 0)
            n_whole += tl.sum(b_whole, 0)
            n_rest += tl.sum(b_rest, 0)
    p_count = counts + (i_h * NT + o_t) * 2
    tl.store(p_count, n_whole, mask=o_t < NT)
    tl.store(p_count + 1, n_rest, mask=o_t < NT)


@triton.jit(do_not_specialize=["M", "ITEMS", "least", "most"])
def block_sparse_plan_kernel(counts, items, starts, M, ITEMS, least, most, C: tl.constexpr):
    """Shares long lists among several programs: a key that all queries see must not be waited for.

    A program takes at most L = max(least, 2 entries / most) entries of a list, so all pieces of lists that
    are cut are at most `most`, and each of these has a place for its part of the sum.

    Args:
        counts: (whole, others) of M lists, [M, 2].
        items: (list, first entry, end, place or -1) of every program, [ITEMS, 4]; list -1: nothing to do.
        starts: (first place, pieces) of every list, [M, 2].
    """
    o_c = tl.arange(0, C)
    b_sum = tl.zeros([C], tl.int64)
    for c in range(0, M, C):
        p_c, m_c = counts + 2 * (c + o_c), c + o_c < M
        b_sum += tl.load(p_c, mask=m_c, other=0) + tl.load(p_c + 1, mask=m_c, other=0)
    L = tl.maximum(tl.cdiv(2 * tl.sum(b_sum, 0), most), least).to(tl.int32)
    used, places = L * 0, L * 0
    for c in range(0, M, C):
        p_c, m_c = counts + 2 * (c + o_c), c + o_c < M
        b_n = tl.load(p_c, mask=m_c, other=0) + tl.load(p_c + 1, mask=m_c, other=0)
        b_pieces = tl.where(m_c, tl.maximum(tl.cdiv(b_n, L), 1), 0)
        b_cut = tl.where(b_pieces > 1, b_pieces, 0)
        b_item = used + tl.cumsum(b_pieces, 0) - b_pieces
        b_place = places + tl.cumsum(b_cut, 0) - b_cut
        tl.store(starts + 2 * (c + o_c), b_place, mask=m_c)
        tl.store(starts + 2 * (c + o_c) + 1, b_pieces, mask=m_c)
        for i in range(0, tl.max(b_pieces, 0)):
            p_i, m_i = items + 4 * (b_item + i), i < b_pieces
            tl.store(p_i, c + o_c, mask=m_i)
            tl.store(p_i + 1, i * L + o_c * 0, mask=m_i)
            tl.store(p_i + 2, tl.minimum(b_n, i * L + L), mask=m_i)
            tl.store(p_i + 3, tl.where(b_cut > 0, b_place + i, -1), mask=m_i)
        used += tl.sum(b_pieces, 0)
        places += tl.sum(b_cut, 0)
    for c in range(used, ITEMS, C):
        tl.store(items + 4 * (c + o_c), o_c * 0 - 1, mask=c + o_c < ITEMS)
