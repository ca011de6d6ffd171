r"""XAttention: blocks are chosen by the sums along the antidiagonals of the score matrix.

Source: Xu et al. 2025, arXiv:2503.16428; code https://github.com/mit-han-lab/x-attention.
"""

import numpy as np


def top_mass(mass, threshold, always):
    """The fewest blocks of each row, `always` first, that hold a share `threshold` of its mass, as a mask."""
    # compared with 11 significant bits, so that rounding breaks no tie: of equals the first goes first
    rank = (np.where(always, np.inf, mass).astype(np.float32).view(np.int32) + 4096) >> 13
    order = np.argsort(-rank, axis=-1, kind="stable")
    sorted_mass = np.take_along_axis(mass, order, -1)
    before = np.cumsum(sorted_mass, -1) - sorted_mass
    take = (before < threshold * mass.sum(-1, keepdims=True)) | (threshold >= 1)
    chosen = always.copy()
    np.put_along_axis(chosen, order, take | np.take_along_axis(always, order, -1), -1)
    return chosen


def choose(a, *, block_size, stride, threshold):
    """Blocks for the antidiagonal sums a [B, H, R, R] of the scores, R tiles a side, as [B, H, NQ, NQ]."""
    (B, H, R, _), n = a.shape, block_size // stride
    i, NQ = np.arange(R), -(-R // n)
    a = np.where(i <= i[:, None], a, -np.inf)
    p = np.exp(a - a.max(-1, keepdims=True, initial=-np.inf))
    p = p / p.sum(-1, keepdims=True)
    # (2) mass of a block: the sum over its tiles
    pad = NQ * n - R
    p = np.pad(p, ((0, 0), (0, 0), (0, pad), (0, pad)))
    mass = p.reshape(B, H, NQ, n, NQ, n).sum((3, 5))
    I, J = np.arange(NQ)[:, None], np.arange(NQ)
    # (3) the first block and the query's own are always kept
    always = np.broadcast_to((J == 0) | (J == I), mass.shape)
    return top_mass(mass, threshold, always) & (J <= I)


def select(q, k, *, block_size=128, stride=8, threshold=0.9, scale=None):
    r"""Blocks that each block of queries sees, from sums that a reshape turns into one product.

    .. math:: \tilde q_i = [\,q_{iS + S - 1 - s}\,]_{s<S}, \quad \tilde k_j = [\,k_{jS + s}\,]_{s<S}, \quad
        \hat A = \operatorname{softmax}(s\,\tilde q_i^\top \tilde k_j / S)

    Args: as `quadratic`.

    Returns:
        A mask, [B, H, NQ, NQ], NQ = ceil(T / block_size).

    Cost: 2 B H T^2 K / S FLOPs in the product.
    Source: Xu et al. 2025.
    """
    (B, T, H, K), S = q.shape, stride
    R, scale = -(-T // S), K**-0.5 if scale is None else scale
    pad = ((0, 0), (0, R * S - T), (0, 0), (0, 0))
    k = np.pad(k.repeat(H // k.shape[2], axis=2), pad).reshape(B, R, S, H, K)
    q = np.pad(q, pad).reshape(B, R, S, H, K)[:, :, ::-1]
    # (1) [B, R, S, H, K] x [B, R, S, H, K] -> [B, H, R, R]
    a = (scale / S) * np.einsum("bishk,bjshk->bhij", q, k)
    return choose(a, block_size=block_size, stride=stride, threshold=threshold)


def quadratic(q, k, v, *, block_size=128, stride=8, threshold=0.9, scale=None):
    r"""Full attention under a mask of blocks, chosen by the antidiagonals of the whole score matrix.

    .. math:: a_{ij} = \frac1S \sum_{s<S} S_{iS + S - 1 - s,\ jS + s}, \quad
        m_{IJ} = \sum_{i \in I,\, j \in J} \operatorname{softmax}_{j \le i}(a_i)_j

    A block of queries keeps the first block, its own, and the fewest others with which their mass reaches
    the threshold.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        block_size: tokens in a block, a multiple of the stride.
        stride: S, side of the tiles whose antidiagonals are summed.
        threshold: share of the mass to reach, in (0, 1]; 1 keeps every block.
        scale: of the scores; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 6) FLOPs and the choice: the mask hides work, it saves none.
    Source: Xu et al. 2025; the two blocks that are always kept are those of the released code.
    """
    (B, T, H, K), S, G = q.shape, stride, q.shape[2] // k.shape[2]
    R, scale = -(-T // S), K**-0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = scale * np.einsum("bthk,bjhk->bhtj", q, k)
    tiles = np.pad(s, ((0, 0), (0, 0), (0, R * S - T), (0, R * S - T))).reshape(B, H, R, S, R, S)
    # (1) antidiagonals, upside down diagonals
    a = np.einsum("bhisjs->bhij", tiles[:, :, :, ::-1]) / S
    chosen = choose(a, block_size=block_size, stride=S, threshold=threshold)
    t = np.arange(T)
    see = chosen[:, :, t // block_size][..., t // block_size] & (t <= t[:, None])
    s = np.where(see, s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, H, T, T] x [B, T, H, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bjhv->bhtv", p, v) / l
    return o.swapaxes(1, 2), (m + np.log(l))[..., 0].swapaxes(1, 2)


def blockwise(q, k, v, *, block_size=128, stride=8, threshold=0.9, scale=None):
    """The reshape chooses; then one pass over the blocks of keys, with a running softmax.

    Args and returns: as `quadratic`.

    Cost: B H n (2 K + 2 V + 5) FLOPs beside the choice, n pairs in all blocks up to the diagonal: a kernel
        leaves out those that were not chosen.
    Source: Xu et al. 2025.
    """
    (B, T, H, K), V, G, BS = q.shape, v.shape[3], q.shape[2] // k.shape[2], block_size
    scale = K**-0.5 if scale is None else scale
    chosen = select(q, k, block_size=BS, stride=stride, threshold=threshold, scale=scale)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for i in range(0, T, BS):
        t, n = np.arange(i, min(i + BS, T)), min(BS, T - i)
        m, l, b_o = np.full((B, H, n), -np.inf), np.zeros((B, H, n)), np.zeros((B, H, n, V))
        for j in range(0, i + 1, BS):
            u = np.arange(j, min(j + BS, T))
            see = chosen[:, :, i // BS, j // BS, None, None] & (u <= t[:, None])
            # [B, n, H, K] x [B, BS, H, K] -> [B, H, n, BS]
            s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q[:, t], k[:, u]), -np.inf)
            top = np.maximum(m, s.max(-1))
            p, shrink = np.exp(s - top[..., None]), np.exp(m - top)
            l = l * shrink + p.sum(-1)
            # [B, H, n, BS] x [B, BS, H, V] -> [B, H, n, V]
            b_o = b_o * shrink[..., None] + np.einsum("bhtj,bjhv->bhtv", p, v[:, u])
            m = top
        o[:, t] = (b_o / l[..., None]).swapaxes(1, 2)
        lse[:, t] = (m + np.log(l)).swapaxes(1, 2)
    return o, lse


def cost(*, form, B, T, H, K, V, HKV=None, block_size=128, stride=8, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "blockwise".
        B, T, H, K, V, HKV: sizes.
        block_size, stride: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q and k read for the choice and, with v, for the attention, o and lse written once, and
        for `quadratic` scores and weights written and read; state_bytes: all keys and values, since a later
        block of queries may choose any block.
    """
    HKV, R, NQ, rows = HKV or H, -(-T // stride), -(-T // block_size), B * T * H
    tiles, blocks = B * H * R * R, B * H * NQ * NQ
    # softmax over tiles, sums over blocks; of the sorted masses: cumulated, less itself, summed, threshold
    choice = 5 * tiles + B * H * (NQ * (block_size // stride)) ** 2 + 3 * blocks + B * H * NQ
    if form == "quadratic":
        choice += tiles * (stride + 1)
        # scale, maximum, difference, exp, sum
        flops = rows * T * (2 * K + 2 * V + 5) + rows * (V + 2)
    else:
        choice += tiles * (2 * K * stride + 1)
        starts = range(0, T, block_size)
        sizes = [min(block_size, T - i) for i in starts]
        pairs = sum(n * (i + n) for i, n in zip(starts, sizes, strict=True))
        steps = sum(n * (i // block_size + 1) for i, n in zip(starts, sizes, strict=True))
        flops = B * H * (pairs * (2 * K + 2 * V + 5) + steps * (2 * V + 5)) + rows * (V + 2)
    items = rows * (2 * K + V + 1) + B * T * HKV * (2 * K + V) + (4 * rows * T if form == "quadratic" else 0)
    return {
        "flops": flops + choice,
        "bytes": items * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
