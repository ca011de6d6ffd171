r"""ClusterFormer: centroids that the network moves sort the words, and blocks of the sorted words attend.

Source: Wang et al. 2022, doi 10.18653/v1/2022.acl-long.170.
"""

import numpy as np


def cluster(x, centroids, w):
    r"""Centroids moved towards the words that are like them, and each word's most similar one.

    .. math:: C' = U X W, \quad U = \operatorname{softmax}_t(D^{-1/2}\, C X^\top), \qquad
        a_t = \operatorname{argmax}_m \cos(x_t, C'_m)

    Args:
        x: words, [B, T, D]; all heads share their clusters.
        centroids: C, [B, M, D], from the layer before.
        w: W, [D, D].

    Returns:
        C', [B, M, D], for the layer behind, and a, [B, T], integers; a tie goes to the lower cluster.

    Cost: B T M 4 D FLOPs of the move, B T M 2 D of the choice.
    Source: Wang et al. 2022; the softmax, the place of W and the cosine are this book's reading.
    """
    # [B, M, D] x [B, T, D] -> [B, M, T]
    s = np.einsum("bmd,btd->bmt", centroids, x) / x.shape[2] ** 0.5
    u = np.exp(s - s.max(-1, keepdims=True))
    u = u / u.sum(-1, keepdims=True)
    moved = np.einsum("bmt,btd->bmd", u, x) @ w
    # a word's own length changes all its similarities alike
    unit = moved / np.sqrt((moved * moved).sum(-1, keepdims=True) + 1e-6)
    # compared in float32, so that rounding of float64 breaks no tie
    return moved, np.einsum("btd,bmd->btm", x, unit).astype(np.float32).argmax(-1)


def quadratic(q, k, v, *, x, centroids, w, scale=None):
    r"""Full attention under a mask: a word sees its own block of the sorted words and the one before.

    .. math:: o_t = \sum_{j:\, 0 \le b_t - b_j \le 1} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j, \qquad
        b_t = \lfloor \operatorname{rank}(t) / n \rfloor, \quad n = \lceil T / M \rceil

    rank is the place after a stable sort by cluster. The first block has none before it and sees the second.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        x, centroids, w: as in `cluster`.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs and those of `cluster`: the mask hides work, it saves none.
    Source: Wang et al. 2022; that the second block of keys is the one before is this book's reading.
    """
    T, M = q.shape[1], centroids.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    order = np.argsort(cluster(x, centroids, w)[1], axis=1, kind="stable")
    block = np.argsort(order, axis=1) // -(-T // M)  # [B, T]
    back = np.maximum(block, 1)[:, :, None] - block[:, None]
    see = ((back >= 0) & (back <= 1))[..., None]  # [B, T, T, 1]
    # [B, T, H, K] x [B, T, H, K] -> [B, T, T, H]
    s = np.where(see, scale * np.einsum("bthk,bjhk->btjh", q, k), -np.inf)
    m = s.max(2, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(2)
    # [B, T, T, H] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("btjh,bjhv->bthv", p, v)
    return o / l[..., None], m[:, :, 0] + np.log(l)


def sorted_blocks(q, k, v, *, x, centroids, w, scale=None):
    """Block by block of the sorted words: dense attention to the block and its neighbour.

    Args and returns: as `quadratic`.

    Cost: 2 B H T n (2 K + 2 V + 5) FLOPs and those of `cluster`: T sqrt(T) at M = sqrt(T) clusters.
    Source: Wang et al. 2022.
    """
    (B, T, H, K), V, n = q.shape, v.shape[3], -(-q.shape[1] // centroids.shape[1])
    scale = K**-0.5 if scale is None else scale
    order = np.argsort(cluster(x, centroids, w)[1], axis=1, kind="stable")
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for b, i in np.ndindex(B, -(-T // n)):
        first = max(i, 1) - 1
        row, column = order[b, i * n : (i + 1) * n], order[b, first * n : (first + 2) * n]
        # [n, H, K] x [2 n, H, K] -> [n, 2 n, H]
        s = scale * np.einsum("thk,jhk->tjh", q[b, row], k[b, column])
        m = s.max(1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(1)
        # [n, 2 n, H] x [2 n, H, V] -> [n, H, V]
        o[b, row] = np.einsum("tjh,jhv->thv", p, v[b, column]) / l[..., None]
        lse[b, row] = m[:, 0] + np.log(l)
    return o, lse


def cost(*, form, B, T, H, K, V, D, M, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "sorted_blocks".
        B, T, H, K, V, D, M: sizes.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v, x, the centroids and W read and o, lse written once, the memberships written
        and read, and for `quadratic` scores and weights too, for `sorted_blocks` keys and values read again
        for each block that sees them; state_bytes: all of q, k, v and x: a new word moves every centroid, and
        so every block.
    """
    rows, n = B * T * H, -(-T // M)
    lengths = [min(n, T - start) for start in range(0, T, n)]
    seen = [sum(lengths[max(i, 1) - 1 : max(i, 1) + 1]) for i in range(len(lengths))]
    # products, division, maximum, difference, exp, sum, division; two sums; W; lengths; similarity
    choice = B * M * (T * (2 * D + 6) + 2 * T * D + 2 * D * D + 3 * D + 2 + 2 * T * D)
    once = rows * (2 * K + 2 * V + 1) + B * (T + 2 * M) * D + D * D + 2 * B * T * M
    pairs = B * H * sum(a * b for a, b in zip(lengths, seen, strict=True))
    items = once + B * H * sum(seen) * (K + V)
    if form == "quadratic":
        pairs, items = rows * T, once + 4 * rows * T
    return {
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        "flops": choice + pairs * (2 * K + 2 * V + 5) + rows * (V + 2),
        "bytes": items * itemsize,
        "state_bytes": B * T * (H * (2 * K + V) + D) * itemsize,
    }
