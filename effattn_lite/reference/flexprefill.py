r"""FlexPrefill: each head picks its pattern and its budget from what its last queries see.

Source: Lai et al. 2025, arXiv:2502.20766; code https://github.com/bytedance/FlexPrefill.
"""

import numpy as np


def place(mass):
    """Place of each entry in its row, 0 for the largest."""
    # compared with 11 significant bits, so that rounding breaks no tie: of equals the first goes first
    rank = (mass.astype(np.float32).view(np.int32) + 4096) >> 13
    return np.argsort(np.argsort(-rank, axis=-1, kind="stable"), axis=-1, kind="stable")


def fewest(mass, share):
    """How many of the largest entries of a row hold a share of its mass 1."""
    mass = np.sort(mass, -1)[..., ::-1]
    return ((np.cumsum(mass, -1) - mass < share) | (share >= 1)).sum(-1)


def softmax(s):
    """Weights of scores along the last axis."""
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def block_means(x, BS):
    """Means [B, NB, H, K] of the blocks of x [B, T, H, K]; the last block may be cut short."""
    return np.stack([x[:, i : i + BS].mean(1) for i in range(0, x.shape[1], BS)], 1)


def last_weights(q, k, BS, scale):
    """Mean weight that the last BS queries give each key, and each distance, [B, H, T]."""
    T = q.shape[1]
    t, j = np.arange(T - BS, T), np.arange(T)
    # [B, BS, H, K] x [B, T, H, K] -> [B, H, BS, T]
    s = scale * np.einsum("bthk,bjhk->bhtj", q[:, T - BS :], k)
    p = softmax(np.where(j <= t[:, None], s, -np.inf)) / BS
    delta = t[:, None] - j
    # row i of the slanted weights is read from its own token backwards
    slanted = np.where(delta >= 0, p[:, :, np.arange(BS)[:, None], delta], 0)
    return p.sum(2), slanted.sum(2)


