"""Softmax attention on columns and diagonals in one pass: tiles that diagonals cross, and gathered columns.

A program owns BM queries of one head. Which tiles of keys the chosen diagonals cross depends on the distance
of the tile alone, so a head has one list of distances for all its programs: first the tiles that diagonals
fill, which need no mask, then the others, with a mask of diagonals and columns. What is left of the columns
are keys outside all these tiles; they are gathered. So no pair is met twice.
float32 inputs use float32 products ("ieee"), not TF32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.softmax import online_step
from effattn_lite.kernels.common.tile import load_tile, store_tile

# capability -> width of the wider head -> (BM, BN, warps, stages), by registers and shared memory
HALF = {
    launch.INTERPRETER: {256: (32, 16, 4, 1)},
    75: {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    80: {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
    86: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
    90: {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 4, 2)},
    120: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
}
FLOAT = {
    launch.INTERPRETER: {256: (32, 16, 4, 1)},
    75: {64: (32, 32, 4, 1), 128: (32, 16, 4, 1)},
    80: {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}


@triton.jit(do_not_specialize=["T", "NT", "NU", "NV"])
def vertical_slash_fwd_kernel(
    q, k, v, o, lse, vertical, slash, far, counts, crossed, columns, before, T, NT, NU, NV, H, G, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Outputs [BM, V] and lse [BM] of one tile of queries.

    Args:
        vertical, slash: whether a key is a chosen column, a distance a chosen diagonal, [B, H, T] of uint8.
        far: distances of tiles, those that are filled, then those that are crossed, [B, H, 2, NU].
        counts: how many of them are at most this distance, [B, H, 2, NU].
        crossed: whether a tile at this distance is in one of the lists, [B, H, NU] of uint8.
        columns: chosen columns, ascending, [B, H, NV]; before: how many are at most this key, [B, H, T].
        NU: distances; tile j of keys is at u = i BM / BN - j + BM / BN - 1 >= 0 from tile i of queries.
    """
    i_t, i_bh = NT - 1 - tl.program_id(0) % NT, (tl.program_id(0) // NT).to(tl.int64)
    i_b, i_h, i_m = i_bh // H, i_bh % H, i_t * BM
    q += i_b * q_b + tl.cast(i_m, tl.int64) * q_t + i_h * q_h
    k += i_b * k_b + i_h // G * k_h
    v += i_b * v_b + i_h // G * v_h
    vertical += i_bh * T
    slash += i_bh * T
    far += i_bh * 2 * NU
    b_q = load_tile(q, q_t, T - i_m, K, BM, BK, True)
    b_o, b_l = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    o_t, o_n = i_m + tl.arange(0, BM), tl.arange(0, BN)
    factor = scale * 1.4426950408889634  # exp(scale x) = exp2(factor x)
    last = i_t * (BM // BN) + BM // BN - 1  # distance of the first tile of keys
    whole = tl.load(counts + i_bh * 2 * NU + last)
    some = tl.load(counts + i_bh * 2 * NU + NU + last)
    # [sketch:fwd]
    for n in range(0, whole):  # the diagonals fill the tile
        i_j = tl.cast((last - tl.load(far + n)) * BN, tl.int64)
        b_k = load_tile(k + i_j * k_t, k_t, BN, K, BN, BK, False)
        b_v = load_tile(v + i_j * v_t, v_t, BN, V, BN, BV, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, False)
    for n in range(0, some):  # some diagonal crosses the tile
        i_j = (last - tl.load(far + NU + n)) * BN
        b_k = load_tile(k + tl.cast(i_j, tl.int64) * k_t, k_t, T - i_j, K, BN, BK, True)
        b_v = load_tile(v + tl.cast(i_j, tl.int64) * v_t, v_t, T - i_j, V, BN, BV, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        delta = o_t[:, None] - (i_j + o_n)[None, :]
        past = (delta >= 0) & (delta < T)
        b_in = tl.load(slash + delta, mask=past, other=0)
        b_in |= tl.load(vertical + i_j + o_n, mask=i_j + o_n < T, other=0)[None, :]
        b_s = tl.where(past & (b_in > 0), b_s, float("-inf"))
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, True)
    seen = tl.load(before + i_bh * T + tl.minimum(i_m + BM, T) - 1)
    for n in range(0, seen, BN):  # columns
        m_j = n + o_n < seen
        o_j = tl.load(columns + i_bh * NV + n + o_n, mask=m_j, other=0)
        met = tl.load(crossed + i_bh * NU + last - o_j // BN, mask=m_j, other=1)
        if tl.min(met.to(tl.int32), 0) == 0:
            m_j = met == 0
            p_j = o_j.to(tl.int64)[:, None]
            m_k, m_v = (
                m_j[:, None] & (tl.arange(0, BK) < K)[None, :],
                m_j[:, None] & (tl.arange(0, BV) < V)[None, :],
            )
            b_k = tl.load(k + p_j * k_t + tl.arange(0, BK)[None, :], mask=m_k, other=0.0)
            b_v = tl.load(v + p_j * v_t + tl.arange(0, BV)[None, :], mask=m_v, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_s = tl.where(m_j[None, :] & (o_j[None, :] <= o_t[:, None]), b_s, float("-inf"))
            b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, True)
    # [/sketch:fwd]
    b_full, o_r = tl.where(b_l == 0, 1.0, b_l), tl.arange(0, BM)
    row = (i_b * T + i_m) * H + i_h
    store_tile(o + row * V, b_o / b_full[:, None], H * V, T - i_m, V, BM, BV)
    b_lse = tl.where(b_l == 0, float("-inf"), (b_m + tl.log2(b_full)) * 0.6931471805599453)
    tl.store(lse + i_bh * T + i_m + o_r, b_lse, mask=o_r < T - i_m)


def forward(q, k, v, vertical, slash, scale):
    """o [B, T, H, V] and lse [B, T, H] of tables of columns and diagonals, [B, H, T] of uint8."""
    (B, T, H, K), (HKV, V) = q.shape, v.shape[2:]
    q, k, v = map(launch.readable, (q, k, v))
    vertical, slash = vertical.contiguous(), slash.contiguous()
    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel():
        width = max(launch.padded(K), launch.padded(V))
        BM, BN, warps, stages = tuning(launch.capability(q), width, q.element_size())
        NT = launch.cdiv(T, BM)
        far, counts, crossed = distances(slash, NT, BM, BN)
        # each row in ascending order, and the numbers of what stands before
        before = vertical.cumsum(2, dtype=torch.int32)
        columns = compacted(vertical.bool(), before)
        with launch.on_device(q):
            vertical_slash_fwd_kernel[(NT * B * H,)](
                q, k, v, o, lse, vertical, slash, far, counts, crossed, columns, before,
                T, NT, crossed.shape[2], T, H, H // HKV, max(scale, 1e-30),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                K=K, V=V, BK=launch.padded(K), BV=launch.padded(V), BM=BM, BN=BN,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return o, lse.transpose(1, 2)


def distances(slash, NT: int, BM: int, BN: int):
    """Lists of the distances of tiles that diagonals fill, and cross, as the kernel reads them."""
    T, device = slash.shape[2], slash.device
    total = torch.nn.functional.pad(slash.cumsum(2, dtype=torch.int32), (1, 0))  # [B, H, T + 1]
    # pairs of the tiles at distance u are low to low + BM + BN - 2 apart
    low = (torch.arange(NT * (BM // BN), device=device) - (BM // BN - 1)) * BN - BN + 1
    found = total[..., (low + BM + BN - 1).clamp(0, T)] - total[..., low.clamp(0, T)]
    full = found == BM + BN - 1
    lists = torch.stack((full, (found > 0) & ~full), 2)  # [B, H, 2, NU]
    counts = lists.cumsum(3, dtype=torch.int32)
    return compacted(lists, counts), counts, (found > 0).to(torch.uint8)


def compacted(chosen, counts):
    """Indices of the chosen entries of each row, ascending, from the running counts; the rest is -1."""
    n = chosen.shape[-1]
    index = torch.arange(n, dtype=torch.int32, device=chosen.device).expand(chosen.shape)
    place = torch.where(chosen, counts - 1, n).long()
    out = torch.full((*chosen.shape[:-1], n + 1), -1, dtype=torch.int32, device=chosen.device)
    return out.scatter_(-1, place, index)[..., :n].contiguous()


def tuning(capability: int, width: int, itemsize: int) -> tuple[int, int, int, int]:
    """(BM, BN, warps, stages) for a GPU and a width of the wider head; BN divides BM."""
    by_width = launch.choose(HALF if itemsize == 2 else FLOAT, capability)
    return by_width[min(w for w in by_width if w >= width)]


def variants(capability=80):
    """Compilations that stand for all: (name, kernel, signature, constants, options), by capability."""
    kernel = vertical_slash_fwd_kernel
    for kind, width in (
        ("fp16", 64),
        ("fp16", 128),
        ("fp16", 256),
        ("bf16", 128),
        ("fp32", 128),
        ("fp32", 256),
    ):
        if capability < 80 and kind == "fp32" and width > 128:
            continue
        BM, BN, warps, stages = tuning(capability, width, 4 if kind == "fp32" else 2)
        constants = dict(K=width, V=width, BK=width, BV=width, BM=BM, BN=BN)
        signature = {arg: _kind(arg, kind, constants) for arg in kernel.arg_names}
        options = dict(num_warps=warps, num_stages=stages)
        yield f"fwd-{kind}-{width}-{BM}x{BN}-{warps}-{stages}", kernel, signature, constants, options


def _kind(arg, kind, constants):
    """Type of an argument in the notation of Triton's signatures."""
    if arg in constants:
        return "constexpr"
    if arg in ("vertical", "slash", "crossed"):
        return "*u8"
    if arg in ("far", "counts", "columns", "before"):
        return "*i32"
    if arg in ("q", "k", "v", "o"):
        return f"*{kind}"
    return "*fp32" if arg == "lse" else "fp32" if arg == "scale" else "i32"
