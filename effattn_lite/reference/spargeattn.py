r"""SpargeAttn: blocks of alike tokens are judged by their means; a second filter sits in the softmax.

Source: Zhang et al. 2025, arXiv:2502.18137; code https://github.com/thu-ml/SpargeAttn.
"""

import numpy as np


def likeness(x, BS, floor):
    """Mean cosine of all pairs of tokens in a block, [B, NB, H]; one no longer than `floor` counts as 0."""
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    unit = np.where(length > floor, x / np.where(length > floor, length, 1), 0)
    # the mean of all products is the square of the mean
    return np.stack([(unit[:, i : i + BS].mean(1) ** 2).sum(-1) for i in range(0, x.shape[1], BS)], 1)


def block_means(x, BS):
    """Means [B, NB, H, K] of the blocks of x [B, T, H, K]; the last block may be cut short."""
    return np.stack([x[:, i : i + BS].mean(1) for i in range(0, x.shape[1], BS)], 1)


def top_cdf(p, threshold):
    """The largest of each row, added up while they stay within the threshold; at least one."""
    # compared with 11 significant bits, so that rounding breaks no tie: of equals the first goes first
    rank = (p.astype(np.float32).view(np.int32) + 4096) >> 13
    order = np.argsort(-rank, axis=-1, kind="stable")
    take = np.cumsum(np.take_along_axis(p, order, -1), -1) <= threshold
    take = take | (np.arange(p.shape[-1]) == 0) | (threshold >= 1)
    return np.take_along_axis(take, np.argsort(order, -1), -1)


def select(q, k, *, query_block_size=128, block_size=64, similarity=0.6, threshold=0.98, scale=None):
    r"""First filter: blocks that each block of queries sees, as `quadratic` says.

    Args: as `quadratic`.

    Returns:
        A mask, [B, H, NQ, NK], NQ = ceil(T / query_block_size), NK = ceil(T / block_size).

    Cost: 2 B H T^2 K / (B_Q B_K) FLOPs in the product, B T K (5 H + 9 HKV) for means and likeness.
    Source: Zhang et al. 2025; likeness and centred keys as in the released code.
    """
    QS, BS, G = query_block_size, block_size, q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    full = np.sqrt((k * k).sum(-1, keepdims=True))
    # the mean key moves all scores of a row alike, but would make all keys look alike
    k = k - k.mean(1, keepdims=True)
    like_q = likeness(q, QS, 0).swapaxes(1, 2) > similarity  # [B, H, NQ]
    # a centred key that is mere rounding has no direction
    like_k = likeness(k, BS, full / 1024).swapaxes(1, 2).repeat(G, axis=1) > similarity  # [B, H, NK]
    # (1) [B, NQ, H, K] x [B, NK, H, K] -> [B, H, NQ, NK]
    s = scale * np.einsum("bihk,bjhk->bhij", block_means(q, QS), block_means(k, BS).repeat(G, axis=2))
    i, j = np.arange(s.shape[2])[:, None], np.arange(s.shape[3])
    past = j * BS < (i + 1) * QS
    s = np.where(past & like_k[:, :, None], s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-1e30)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    # (2) what is not alike cannot be judged, so it is seen
    chosen = top_cdf(p / np.where(l > 0, l, 1), threshold) | ~like_q[..., None] | ~like_k[:, :, None]
    return chosen & past


