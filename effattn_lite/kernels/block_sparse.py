"""Block-sparse attention in one pass over the chosen blocks of keys: the forward kernel and its launches.

A program owns BM queries of one head, all in one block of queries. It walks over that block's list of chosen
blocks of keys: first over those that every query sees wholly, without a mask, then over the others.
float32 inputs use float32 products ("ieee"), not TF32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.block_sparse_bwd import (
    block_sparse_bwd_dkdv_kernel,
    block_sparse_bwd_dq_kernel,
    block_sparse_bwd_sum_kernel,
)
from effattn_lite.kernels.block_sparse_launch import Lists, fit
from effattn_lite.kernels.block_sparse_lists import (
    block_sparse_columns_kernel,
    block_sparse_plan_kernel,
    block_sparse_rows_kernel,
    query_tile,
)
from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.softmax import online_step
from effattn_lite.kernels.common.softmax_tuning import candidates
from effattn_lite.kernels.common.tile import load_tile, store_tile


@triton.jit(do_not_specialize=["T", "NQ", "CAP"])
def block_sparse_fwd_kernel(
    q, k, v, o, lse, lists, counts, cu_seqlens, tiles, T, NQ, CAP, H, G, GS, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, QS: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Outputs [BM, V] and lse [BM] of one tile of queries; GS query heads share a set, G a key head."""
    i_b, i_h, line, whole, every, bos, T_n, first, rows = query_tile(
        counts, cu_seqlens, tiles, T, NQ, H, GS, QS, BM, CAUSAL, VARLEN
    )
    if rows <= 0:
        return
    lists += line * CAP
    q += i_b * q_b + (bos + first) * q_t + i_h * q_h
    k += i_b * k_b + bos * k_t + i_h // G * k_h
    v += i_b * v_b + bos * v_t + i_h // G * v_h
    b_q = load_tile(q, q_t, rows, K, BM, BK, True)
    b_o, b_l = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    o_r, o_n = tl.arange(0, BM), tl.arange(0, BN)
    factor = scale * 1.4426950408889634  # exp(scale x) = exp2(factor x)
    PER: tl.constexpr = (BS + BN - 1) // BN  # tiles of a block of keys
    inner = whole if BS % BN == 0 else whole * 0
    # [sketch:fwd]
    for n in range(0, inner * PER):  # every query sees the whole block
        i_j = tl.load(lists + n // PER) * BS + n % PER * BN
        b_k = load_tile(k + tl.cast(i_j, tl.int64) * k_t, k_t, BN, K, BN, BK, False)
        b_v = load_tile(v + tl.cast(i_j, tl.int64) * v_t, v_t, BN, V, BN, BV, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, False)
    for n in range(inner * PER, every * PER):  # some queries see some of the block
        i_j = tl.load(lists + n // PER) * BS + n % PER * BN
        keys = tl.minimum(BS - n % PER * BN, T_n - i_j)
        b_k = load_tile(k + tl.cast(i_j, tl.int64) * k_t, k_t, keys, K, BN, BK, True)
        b_v = load_tile(v + tl.cast(i_j, tl.int64) * v_t, v_t, keys, V, BN, BV, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        see = o_n[None, :] < keys
        if CAUSAL:
            see = see & (i_j + o_n[None, :] <= first + o_r[:, None])
        b_s = tl.where(see, b_s, float("-inf"))
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, True)
    # [/sketch:fwd]
    b_full = tl.where(b_l == 0, 1.0, b_l)
    row = (i_b * T + bos + first) * H + i_h
    store_tile(o + row * V, b_o / b_full[:, None], H * V, rows, V, BM, BV)
    b_lse = tl.where(b_l == 0, float("-inf"), (b_m + tl.log2(b_full)) * 0.6931471805599453)
    tl.store(lse + (i_b * H + i_h) * T + bos + first + o_r, b_lse, mask=o_r < rows)


def forward(q, k, v, block_indices, block_mask, cu_seqlens, blocks, *, tuning=None):
    """o [B, T, H, V] and lse [B, T, H]; `tuning` overrides the table's choice."""
    (B, T, H, _), V = q.shape, v.shape[3]
    q, k, v = map(launch.readable, (q, k, v))
    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel():
        sets = Lists(q, k, block_indices, block_mask, cu_seqlens, blocks)
        tile, options = _tuning("fwd", q, v, blocks, tuning)
        with launch.on_device(q):
            block_sparse_fwd_kernel[(_row_tiles(sets, tile),)](
                q, k, v, o, lse, *sets.rows(), H, H // sets.HKV, H // sets.HS, max(blocks.scale, 1e-30),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **tile, **sets.flags, **options,
            )  # fmt: skip
    return o, lse.transpose(1, 2)


def backward(do, dlse, q, k, v, o, lse, block_indices, block_mask, cu_seqlens, blocks, *, tuning=None):
    """dq, dk, dv; `tuning` overrides the table, for dq and for dkdv."""
    q, k, v = map(launch.readable, (q, k, v))
    o, do = o.contiguous(), do.contiguous()
    lse = lse.transpose(1, 2).contiguous()
    dlse = None if dlse is None else dlse.transpose(1, 2).contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not o.numel():
        return tuple(x.zero_() for x in (dq, dk, dv))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    sets = Lists(q, k, block_indices, block_mask, cu_seqlens, blocks)
    H, G, scale = q.shape[2], q.shape[2] // sets.HKV, max(blocks.scale, 1e-30)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    tile, options = _tuning("dq", q, v, blocks, tuning and tuning[0])
    with launch.on_device(q):
        block_sparse_bwd_dq_kernel[(_row_tiles(sets, tile),)](
            q, k, v, o, do, lse, dlse, delta, dq, *sets.rows(), H, G, H // sets.HS, scale, *strides,
            **tile, **sets.flags, **options,
        )  # fmt: skip
        tile, options = _tuning("dkdv", q, v, blocks, tuning and tuning[1])
        _keys_gradient(q, k, v, do, lse, delta, dk, dv, sets, scale, strides, tile, options)
    return dq, dk, dv


def _keys_gradient(q, k, v, do, lse, delta, dk, dv, sets, scale, strides, tile, options):
    """Fill dk and dv: the lists of the keys, who takes what of them, and the sum of what was cut."""
    lists, counts, tiles, NT, cap = sets.columns()
    programs, items, starts, places = sets.plan(counts, cap)
    KEYS = launch.cdiv(sets.BS, tile["BN"])
    parts = [None, None]
    if items is not None:
        parts = [torch.empty((places, KEYS * tile["BN"], x.shape[3]), device=q.device) for x in (k, v)]
    H, where = sets.H, (sets.cu_seqlens, tiles, sets.T)
    block_sparse_bwd_dkdv_kernel[(programs * KEYS,)](
        q, k, v, do, lse, delta, dk, dv, *parts, lists, counts, items, *where, sets.NQ, NT, cap,
        H, H // sets.HKV, scale, *strides, GS=H // sets.HS, SPLIT=items is not None,
        **tile, **sets.flags, **options,
    )  # fmt: skip
    if items is not None:
        tile = {name: x for name, x in tile.items() if name != "BM"}
        block_sparse_bwd_sum_kernel[(counts.numel() // 2 * KEYS,)](
            *parts, dk, dv, starts, *where, NT, sets.HKV, BS=sets.BS, VARLEN=tiles is not None, **tile,
            num_warps=4,
        )  # fmt: skip


def _row_tiles(sets, tile):
    """Number of tiles of queries, over all heads."""
    return sets.B * sets.H * sets.NQ * launch.cdiv(sets.QS, tile["BM"])


def _tuning(kernel, q, v, blocks, tuning=None):
    """Tiles that fit the blocks, as keyword arguments, and the options of the launch.

    The loops are those of softmax attention, and so is the table.
    """
    K, V = q.shape[3], v.shape[3]
    if not tuning:
        width = max(launch.padded(K), launch.padded(V))
        tuning = candidates(kernel, launch.capability(q), width, q.element_size())[0]
    return _tile(kernel, tuning, K, V, blocks.block_size, blocks.query_block_size)


def _tile(kernel, tuning, K, V, BS, QS):
    BM, BN, warps, stages = fit(tuning[0], QS), fit(tuning[1], BS), *tuning[2:]
    # half a tile has work for half the warps
    own, full = (BN, tuning[1]) if kernel == "dkdv" else (BM, tuning[0])
    warps = max(min(warps, 4), warps * own // full)
    tile = dict(K=K, V=V, BK=launch.padded(K), BV=launch.padded(V), BM=BM, BN=BN)
    return tile, dict(num_warps=warps, num_stages=stages)


def variants(capability=80):
    """Compilations that stand for all: (name, kernel, signature, constants, options), by capability."""
    plain = dict(BS=128, QS=128, GS=1, SETS=1, CAUSAL=True, VARLEN=False, SPLIT=True, INDICES=True)
    packed = dict(BS=100, QS=16, GS=4, SETS=1, CAUSAL=True, VARLEN=True, SPLIT=False, INDICES=False)
    heads = dict(BS=64, QS=64, GS=1, SETS=4, CAUSAL=False, VARLEN=False, SPLIT=True, INDICES=True)
    yield from _variants(capability, "fp16", 128, "plain", plain)
    yield from _variants(capability, "fp16", 256, "plain", plain)
    yield from _variants(capability, "fp16", 64, "packed", packed)
    yield from _variants(capability, "bf16", 128, "heads", heads)
    yield from _variants(capability, "fp32", 64, "plain", plain)
    if capability >= 80:
        yield from _variants(capability, "fp32", 256, "packed", packed)
    for label, flags in (("plain", plain), ("packed", packed)):
        for kernel, constants in (
            (block_sparse_rows_kernel, dict(C=256)),
            (block_sparse_columns_kernel, dict(C=64, J=16)),
            (block_sparse_plan_kernel, dict(C=1024)),
        ):
            yield _variant(kernel, "fp16", label, flags | constants, dict(num_warps=4))


def _variants(capability, kind, width, label, flags):
    for name, kernel in (
        ("fwd", block_sparse_fwd_kernel),
        ("dq", block_sparse_bwd_dq_kernel),
        ("dkdv", block_sparse_bwd_dkdv_kernel),
        ("dkdv", block_sparse_bwd_sum_kernel),
    ):
        for tuning in candidates(name, capability, width, 4 if kind == "fp32" else 2):
            tile, options = _tile(name, tuning, width, width, flags["BS"], flags["QS"])
            yield _variant(kernel, kind, f"{kind}-{width}-{tuning}-{label}", flags | tile, options)


def _variant(kernel, kind, label, constants, options):
    # GS is a constant of one kernel and an argument of others
    constants = {x.name: constants[x.name] for x in kernel.params if x.is_constexpr and x.name in constants}
    signature = {arg: "constexpr" if arg in constants else _kind(arg, kind) for arg in kernel.arg_names}
    return f"{kernel.fn.__name__}-{label}", kernel, signature, constants, options


def _kind(arg, kind):
    """Type of an argument in the notation of Triton's signatures."""
    if arg in ("q", "k", "v", "o", "do", "dq", "dk", "dv"):
        return f"*{kind}"
    if arg in ("lse", "dlse", "delta", "dk_part", "dv_part"):
        return "*fp32"
    if arg in ("lists", "counts", "items", "starts", "cu_seqlens", "tiles", "rows", "indices"):
        return "*i32"
    return {"mask": "*u8", "scale": "fp32"}.get(arg, "i32")
