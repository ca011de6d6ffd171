"""Estimates of where the weights are: means of blocks, antidiagonal sums, sums of the last queries' weights.

Products are taken over 64 channels at a time, so that tiles fit whatever the head. All sums are float32, and
products of float32 inputs are "ieee": a choice must not depend on how an estimate was rounded.
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.block_select_last import (
    last_query_lse_kernel,
    last_query_sums_kernel,
)
from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.tile import load_tile

AREA = 2**13
"""Numbers that a program of the means holds at a time."""
TILE = 64
"""Rows and columns of the tiles of antidiagonal sums."""
CHANNELS = 64
"""Channels that a product takes at a time."""
SCRATCH = 2**22
"""Numbers that the programs of the last queries' sums may write and read again; it stays in the L2 cache."""


@triton.jit(do_not_specialize=["T", "NB"])
def block_means_kernel(
    x, centre, means, alike, T, NB, H, x_b, x_t, x_h,
    K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Mean [K] of one block of tokens, and the mean cosine of all its pairs: the mean direction squared."""
    i_n, i_bh = tl.program_id(0) % NB, (tl.program_id(0) // NB).to(tl.int64)
    x += i_bh // H * x_b + tl.cast(i_n, tl.int64) * BS * x_t + i_bh % H * x_h
    tokens = tl.minimum(BS, T - i_n * BS)
    o_k = tl.arange(0, BK)
    b_sum, b_unit = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    for i in range(0, tokens, BM):
        b_x = load_tile(x + tl.cast(i, tl.int64) * x_t, x_t, tokens - i, K, BM, BK, True).to(tl.float32)
        floor = tl.zeros([BM], tl.float32)
        if centre is not None:
            # a centred token that is mere rounding has no direction
            floor = tl.sqrt(tl.sum(b_x * b_x, 1)) * (1 / 1024)
            b_c = tl.load(centre + i_bh * K + o_k, mask=o_k < K, other=0.0)
            b_x = tl.where((i + tl.arange(0, BM) < tokens)[:, None], b_x - b_c[None, :], 0.0)
        length = tl.sqrt(tl.sum(b_x * b_x, 1))
        live = length > floor
        b_unit += tl.sum(tl.where(live[:, None], b_x / tl.where(live, length, 1.0)[:, None], 0.0), 0)
        b_sum += tl.sum(b_x, 0)
    row = i_bh * NB + i_n
    tl.store(means + row * K + o_k, b_sum / tokens, mask=o_k < K)
    tl.store(alike + row, tl.sum(b_unit * b_unit, 0) / tokens / tokens)


@triton.jit
def antidiagonal_tile(
    q, q_t, k, k_t, i_r, i_c, T, factor, K: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """Antidiagonal sums [BT, BT] of the tiles from row i_r and column i_c on; columns ahead of a row -inf."""
    o_r, o_c, o_k = i_r + tl.arange(0, BT), i_c + tl.arange(0, BT), tl.arange(0, BC)
    b_s = tl.zeros([BT, BT], tl.float32)
    PARTS: tl.constexpr = (K + BC - 1) // BC
    # [sketch:antidiagonal]
    for n in range(0, S * PARTS):
        u, c = n // PARTS, n % PARTS * BC + o_k  # element of the antidiagonal, channels
        o_t, o_j = o_r * S + S - 1 - u, o_c * S + u
        m_t, m_j = (o_t < T)[:, None] & (c < K)[None, :], (o_j < T)[:, None] & (c < K)[None, :]
        b_q = tl.load(q + o_t.to(tl.int64)[:, None] * q_t + c[None, :], mask=m_t, other=0.0)
        b_k = tl.load(k + o_j.to(tl.int64)[:, None] * k_t + c[None, :], mask=m_j, other=0.0)
        # [BT, BC] @ [BC, BT] -> [BT, BT]
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
    # [/sketch:antidiagonal]
    return tl.where(o_c[None, :] <= o_r[:, None], b_s * factor, float("-inf"))


@triton.jit(do_not_specialize=["T", "NT", "NQ"])
def antidiagonal_mass_kernel(
    q, k, mass, T, NT, NQ, H, G, factor, q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, S: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Masses of BT rows of antidiagonal sums, added up in blocks of N rows and columns.

    The sums are computed twice, first for the rows' softmax: kept, they would fill the memory.
    """
    i_p = tl.program_id(0)
    i_t, i_bh = NT - 1 - i_p % NT, (i_p // NT).to(tl.int64)  # later ones first, since they have most to do
    i_h = i_bh % H
    q += i_bh // H * q_b + i_h * q_h
    k += i_bh // H * k_b + i_h // G * k_h
    b_m, b_l = tl.full([BT], float("-inf"), tl.float32), tl.zeros([BT], tl.float32)
    for i_c in range(0, i_t + 1):
        b_s = antidiagonal_tile(q, q_t, k, k_t, i_t * BT, i_c * BT, T, factor, K, S, BT, BC)
        # column 0 is seen by every row: no maximum is -inf
        b_top = tl.maximum(b_m, tl.max(b_s, 1))
        b_l = b_l * tl.exp2(b_m - b_top) + tl.sum(tl.exp2(b_s - b_top[:, None]), 1)
        b_m = b_top
    b_lse = b_m + tl.log2(b_l)
    # rows of no token: every weight is 0
    b_lse = tl.where((i_t * BT + tl.arange(0, BT)) * S < T, b_lse, float("inf"))
    BLOCKS: tl.constexpr = BT // N
    o_i, o_j = i_t * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, BLOCKS)
    mass += (i_bh * NQ + o_i[:, None]) * NQ
    for i_c in range(0, i_t + 1):
        b_s = antidiagonal_tile(q, q_t, k, k_t, i_t * BT, i_c * BT, T, factor, K, S, BT, BC)
        b_p = tl.reshape(tl.exp2(b_s - b_lse[:, None]), [BLOCKS, N, BLOCKS, N])
        b_p = tl.sum(tl.sum(b_p, 3), 1)
        o_c = i_c * BLOCKS + o_j[None, :]
        tl.store(mass + o_c, b_p, mask=(o_i[:, None] < NQ) & (o_c < NQ))


def block_means(x, centre, block_size):
    """Means [B, H, NB, K] and mean cosines [B, H, NB] of the blocks of x [B, T, H, K]."""
    (B, T, H, K), NB = x.shape, launch.cdiv(x.shape[1], block_size)
    x = launch.readable(x)
    means = torch.empty((B, H, NB, K), dtype=torch.float32, device=x.device)
    alike = torch.empty((B, H, NB), dtype=torch.float32, device=x.device)
    if means.numel():
        with launch.on_device(x):
            block_means_kernel[(B * H * NB,)](
                x, None if centre is None else centre.contiguous(), means, alike, T, NB, H, *x.stride()[:3],
                K=K, BK=launch.padded(K), BS=block_size, BM=_rows(K, block_size), num_warps=4,
            )  # fmt: skip
    return means, alike


def antidiagonal_mass(q, k, block_size, stride, scale):
    """Mass of every pair of blocks, [B, H, NQ, NQ]; block_size / stride is a power of two up to TILE."""
    (B, T, H, K), NQ = q.shape, launch.cdiv(q.shape[1], block_size)
    q, k = map(launch.readable, (q, k))
    mass = torch.zeros((B, H, NQ, NQ), dtype=torch.float32, device=q.device)
    if mass.numel():
        NT = launch.cdiv(T, stride * TILE)
        with launch.on_device(q):
            antidiagonal_mass_kernel[(B * H * NT,)](
                q, k, mass, T, NT, NQ, H, H // k.shape[2], scale / stride * 1.4426950408889634,
                *q.stride()[:3], *k.stride()[:3],
                K=K, S=stride, N=block_size // stride, BT=TILE, BC=_channels(K),
                num_warps=4, num_stages=_stages(launch.capability(q), q.element_size()),
            )  # fmt: skip
    return mass


def last_query_sums(q, k, last, scale):
    """Weights of the last queries by key and by distance, [B, H, T] each; at most 128 queries."""
    (B, T, H, K), L = q.shape, min(last, q.shape[1])
    q, k = map(launch.readable, (q, k))
    columns = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if not columns.numel():
        return columns, torch.empty_like(columns)
    BL = launch.padded(L)
    NT = launch.cdiv(T, BL)
    # programs of a head, each with a tile to turn on its side
    P = max(1, min(NT, SCRATCH // (B * H * 2 * BL * BL)))
    lse = torch.empty((B, H, NT, BL), dtype=torch.float32, device=q.device)
    sums = torch.empty((B, H, NT, 2, BL), dtype=torch.float32, device=q.device)
    scratch = torch.empty((B, H, P, BL, 2 * BL), dtype=torch.float32, device=q.device)
    scalars = (T, L, NT, H, H // k.shape[2], scale * 1.4426950408889634, *q.stride()[:3], *k.stride()[:3])
    constants = dict(K=K, BL=BL, BC=_channels(K), num_stages=_stages(launch.capability(q), q.element_size()))
    with launch.on_device(q):
        last_query_lse_kernel[(B * H * NT,)](q, k, lse, *scalars, **constants, num_warps=max(4, BL // 16))
        # exponents of 2, of rows that are no queries too: these count nothing
        total = torch.logsumexp(lse * 0.6931471805599453, 2) * 1.4426950408889634
        last_query_sums_kernel[(B * H * P,)](
            q, k, total, columns, sums, scratch, P, *scalars, **constants, num_warps=max(4, BL // 8)
        )
    # tile n gives distances from T - L - (n + 1) BL + 1 on; its second half meets the first of tile n - 1
    pad = torch.nn.functional.pad
    halves = pad(sums[:, :, :, 0], (0, 0, 1, 0)) + pad(sums[:, :, :, 1], (0, 0, 0, 1))  # [B, H, NT + 1, BL]
    start = NT * BL - (T - L) - 1
    return columns, halves.flip(2).flatten(2)[:, :, start : start + T].contiguous()


def _rows(K, block_size):
    """Tokens that a program of the means holds at a time."""
    return min(AREA // launch.padded(K), launch.padded(block_size), 128)


def _channels(K):
    return min(CHANNELS, launch.padded(K))


def _stages(capability, itemsize):
    """Loads in flight, as far as shared memory allows."""
    return 1 if capability < 80 else 3 if itemsize == 2 else 2


def variants(capability=80):
    """Compilations that stand for all: (name, kernel, signature, constants, options), by capability."""
    for kind, K in (("fp16", 128), ("fp16", 256), ("bf16", 64), ("fp32", 256)):
        stages = _stages(capability, 4 if kind == "fp32" else 2)
        shared = dict(K=K, BC=_channels(K))
        for name, kernel, sizes, warps, n in (
            ("means", block_means_kernel, dict(BK=launch.padded(K), BS=128, BM=_rows(K, 128)), 4, 3),
            ("antidiagonal", antidiagonal_mass_kernel, dict(S=8, N=16, BT=TILE), 4, stages),
            ("lse", last_query_lse_kernel, dict(BL=128), 8, stages),
            ("sums", last_query_sums_kernel, dict(BL=128), 16, stages),
        ):
            constants = {arg: x for arg, x in (shared | sizes).items() if arg in kernel.arg_names}
            signature = {arg: _kind(arg, kind, constants) for arg in kernel.arg_names}
            yield f"{name}-{kind}-{K}", kernel, signature, constants, dict(num_warps=warps, num_stages=n)


def _kind(arg, kind, constants):
    """Type of an argument in the notation of Triton's signatures."""
    if arg in constants:
        return "constexpr"
    if arg in ("x", "q", "k"):
        return f"*{kind}"
    if arg in ("centre", "means", "alike", "mass", "lse", "columns", "sums", "scratch"):
        return "*fp32"
    return "fp32" if arg == "factor" else "i32"
