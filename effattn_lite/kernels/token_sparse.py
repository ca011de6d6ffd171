"""Attention where every token has its own set of blocks of keys: the forward kernel and the launches.

A program owns a tile of rows, each one query head of one token. If 16 heads or more share a set, they fill
the tile, and one token's list of blocks is walked over. Else neighbouring tokens share a tile: the walk is
over all blocks that any of them chose, and each row looks up which are its own.
float32 inputs use float32 products ("ieee"), not TF32.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.block_sparse_bwd import block_sparse_bwd_sum_kernel
from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.softmax import online_step
from effattn_lite.kernels.common.softmax_tuning import candidates
from effattn_lite.kernels.common.tile import load_rows, load_tile, store_rows
from effattn_lite.kernels.token_sparse_bwd import token_sparse_bwd_dkdv_kernel, token_sparse_bwd_dq_kernel
from effattn_lite.kernels.token_sparse_launch import TokenLists, tile_of, tuning_of
from effattn_lite.kernels.token_sparse_lists import (
    token_sparse_columns_kernel,
    token_sparse_rows_kernel,
    token_tile,
)


@triton.jit(do_not_specialize=["T", "Tk", "NQ", "NK", "CAP"])
def token_sparse_fwd_kernel(
    q, k, v, o, lse, mask, lists, counts, cu_seqlens, tiles, T, Tk, NQ, NK, CAP, H, G, HS, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, GS: tl.constexpr, BT: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Outputs [BM, V] and lse [BM] of the rows of one tile of BT tokens; GS query heads share a set."""
    i_b, i_s, line, whole, every, bos, off, Tk, b_t, b_h, live = token_tile(
        counts, cu_seqlens, tiles, T, Tk, NQ, HS, GS, BT, BM, CAUSAL, VARLEN
    )
    lists += line * CAP
    mask += ((i_b * HS + i_s) * T + bos + b_t) * NK  # [BM]
    k += i_b * k_b + bos * k_t + i_s * GS // G * k_h
    v += i_b * v_b + bos * v_t + i_s * GS // G * v_h
    b_q = load_rows(q + i_b * q_b + (bos + b_t) * q_t + b_h * q_h, live, K, BK)
    b_o, b_l = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    o_n, factor = tl.arange(0, BN), scale * 1.4426950408889634  # exp(scale x) = exp2(factor x)
    PER: tl.constexpr = (BS + BN - 1) // BN  # tiles of a block of keys
    # a token alone in its tile sees all of the blocks behind it
    inner = whole if BT == 1 and BS % BN == 0 else whole * 0
    # [sketch:fwd]
    for n in range(0, inner * PER):
        i_j = tl.load(lists + n // PER) * BS + n % PER * BN
        b_k = load_tile(k + tl.cast(i_j, tl.int64) * k_t, k_t, BN, K, BN, BK, False)
        b_v = load_tile(v + tl.cast(i_j, tl.int64) * v_t, v_t, BN, V, BN, BV, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, False)
    for n in range(inner * PER, every * PER):
        i_x = tl.load(lists + n // PER)
        i_j = i_x * BS + n % PER * BN
        keys = tl.minimum(BS - n % PER * BN, Tk - i_j)
        b_k = load_tile(k + tl.cast(i_j, tl.int64) * k_t, k_t, keys, K, BN, BK, True)
        b_v = load_tile(v + tl.cast(i_j, tl.int64) * v_t, v_t, keys, V, BN, BV, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        see = live[:, None] & (o_n[None, :] < keys)
        if BT > 1:  # another token of the tile may have chosen the block
            see = see & (tl.load(mask + i_x, mask=live, other=0) != 0)[:, None]
        if CAUSAL:
            see = see & (i_j + o_n[None, :] <= (b_t + off)[:, None])
        b_s = tl.where(see, b_s, float("-inf"))
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, True)
    # [/sketch:fwd]
    b_full = tl.where(b_l == 0, 1.0, b_l)
    store_rows(o + ((i_b * T + bos + b_t) * H + b_h) * V, b_o / b_full[:, None], live, V, BV)
    b_lse = tl.where(b_l == 0, float("-inf"), (b_m + tl.log2(b_full)) * 0.6931471805599453)
    tl.store(lse + (i_b * H + b_h) * T + bos + b_t, b_lse, mask=live)


def forward(q, k, v, block_indices, block_mask, cu_seqlens, blocks, *, tuning=None):
    """o [B, T, H, V] and lse [B, T, H]; `tuning` overrides the table's choice."""
    (B, T, H, _), V = q.shape, v.shape[3]
    q, k, v = map(launch.readable, (q, k, v))
    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel():
        sets = TokenLists(q, k, block_indices, block_mask, cu_seqlens, blocks)
        tile, options = _tuning("fwd", q, v, sets, tuning)
        with launch.on_device(q):
            rows = sets.rows(tile["BT"])
            token_sparse_fwd_kernel[(_programs(rows, tile),)](
                q, k, v, o, lse, *rows, max(blocks.scale, 1e-30),
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
    sets = TokenLists(q, k, block_indices, block_mask, cu_seqlens, blocks)
    scale, strides = max(blocks.scale, 1e-30), (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    tile, options = _tuning("dq", q, v, sets, tuning and tuning[0])
    with launch.on_device(q):
        rows = sets.rows(tile["BT"])
        token_sparse_bwd_dq_kernel[(_programs(rows, tile),)](
            q, k, v, o, do, lse, dlse, delta, dq, *rows, scale, *strides, **tile, **sets.flags, **options
        )
        tile, options = _tuning("dkdv", q, v, sets, tuning and tuning[1])
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
    token_sparse_bwd_dkdv_kernel[(programs * KEYS,)](
        q, k, v, do, lse, delta, dk, dv, *parts, lists, counts, items, sets.cu_seqlens, tiles,
        sets.T, sets.Tk, NT, cap, sets.H, sets.H // sets.HKV, scale, *strides, SPLIT=items is not None,
        **tile, **sets.flags, **options,
    )  # fmt: skip
    if items is not None:
        tile = {name: x for name, x in tile.items() if name not in ("BM", "GS")}
        block_sparse_bwd_sum_kernel[(counts.numel() // 2 * KEYS,)](
            *parts, dk, dv, starts, sets.cu_seqlens, tiles, sets.Tk, NT, sets.HKV,
            BS=sets.BS, VARLEN=tiles is not None, **tile, num_warps=4,
        )  # fmt: skip


def _programs(rows, tile):
    """Number of tiles of rows, over all sets; counts [B, HS, NQ, 2] are the third of the lists' arguments."""
    return rows[2].numel() // 2 * launch.cdiv(tile["GS"], tile["BM"])


def _tuning(kernel, q, v, sets, tuning=None):
    tuning = tuning or tuning_of(kernel, q, v)
    return tile_of(kernel, tuning, q.shape[3], v.shape[3], sets.BS, sets.GS)


def variants(capability=80):
    """Compilations that stand for all: (name, kernel, signature, constants, options), by capability."""
    heads = dict(BS=64, GS=16, SETS=1, CAUSAL=True, VARLEN=False, SPLIT=True, INDICES=True)
    tokens = dict(BS=512, GS=1, SETS=4, CAUSAL=True, VARLEN=False, SPLIT=True, INDICES=True)
    packed = dict(BS=100, GS=3, SETS=1, CAUSAL=False, VARLEN=True, SPLIT=False, INDICES=False)
    yield from _variants(capability, "fp16", 128, "heads", heads)
    yield from _variants(capability, "fp16", 256, "tokens", tokens)
    yield from _variants(capability, "fp16", 64, "packed", packed)
    yield from _variants(capability, "bf16", 128, "tokens", tokens)
    yield from _variants(capability, "fp32", 64, "heads", heads)
    if capability >= 80:
        yield from _variants(capability, "fp32", 256, "packed", packed)
    for label, flags in (("heads", heads | dict(BT=1, R=1)), ("packed", packed | dict(BT=21, R=32))):
        for kernel, constants in (
            (token_sparse_rows_kernel, dict(C=64)),
            (token_sparse_columns_kernel, dict(C=64, J=16)),
        ):
            yield _variant(kernel, "fp16", label, flags | constants, dict(num_warps=4))


def _variants(capability, kind, width, label, flags):
    for name, kernel in (
        ("fwd", token_sparse_fwd_kernel),
        ("dq", token_sparse_bwd_dq_kernel),
        ("dkdv", token_sparse_bwd_dkdv_kernel),
    ):
        for tuning in candidates(name, capability, width, 4 if kind == "fp32" else 2):
            tile, options = tile_of(name, tuning, width, width, flags["BS"], flags["GS"])
            yield _variant(kernel, kind, f"{kind}-{width}-{tuning}-{label}", flags | tile, options)


def _variant(kernel, kind, label, constants, options):
    constants = {x.name: constants[x.name] for x in kernel.params if x.is_constexpr and x.name in constants}
    signature = {arg: "constexpr" if arg in constants else _kind(arg, kind) for arg in kernel.arg_names}
    return f"{kernel.fn.__name__}-{label}", kernel, signature, constants, options


def _kind(arg, kind):
    """Type of an argument in the notation of Triton's signatures."""
    if arg in ("q", "k", "v", "o", "do", "dq", "dk", "dv"):
        return f"*{kind}"
    if arg in ("lse", "dlse", "delta", "dk_part", "dv_part"):
        return "*fp32"
    if arg in ("lists", "counts", "items", "cu_seqlens", "tiles", "indices"):
        return "*i32"
    return {"mask": "*u8", "scale": "fp32"}.get(arg, "i32")
