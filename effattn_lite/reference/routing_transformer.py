r"""Routing Transformer: every cluster calls its nearest tokens together, and they attend to one another.

Source: Roy et al. 2020, arXiv:2003.05997.
"""

import numpy as np


def layer_norm(x):
    """Mean 0 and variance 1 over the last axis, without scale and bias: every token's length is sqrt(K)."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def members(x, centroids, *, window):
    r"""Tokens of each cluster: the w that lie nearest to its centroid, as many from every text.

    .. math:: \mathcal C_m = \operatorname{top}_w\, \mu_m^\top \operatorname{LN}(x_t)

    Args:
        x: queries or keys, [B, T, H, K].
        centroids: mu, [H, M, K], of one length.
        window: w, tokens in a cluster; ties go to the earlier token.

    Returns:
        Positions, [B, H, M, min(w, T)], rising.

    Cost: 2 B H T M K FLOPs.
    Source: Roy et al. 2020, arXiv:2003.05997.
    """
    # [B, T, H, K] x [H, M, K] -> [B, H, M, T]
    score = np.einsum("bthk,hmk->bhmt", layer_norm(x), centroids)
    # compared in float32, so that rounding of float64 breaks no tie
    best = np.argsort(-score.astype(np.float32), axis=-1, kind="stable")
    return np.sort(best[..., :window], axis=-1)


def update(centroids, q, k, *, decay):
    r"""Centroids after a step of spherical k-means: a moving average of the tokens nearest to them.

    .. math:: \mu_m \leftarrow \sqrt K\, \frac{\mu'_m}{\lVert \mu'_m \rVert}, \qquad
        \mu'_m = \lambda \mu_m + (1 - \lambda) \operatorname{mean}_{x:\, m(x) = m} \operatorname{LN}(x), \\
        m(x) = \operatorname{argmax}_m\, \mu_m^\top \operatorname{LN}(x)

    Args:
        centroids: mu, [H, M, K]; one that is nearest to no token stays.
        q, k: queries and keys, [B, T, H, K]; the mean is over both.
        decay: lambda, from 0 to 1.

    Returns:
        The new centroids, [H, M, K].

    Source: Roy et al. 2020, arXiv:2003.05997.
    """
    x = np.concatenate((layer_norm(q), layer_norm(k)), axis=1)
    nearest = np.einsum("bthk,hmk->bthm", x, centroids).astype(np.float32).argmax(-1)
    own = nearest[..., None] == np.arange(centroids.shape[1])  # [B, 2 T, H, M]
    n = own.sum((0, 1))[..., None]
    mean = np.einsum("bthm,bthk->hmk", own, x) / np.maximum(n, 1)
    moved = decay * centroids + (1 - decay) * mean
    moved = moved * np.sqrt(q.shape[3] / (moved * moved).sum(-1, keepdims=True))
    return np.where(n > 0, moved, centroids)


def quadratic(q, k, v, *, centroids, window, causal=True, scale=None):
    r"""Full attention under the mask of each cluster, then the mean over a token's clusters.

    .. math:: o_t = \operatorname{mean}_{m:\, t \in \mathcal C_m} \sum_{j \in \mathcal C_m,\, j \le t}
        \operatorname{softmax}_j\bigl(s \operatorname{LN}(q_t)^\top \operatorname{LN}(k_j)\bigr)\, v_j

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        centroids, window: as in `members`.
        causal: queries choose the cluster's tokens and j <= t; else keys have members of their own.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the sum of the denominators of a token's clusters; a
        token in no cluster has o = 0 and lse = -inf.

    Cost: B H T^2 (2 K + 1 + M (2 V + 4)) FLOPs beyond those of the members: the masks save none.
    Source: Roy et al. 2020, arXiv:2003.05997.
    """
    t = np.arange(q.shape[1])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    rows = members(q, centroids, window=window)
    columns = rows if causal else members(k, centroids, window=window)
    asks, told = ((x[..., None] == t).any(3) for x in (rows, columns))  # [B, H, M, T]
    see = asks[..., None] & told[..., None, :] & ((t <= t[:, None]) | (not causal))
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = scale * np.einsum("bthk,bjhk->bhtj", layer_norm(q), layer_norm(k))
    s = np.where(see, s[:, :, None], -np.inf)  # [B, H, M, T, T]
    m = s.max(-1, keepdims=True)
    m = np.where(np.isfinite(m), m, 0)  # a row that sees nothing: exp(-inf - 0) = 0
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    full = np.where(l > 0, l, 1)
    # [B, H, M, T, T] x [B, T, H, V] -> [B, H, M, T, V]
    o = np.einsum("bhmtj,bjhv->bhmtv", p, v) / full
    return mean(o.sum(2), np.where(l > 0, m + np.log(full), -np.inf)[..., 0])


def gathered(q, k, v, *, centroids, window, causal=True, scale=None):
    """Cluster by cluster: fetch its tokens, attend among them, add what they found to their outputs.

    The members stand in the order of the text, so a lower triangle makes the attention causal.

    Args and returns: as `quadratic`.

    Cost: B H M w^2 (2 K + 2 V + 5) FLOPs beyond those of the members: T sqrt(T) at M = w = sqrt(T).
    Source: Roy et al. 2020, arXiv:2003.05997.
    """
    (B, T, H, K), V, M = q.shape, v.shape[3], centroids.shape[1]
    scale = K**-0.5 if scale is None else scale
    rows = members(q, centroids, window=window)
    columns = rows if causal else members(k, centroids, window=window)
    q, k = layer_norm(q), layer_norm(k)
    o, lse = np.zeros((B, H, T, V)), np.full((B, H, M, T), -np.inf)
    for b, h, c in np.ndindex(B, H, M):
        i, j = rows[b, h, c], columns[b, h, c]
        # [w, K] @ [K, w] -> [w, w]
        s = scale * (q[b, i, h] @ k[b, j, h].T)
        s = np.where((j <= i[:, None]) | (not causal), s, -np.inf)
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [w, w] @ [w, V] -> [w, V]
        o[b, h, i] += p @ v[b, j, h] / l
        lse[b, h, c, i] = (m + np.log(l))[:, 0]
    return mean(o, lse)


def mean(o, lse):
    """The mean of a token's outputs, from their sum o [B, H, T, V], and the log of its denominators' sum.

    lse is [B, H, M, T], -inf in the clusters that a token is not in; returns [B, T, H, V] and [B, T, H].
    """
    n = np.isfinite(lse).sum(2)
    m = np.where(n > 0, lse.max(2), 0)
    l = np.exp(lse - m[:, :, None]).sum(2)
    o = o / np.maximum(n, 1)[..., None]
    lse = np.where(n > 0, m + np.log(np.where(n > 0, l, 1)), -np.inf)
    return o.swapaxes(1, 2), lse.swapaxes(1, 2)


def cost(*, form, B, T, H, K, V, M, window, causal=True, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "gathered".
        B, T, H, K, V, M: sizes.
        window, causal: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v and the centroids read and o, lse written once, the products with the centroids
        written and read, and for `quadratic` scores and weights of each cluster, for `gathered` each
        cluster's q, k, v, o and lse written and read; state_bytes: all keys and values: a later token may
        meet any of them in a cluster.
    """
    rows, w, sides = B * T * H, min(window, T), 1 if causal else 2
    # mean (K + 1), difference, square, its mean, epsilon, root, division; of q and k, and once more to choose
    norms = (2 + sides) * rows * (5 * K + 4)
    choice = sides * rows * M * (2 * K + 1)
    # division of the outputs; maximum, difference, exp, sum of the clusters; lse
    merged = rows * (V + 4 * M + 2)
    once = rows * (2 * K + 2 * V + 1) + H * M * K + 2 * sides * rows * M
    if form == "quadratic":
        flops = rows * T * (2 * K + 1 + M * (2 * V + 4)) + rows * M * (V + 2) + rows * M * V
        items = once + 2 * rows * T * (1 + 2 * M)
    else:
        flops = B * H * M * (w * w * (2 * K + 2 * V + 5) + w * (2 * V + 2))
        items = once + 2 * B * H * M * w * (2 * K + 3 * V + 1)
    return {
        "flops": norms + choice + merged + flops,
        "bytes": items * itemsize,
        "state_bytes": rows * (K + V) * itemsize,
    }