def quadratic(
    q, k, v, *, query_block_size=128, block_size=64, similarity=0.6, threshold=0.98, skip=-50.0, scale=None
):
    r"""Full attention under a mask of blocks; a second filter leaves products with V out that add nothing.

    .. math:: \hat P = \operatorname{softmax}(s\,\bar q\,\bar k^\top), \quad
        O \leftarrow O + P_{IJ} V_J \ \text{ only if } \max_{t \in I}(m^J_t - m_t) > \lambda

    A block of keys is judged by its mean if the mean cosine of its tokens is above the similarity, and seen
    otherwise; a block of queries sees all if its own is not. m_t is the running maximum of row t's scores up
    to block J, m^J_t that of the block; I is a quarter of a block of queries, the rows of one warp.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        query_block_size: B_Q, queries that share a choice.
        block_size: B_K, keys in a block.
        similarity: theta, mean cosine above which a block is judged by its mean.
        threshold: tau, share of the estimated mass within which blocks are taken; 1 keeps every block.
        skip: lambda < 0, in nats; -inf skips nothing.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H]: of all chosen pairs, also those whose product was left out. A
        row whose blocks all lie ahead of it has o = 0, lse = -inf.

    Cost: B H T^2 (2 K + 2 V + 7) FLOPs and the choice: the mask hides work, it saves none.
    Source: Zhang et al. 2025.
    """
    (B, T, H, _), G, QS, BS = q.shape, q.shape[2] // k.shape[2], query_block_size, block_size
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(
        q, k, query_block_size=QS, block_size=BS, similarity=similarity, threshold=threshold, scale=scale
    )
    k, v, rows, NK = k.repeat(G, axis=2), v.repeat(G, axis=2), max(QS // 4, 1), chosen.shape[3]
    t = np.arange(T)
    see = chosen[:, :, t // QS][..., t // BS] & (t <= t[:, None])
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q, k), -np.inf)
    # (3) how far each block's maximum lies under the running one, in every warp
    pad = np.pad(s, ((0, 0), (0, 0), (0, 0), (0, NK * BS - T)), constant_values=-np.inf)
    local = pad.reshape(B, H, T, NK, BS).max(-1)
    gap = local - np.maximum(np.maximum.accumulate(local, -1), -1e30)
    starts = np.array([i for a in range(0, T, QS) for i in range(a, min(a + QS, T), rows)])
    keep = np.maximum.reduceat(gap, starts, axis=2) > skip  # [B, H, warps, NK]
    keep = keep.repeat(np.diff([*starts, T]), axis=2)[..., t // BS]
    m = s.max(-1, keepdims=True, initial=-1e30)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    full = np.where(l > 0, l, 1)
    # [B, H, T, T] x [B, T, H, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bjhv->bhtv", np.where(keep, p, 0), v) / full
    return o.swapaxes(1, 2), np.where(l > 0, m + np.log(full), -np.inf)[..., 0].swapaxes(1, 2)


def tiled(
    q, k, v, *, query_block_size=128, block_size=64, similarity=0.6, threshold=0.98, skip=-50.0, scale=None
):
    """One pass over the blocks of keys, with a running softmax: a warp leaves out what its rows do not need.

    Args and returns: as `quadratic`.

    Cost: B H n (2 K + 2 V + 5) FLOPs beside the choice, n pairs in all blocks up to the diagonal: a kernel
        leaves out those that the filters drop.
    Source: Zhang et al. 2025.
    """
    (B, T, H, _), V, G, QS, BS = q.shape, v.shape[3], q.shape[2] // k.shape[2], query_block_size, block_size
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(
        q, k, query_block_size=QS, block_size=BS, similarity=similarity, threshold=threshold, scale=scale
    )
    k, v, rows = k.repeat(G, axis=2), v.repeat(G, axis=2), max(QS // 4, 1)
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    starts = [i for a in range(0, T, QS) for i in range(a, min(a + QS, T), rows)]
    for i, end in zip(starts, [*starts[1:], T], strict=True):
        t, n = np.arange(i, end), end - i
        # a row that sees nothing keeps this maximum: exp(-inf + 1e30) = 0
        m, l, b_o = np.full((B, H, n), -1e30), np.zeros((B, H, n)), np.zeros((B, H, n, V))
        for j in range(0, end, BS):
            u = np.arange(j, min(j + BS, T))
            see = chosen[:, :, i // QS, j // BS, None, None] & (u <= t[:, None])
            # [B, n, H, K] x [B, BS, H, K] -> [B, H, n, BS]
            s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q[:, t], k[:, u]), -np.inf)
            local = s.max(-1)
            top = np.maximum(m, local)
            p, shrink = np.exp(s - top[..., None]), np.exp(m - top)
            l = l * shrink + p.sum(-1)
            keep = (local - top).max(-1)[..., None, None] > skip
            # [B, H, n, BS] x [B, BS, H, V] -> [B, H, n, V]
            b_o = b_o * shrink[..., None] + np.einsum("bhtj,bjhv->bhtv", np.where(keep, p, 0), v[:, u])
            m = top
        full = np.where(l > 0, l, 1)
        o[:, t] = (b_o / full[..., None]).swapaxes(1, 2)
        lse[:, t] = np.where(l > 0, m + np.log(full), -np.inf).swapaxes(1, 2)
    return o, lse


def cost(*, form, B, T, H, K, V, HKV=None, query_block_size=128, block_size=64, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "tiled".
        B, T, H, K, V, HKV: sizes.
        query_block_size, block_size: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q and k read for the choice and, with v, for the attention, o and lse written once, and
        for `quadratic` scores and weights written and read; state_bytes: all keys and values, since a later
        block of queries may choose any block.
    """
    HKV, QS, BS, rows = HKV or H, query_block_size, block_size, B * T * H
    NQ, NK = -(-T // QS), -(-T // BS)
    # lengths, directions and their means, means; keys are measured before they are centred as well
    choice = B * T * (H * (5 * K + 1) + HKV * (9 * K + 3)) + B * (4 * H * NQ + 4 * HKV * NK + HKV) * K
    # scores of means: scale, softmax, mass added up
    choice += B * H * NQ * NK * (2 * K + 7)
    if form == "quadratic":
        blocks = rows * NK
        flops = rows * T * (2 * K + 2 * V + 5) + blocks * (BS + 4) + rows * (V + 2)
    else:
        starts = [i for a in range(0, T, QS) for i in range(a, min(a + QS, T), max(QS // 4, 1))]
        ends = [*starts[1:], T]
        keys = [min(-(-end // BS) * BS, T) for end in ends]
        pairs = sum((end - i) * n for i, end, n in zip(starts, ends, keys, strict=True))
        steps = sum((end - i) * -(-n // BS) for i, end, n in zip(starts, ends, keys, strict=True))
        flops = B * H * (pairs * (2 * K + 2 * V + 5) + steps * (2 * V + 7)) + rows * (V + 2)
    items = rows * (2 * K + V + 1) + B * T * HKV * (2 * K + V) + (4 * rows * T if form == "quadratic" else 0)
    return {
        "flops": flops + choice,
        "bytes": items * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
