r"""MInference, vertical-slash pattern: whole columns and whole diagonals of the score matrix are kept.

Source: Jiang et al. 2024, arXiv:2407.02490; code https://github.com/microsoft/MInference.
"""

import numpy as np


def top_k(mass, n, always):
    """The n largest of each row as ascending numbers [..., n], the first `always` of them in any case."""
    mass = np.where(np.arange(mass.shape[-1]) < always, np.inf, mass)
    # compared with 11 significant bits, so that rounding breaks no tie: of equals the first goes first
    rank = (mass.astype(np.float32).view(np.int32) + 4096) >> 13
    return np.sort(np.argsort(-rank, axis=-1, kind="stable")[..., :n], -1)


def select(q, k, *, columns=1000, diagonals=6096, sinks=30, window=30, last_queries=64, scale=None):
    r"""Columns and diagonals on which the last queries put most weight.

    .. math:: \hat A = \operatorname{softmax}(s\,Q_{[-L:]} K^\top), \quad
        v_j = \sum_i \hat A_{ij}, \quad s_\delta = \sum_i \hat A_{i,\,i-\delta}

    Args: as `quadratic`.

    Returns:
        The columns, [B, H, min(columns, T)], and the diagonals, [B, H, min(diagonals, T)], as ascending
        numbers of keys j and of distances delta = t - j.

    Cost: 2 B H L T K FLOPs in the product.
    Source: Jiang et al. 2024.
    """
    T, L, G = q.shape[1], min(last_queries, q.shape[1]), q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    t, j = np.arange(T - L, T), np.arange(T)
    # [B, L, H, K] x [B, T, H, K] -> [B, H, L, T]
    s = scale * np.einsum("bthk,bjhk->bhtj", q[:, T - L :], k.repeat(G, axis=2))
    s = np.where(j <= t[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    # row i of the slanted weights is read from its own token backwards
    delta = t[:, None] - j
    slanted = np.where(delta >= 0, p[:, :, np.arange(L)[:, None], delta], 0)
    return top_k(p.sum(2), columns, sinks), top_k(slanted.sum(2), diagonals, window)


def quadratic(q, k, v, *, columns=1000, diagonals=6096, sinks=30, window=30, last_queries=64, scale=None):
    r"""Full attention under a mask: a token sees chosen columns, and keys at chosen distances.

    .. math:: \mathcal S(t) = \{j \le t : j \in \mathcal V \ \text{or}\ t - j \in \mathcal D\}

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        columns: size of V, for each head.
        diagonals: size of D, for each head.
        sinks: first columns that are always among them.
        window: nearest diagonals that are always among them, the token's own included.
        last_queries: L, queries at the end whose weights decide.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H]: the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs and the choice: the mask hides work, it saves none.
    Source: Jiang et al. 2024. The released kernel sees all pairs of each 64 x 64 block that a chosen
        diagonal crosses; here a diagonal is one pair a row.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(
        q, k, columns=columns, diagonals=diagonals, sinks=sinks, window=window,
        last_queries=last_queries, scale=scale,
    )  # fmt: skip
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    vertical, slash = (np.any(x[..., None] == np.arange(T), 2) for x in chosen)  # [B, H, T]
    delta = np.arange(T)[:, None] - np.arange(T)
    see = (delta >= 0) & (vertical[:, :, None] | slash[:, :, delta])
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q, k), -np.inf)
    m = s.max(-1, keepdims=True)
    m = np.where(np.isfinite(m), m, 0)  # a row that sees nothing: exp(-inf - 0) = 0
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, H, T, T] x [B, T, H, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bjhv->bhtv", p, v) / np.where(l > 0, l, 1)
    lse = np.where(l > 0, m + np.log(np.where(l > 0, l, 1)), -np.inf)
    return o.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)


def gathered(q, k, v, *, columns=1000, diagonals=6096, sinks=30, window=30, last_queries=64, scale=None):
    """Gathers the keys of the columns and of the diagonals; a pair on both is counted with the diagonal.

    Args and returns: as `quadratic`.

    Cost: B H T n (2 K + 2 V + 5) FLOPs and the choice, n = columns + diagonals.
    Source: Jiang et al. 2024.
    """
    (B, T, H, _), G = q.shape, q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    vertical, slash = select(
        q, k, columns=columns, diagonals=diagonals, sinks=sinks, window=window,
        last_queries=last_queries, scale=scale,
    )  # fmt: skip
    k, v = (x.repeat(G, axis=2).swapaxes(1, 2) for x in (k, v))  # [B, H, T, K]
    t, on = np.arange(T)[:, None], np.any(slash[..., None] == np.arange(T), 2)  # on: [B, H, T]
    # keys of each row: the columns, then the diagonals, [B, H, T, n]
    j = np.concatenate((vertical[:, :, None] + 0 * t, t - slash[:, :, None]), -1)
    b, h = np.arange(B)[:, None, None, None], np.arange(H)[:, None, None]
    see = j >= 0
    column = np.arange(j.shape[3]) < vertical.shape[2]
    see &= (j <= t) & ~(column & on[b, h, np.maximum(t - j, 0)])
    # [B, T, H, K] x [B, H, T, n, K] -> [B, H, T, n]
    s = np.where(see, scale * np.einsum("bthk,bhtjk->bhtj", q, k[b, h, j]), -np.inf)
    m = s.max(-1, keepdims=True)
    m = np.where(np.isfinite(m), m, 0)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    # [B, H, T, n] x [B, H, T, n, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bhtjv->bhtv", p, v[b, h, j]) / np.where(l > 0, l, 1)
    lse = np.where(l > 0, m + np.log(np.where(l > 0, l, 1)), -np.inf)
    return o.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)


def cost(
    *, form, B, T, H, K, V, HKV=None, columns=1000, diagonals=6096, last_queries=64, itemsize=2, **_sizes
):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "gathered".
        B, T, H, K, V, HKV: sizes.
        columns, diagonals, last_queries: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once; for `quadratic` scores and weights written and
        read too, for `gathered` a key and a value for each pair instead of once; state_bytes: all keys and
        values, since decoding is dense.
    """
    HKV, rows, L = HKV or H, B * T * H, min(last_queries, T)
    n = T if form == "quadratic" else min(columns, T) + min(diagonals, T)
    read = B * T * HKV if form == "quadratic" else rows * n
    items = rows * (K + V + 1) + read * (K + V) + (4 * rows * T if form == "quadratic" else 0)
    return {
        # a score: scale, maximum, difference, exp, sum; the choice divides and sums twice as well
        "flops": rows * n * (2 * K + 2 * V + 5) + rows * (V + 2) + rows * L * (2 * K + 8),
        "bytes": items * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
