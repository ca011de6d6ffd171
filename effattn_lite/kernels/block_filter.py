"""Softmax attention over chosen blocks of keys, with a filter before the product with the values.

A program owns BM queries of one head, all in one block of queries, and walks over the chosen blocks of keys,
in ascending order; a tile holds a whole block. Each warp's rows, a quarter of a block of queries, decide
alone whether they need the block's values; where no row of the tile does, the product is not formed.
float32 inputs use float32 products ("ieee"), not TF32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.block_sparse_launch import Lists
from effattn_lite.kernels.block_sparse_lists import query_tile
from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.tile import load_tile, store_tile

# capability -> width of the wider head -> (BM, warps, stages), by registers and shared memory
HALF = {
    launch.INTERPRETER: {256: (64, 4, 1)},
    75: {64: (64, 4, 1), 128: (64, 4, 1), 256: (64, 8, 1)},
    80: {64: (128, 4, 2), 128: (128, 8, 2), 256: (64, 8, 1)},
    86: {64: (64, 4, 2), 128: (64, 4, 1), 256: (64, 8, 1)},
    90: {64: (128, 4, 3), 128: (128, 8, 2), 256: (64, 8, 1)},
    120: {64: (64, 4, 2), 128: (64, 4, 1), 256: (64, 8, 1)},
}
FLOAT = {
    launch.INTERPRETER: {256: (64, 4, 1)},
    75: {64: (32, 8, 1), 128: (32, 8, 1)},
    80: {64: (64, 8, 1), 128: (32, 8, 1), 256: (32, 16, 1)},
}


@triton.jit
def filtered_step(
    b_o, b_m, b_l, b_q, rows, k, k_t, v, v_t, keys, offset, factor, skip, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Add a block of keys; CUT: it has `keys` keys, and row r sees the first `offset` + r + 1 of them."""
    b_k = load_tile(k, k_t, keys, K, BN, BK, CUT)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * factor  # [BM, BK] @ [BK, BN] -> [BM, BN]
    if CUT:
        o_n = tl.arange(0, BN)[None, :]
        see = (o_n < keys) & (o_n <= offset + tl.arange(0, BM)[:, None])
        b_s = tl.where(see, b_s, float("-inf"))
    # [sketch:fwd]
    b_local = tl.max(b_s, 1)
    b_m_new = tl.maximum(b_m, b_local)
    b_top = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p, b_shrink = tl.exp2(b_s - b_top[:, None]), tl.exp2(b_m - b_top)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    b_o = b_o * b_shrink[:, None]
    # the W rows of a warp decide together, those that are queries
    b_gap = tl.where(tl.arange(0, BM) < rows, b_local - b_top, float("-inf"))
    b_gap = tl.max(tl.reshape(b_gap, [BM // W, W]), 1)
    b_keep = (b_gap > skip).to(tl.int32)
    if tl.max(b_keep, 0) > 0:
        b_row = tl.reshape(tl.broadcast_to(b_keep[:, None], [BM // W, W]), [BM])
        b_p = tl.where(b_row[:, None] > 0, b_p, 0.0)
        b_v = load_tile(v, v_t, keys, V, BN, BV, CUT)
        # [BM, BN] @ [BN, BV] -> [BM, BV]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
    # [/sketch:fwd]
    return b_o, b_m_new, b_l


@triton.jit(do_not_specialize=["T", "NQ", "CAP"])
def block_filter_fwd_kernel(
    q, k, v, o, lse, lists, counts, cu_seqlens, tiles, T, NQ, CAP, H, G, factor, skip,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, QS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Outputs [BM, V] and lse [BM] of one tile of queries; factor and skip count exponents of 2."""
    i_b, i_h, line, whole, every, bos, T_n, first, rows = query_tile(
        counts, cu_seqlens, tiles, T, NQ, H, 1, QS, BM, True, False
    )
    if rows <= 0:
        return
    lists += line * CAP
    q += i_b * q_b + first * q_t + i_h * q_h
    k += i_b * k_b + i_h // G * k_h
    v += i_b * v_b + i_h // G * v_h
    b_q = load_tile(q, q_t, rows, K, BM, BK, True)
    b_o, b_l = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    inner = whole if BS == BN else whole * 0
    for n in range(0, inner):
        i_j = tl.load(lists + n).to(tl.int64) * BS
        b_o, b_m, b_l = filtered_step(
            b_o, b_m, b_l, b_q, rows, k + i_j * k_t, k_t, v + i_j * v_t, v_t, BN, 0, factor, skip,
            K, V, BK, BV, BM, BN, W, False,
        )  # fmt: skip
    for n in range(inner, every):
        i_j = tl.load(lists + n).to(tl.int64) * BS
        keys = tl.minimum(BS, T_n - i_j).to(tl.int32)
        b_o, b_m, b_l = filtered_step(
            b_o, b_m, b_l, b_q, rows, k + i_j * k_t, k_t, v + i_j * v_t, v_t, keys,
            (first - i_j).to(tl.int32), factor, skip, K, V, BK, BV, BM, BN, W, True,
        )  # fmt: skip
    o_r = tl.arange(0, BM)
    b_full = tl.where(b_l == 0, 1.0, b_l)
    store_tile(o + ((i_b * T + first) * H + i_h) * V, b_o / b_full[:, None], H * V, rows, V, BM, BV)
    b_lse = tl.where(b_l == 0, float("-inf"), (b_m + tl.log2(b_full)) * 0.6931471805599453)
    tl.store(lse + (i_b * H + i_h) * T + first + o_r, b_lse, mask=o_r < rows)


def forward(q, k, v, mask, blocks, skip):
    """o [B, T, H, V] and lse [B, T, H]; blocks: sizes and scale, of the engine of block-sparse attention."""
    (B, T, H, K), (HKV, V), BS, QS = q.shape, v.shape[2:], blocks.block_size, blocks.query_block_size
    q, k, v = map(launch.readable, (q, k, v))
    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel():
        width = max(launch.padded(K), launch.padded(V))
        BM, warps, stages = tuning(launch.capability(q), width, q.element_size())
        with launch.on_device(q):
            lists = Lists(q, k, None, mask, None, blocks)
            lists, counts, _, _, _, NQ, CAP = lists.rows()
            # the rows that decide together lie in one tile
            BM, W = max(min(BM, launch.padded(QS)), QS // 4), QS // 4
            log2e = 1.4426950408889634
            block_filter_fwd_kernel[(B * H * NQ * launch.cdiv(QS, BM),)](
                q, k, v, o, lse, lists, counts, None, None, T, NQ, CAP, H, H // HKV,
                max(blocks.scale, 1e-30) * log2e, skip * log2e,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                K=K, V=V, BK=launch.padded(K), BV=launch.padded(V), BM=BM, BN=launch.padded(BS),
                BS=BS, QS=QS, W=W, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return o, lse.transpose(1, 2)


def tuning(capability: int, width: int, itemsize: int) -> tuple[int, int, int]:
    """(BM, warps, stages) for a GPU and a width of the wider head."""
    by_width = launch.choose(HALF if itemsize == 2 else FLOAT, capability)
    return by_width[min(w for w in by_width if w >= width)]


def variants(capability=80):
    """Compilations that stand for all: (name, kernel, signature, constants, options), by capability."""
    kernel = block_filter_fwd_kernel
    largest = 2**15 if capability >= 80 else 2**14  # bytes of a block of keys
    for kind, width in (
        ("fp16", 64),
        ("fp16", 128),
        ("fp16", 256),
        ("bf16", 128),
        ("fp32", 64),
        ("fp32", 256),
    ):
        if capability < 80 and width > 128:
            continue
        itemsize = 4 if kind == "fp32" else 2
        BM, warps, stages = tuning(capability, width, itemsize)
        BS = min(128, largest // (width * itemsize))
        constants = dict(K=width, V=width, BK=width, BV=width, BM=BM, BN=BS, BS=BS, QS=128, W=32)
        signature = {arg: _kind(arg, kind, constants) for arg in kernel.arg_names}
        options = dict(num_warps=warps, num_stages=stages)
        yield f"fwd-{kind}-{width}-{BM}x{BS}-{warps}-{stages}", kernel, signature, constants, options


def _kind(arg, kind, constants):
    """Type of an argument in the notation of Triton's signatures."""
    if arg in constants:
        return "constexpr"
    if arg in ("lists", "counts", "cu_seqlens", "tiles"):
        return "*i32"
    if arg in ("q", "k", "v", "o"):
        return f"*{kind}"
    return "*fp32" if arg == "lse" else "fp32" if arg in ("factor", "skip") else "i32"