def select(q, k, *, gamma=0.9, tau=0.1, min_budget=1024, block_size=128, scale=None):
    r"""Blocks that each block of queries sees, as `quadratic` says.

    Args: as `quadratic`.

    Returns:
        A mask, [B, H, NB, NB], NB = ceil(T / block_size).

    Cost: 2 B H T K (BS + T / BS^2) FLOPs in products.
    Source: Lai et al. 2025, and the released code for the constants.
    """
    (B, T, H, K), BS = q.shape, block_size
    NB, least, scale = -(-T // BS), -(-min_budget // BS), K**-0.5 if scale is None else scale
    I, J = np.arange(NB)[:, None], np.arange(NB)
    if T <= BS * max(2, least):
        return np.broadcast_to(J <= I, (B, H, NB, NB))
    k = k.repeat(H // k.shape[2], axis=2)
    columns, slashes = last_weights(q, k, BS, scale)
    pad = ((0, 0), (0, 0), (0, NB * BS - T))
    a, b = (np.pad(x, pad).reshape(B, H, NB, BS).sum(-1) for x in (columns, slashes))
    # (1) how far the estimate from means is from the truth on the last block, Jensen-Shannon
    pooled_k = block_means(k, BS)
    e = softmax(scale * np.einsum("bhk,bjhk->bhj", q[:, T - BS :].mean(1), pooled_k))
    m = (a + e) / 2
    jsd = sum((x * np.log(np.where(x > 0, x / m, 1))).sum(-1) for x in (a, e)) / 2
    aware = np.maximum(jsd, 0) < tau**2  # [B, H]
    # (2) columns and diagonals: as many tokens as hold gamma of the mass, in blocks
    n, d = (np.where(aware, least, np.maximum(fewest(x, gamma) // BS + 1, least)) for x in (columns, slashes))
    # the first block of columns and the main diagonal in any case
    a, b = (place(np.where(J == 0, np.inf, x)) for x in (a, b))
    chosen = (a < n[..., None])[:, :, None] | (b < d[..., None])[..., np.maximum(I - J, 0)]
    # (3) query-aware heads: one list of all pairs of blocks as well
    s = scale * np.einsum("bihk,bjhk->bhij", block_means(q, BS), pooled_k)
    p = softmax(np.where(J <= I, s, -np.inf)).reshape(B, H, -1)
    order = np.argsort(place(p), -1)
    p = np.take_along_axis(p, order, -1)
    take = ((np.cumsum(p, -1) - p < gamma * NB) | (gamma >= 1)) & aware[..., None]
    flat = np.take_along_axis(take, np.argsort(order, -1), -1)
    return (chosen | flat.reshape(chosen.shape)) & (J <= I)


def quadratic(q, k, v, *, gamma=0.9, tau=0.1, min_budget=1024, block_size=128, scale=None):
    r"""Full attention under a mask of blocks: columns and diagonals of blocks, or blocks one by one.

    .. math:: \hat a = \textstyle\sum_{j \in J} \frac1{B_S} \sum_{t > T - B_S} A_{tj}, \quad
        \bar a = \operatorname{softmax}(s\, \bar q\, \bar K^\top), \quad
        \text{query-aware if } \sqrt{\mathrm{JSD}(\bar a, \hat a)} < \tau

    A vertical-slash head counts the columns, and the diagonals, that hold gamma of the last queries' weight,
    n tokens, and keeps n // BS + 1 blocks of them, by their weight. A query-aware head keeps the fewest pairs
    of blocks that hold gamma of all rows' estimates together, and the least budget of the other two.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        gamma: share of the weight to reach, in (0, 1]; 1 keeps every block.
        tau: a head whose estimate is nearer to the truth than this is query-aware; 0: none is.
        min_budget: tokens in the columns, and in the diagonals, at least.
        block_size: BS, tokens in a block; up to 2 BS or min_budget tokens attention is full.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs and the choice: the mask hides work, it saves none.
    Source: Lai et al. 2025. The released code stops one pair short of gamma in query-aware heads, and counts
        diagonals from the oldest, which matters where T is no multiple of the block.
    """
    T, G, BS = q.shape[1], q.shape[2] // k.shape[2], block_size
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(q, k, gamma=gamma, tau=tau, min_budget=min_budget, block_size=BS, scale=scale)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    t = np.arange(T)
    see = chosen[:, :, t // BS][..., t // BS] & (t <= t[:, None])
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q, k), -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, H, T, T] x [B, T, H, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bjhv->bhtv", p, v) / l
    return o.swapaxes(1, 2), (m + np.log(l))[..., 0].swapaxes(1, 2)


def blockwise(q, k, v, *, gamma=0.9, tau=0.1, min_budget=1024, block_size=128, scale=None):
    """One pass over the blocks of keys, with a running softmax.

    Args and returns: as `quadratic`.

    Cost: B H n (2 K + 2 V + 5) FLOPs beside the choice, n pairs in all blocks up to the diagonal: a kernel
        leaves out those that were not chosen.
    Source: Lai et al. 2025.
    """
    (B, T, H, K), V, G, BS = q.shape, v.shape[3], q.shape[2] // k.shape[2], block_size
    scale = K**-0.5 if scale is None else scale
    chosen = select(q, k, gamma=gamma, tau=tau, min_budget=min_budget, block_size=BS, scale=scale)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for i in range(0, T, BS):
        t, n = np.arange(i, min(i + BS, T)), min(BS, T - i)
        m, l, b_o = np.full((B, H, n), -np.inf), np.zeros((B, H, n)), np.zeros((B, H, n, V))
        # the query's own block first: it is always chosen, so no row is empty
        for j in range(i, -1, -BS):
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


def choice_flops(*, B, T, H, K, min_budget=1024, block_size=128):
    """FLOPs of `select`."""
    BS, NB = block_size, -(-T // block_size)
    if T <= BS * max(2, -(-min_budget // BS)):
        return 0
    # scores, softmax, mean, the two sums and sums of blocks; sorted masses are cumulated
    weights = BS * T * (2 * K + 9) + 2 * NB * BS + 4 * T
    # means of keys, queries and of the last block; estimate; divergence
    estimate = K * (2 * T + BS + 2 * NB + 1) + NB * (2 * K + 6) + 10 * NB + 4
    pairs = NB * NB * (2 * K + 8)
    return B * H * (weights + estimate + pairs)


def cost(*, form, B, T, H, K, V, HKV=None, min_budget=1024, block_size=128, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "blockwise".
        B, T, H, K, V, HKV: sizes.
        min_budget, block_size: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q and k read for the choice and, with v, for the attention, o and lse written once, and
        for `quadratic` scores and weights written and read; state_bytes: all keys and values, since a later
        block of queries may choose any block.
    """
    HKV, rows = HKV or H, B * T * H
    choice = choice_flops(B=B, T=T, H=H, K=K, min_budget=min_budget, block_size=block_size)
    flops = choice + rows * (V + 2)
    if form == "quadratic":
        # scale, maximum, difference, exp, sum
        flops += rows * T * (2 * K + 2 * V + 5)
    else:
        starts = range(0, T, block_size)
        sizes = [min(block_size, T - i) for i in starts]
        pairs = sum(n * (i + n) for i, n in zip(starts, sizes, strict=True))
        steps = sum(n * (i // block_size + 1) for i, n in zip(starts, sizes, strict=True))
        flops += B * H * (pairs * (2 * K + 2 * V + 5) + steps * (2 * V + 5))
    items = rows * (2 * K + V + 1) + B * T * HKV * (2 * K + V) + (4 * rows * T if form == "quadratic" else 0)
    return {
        "flops": flops,
        "bytes": items * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
