r"""Rectified Sparse Attention: pages shared by a group of heads, and now and then a dense correction.

Source: Sun et al. 2025, arXiv:2506.04108.
"""

import numpy as np


def bounds(k, *, page_size):
    """Smallest and largest key of every whole page, channel by channel.

    Args:
        k: keys, [B, T, HKV, K].
        page_size: tokens in a page.

    Returns:
        low and high, [B, T // page_size, HKV, K] each.

    Cost: 2 B T HKV K FLOPs, minima and maxima; 2 K numbers kept a page and head.
    Source: Sun et al. 2025, arXiv:2506.04108; the bounds are Quest's.
    """
    whole = k.shape[1] // page_size * page_size
    pages = k[:, :whole].reshape(k.shape[0], -1, page_size, *k.shape[2:])
    return pages.min(2), pages.max(2)


def score(q, low, high):
    r"""What no key of a page can exceed in its product with the group's mean query.

    .. math:: \textstyle\sum_c \max(\bar q_c M_c,\, \bar q_c m_c), \qquad
        \bar q = \tfrac1G \sum_{h \in \mathrm{group}} q_h

    Args:
        q: queries, [B, T, H, K]; H = G HKV.
        low, high: m and M of P pages, [B, P, HKV, K].

    Returns:
        Bounds, [B, T, HKV, P].

    Cost: B T H K FLOPs for the means, 4 B T HKV K a page.
    Source: Sun et al. 2025, arXiv:2506.04108; the bound is Quest's.
    """
    (B, T, H, K), HKV = q.shape, low.shape[2]
    mean = q.reshape(B, T, HKV, H // HKV, K).mean(3)
    # [B, T, HKV, K] x [B, P, HKV, K] -> [B, T, HKV, P]
    s = np.einsum("bthk,bphk->bthp", np.where(mean > 0, mean, 0), high)
    return s + np.einsum("bthk,bphk->bthp", np.where(mean > 0, 0, mean), low)


def count(n, *, ratio=0.1, min_pages=16):
    """How many of n pages are read: a share of them, but not fewer than `min_pages` where there are so many.

    Args:
        n: pages so far, an integer or an array of them.
        ratio: share of the pages, in [0, 1].
        min_pages: fewest pages, >= 1.

    Returns:
        max(ceil(ratio n), min(n, min_pages)), of n's shape.

    Cost: none.
    Source: Sun et al. 2025, arXiv:2506.04108, the released code's count.
    """
    # a product that is whole but for its rounding is not rounded up
    return np.maximum(np.ceil(ratio * n - 1e-9).astype(int), np.minimum(n, min_pages))


def select(q, k, *, ratio=0.1, min_pages=16, page_size=16):
    """Pages of each query, the same for all heads of a group: the newest, and the past ones of largest bound.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        ratio, min_pages: as in `count`, of the pages up to the query.
        page_size: tokens in a page; a tie goes to the lower page.

    Returns:
        Page numbers, [B, T, HKV, n], the newest first, then the best; -1 where a query reads fewer.

    Cost: that of `bounds`, and of `score` for T // page_size pages.
    Source: Sun et al. 2025, arXiv:2506.04108.
    """
    T = q.shape[1]
    s = score(q, *bounds(k, page_size=page_size))
    # one column more: the newest page may be a part of one
    s = np.concatenate((s, np.full((*s.shape[:3], 1), -np.inf)), axis=-1)
    own, i = np.arange(T)[:, None, None] // page_size, np.arange(s.shape[3])
    s = np.where(i == own, np.inf, np.where(i < own, s, -np.inf))
    n = count(own + 1, ratio=ratio, min_pages=min_pages)
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the lower page first
    best = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., : n.max()]
    return np.where((best <= own) & (np.arange(best.shape[3]) < n), best, -1)


def quadratic(q, k, v, *, ratio=0.1, min_pages=16, page_size=16, scale=None):
    r"""Full attention under the mask of the chosen pages.

    .. math:: \mathcal S(t) = \{j \le t : \lfloor j / P \rfloor \in \mathcal I(t)\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q, k, ratio, min_pages, page_size: as in `select`.
        v: values, [B, T, HKV, V].
        scale: s; default K ** -0.5. The selection needs none.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Sun et al. 2025, arXiv:2506.04108.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(q, k, ratio=ratio, min_pages=min_pages, page_size=page_size)
    k, v, chosen = k.repeat(G, axis=2), v.repeat(G, axis=2), chosen.repeat(G, axis=2)
    j = np.arange(T)
    # [B, T, H, T]
    see = (chosen[..., None] == j // page_size).any(-2) & (j <= j[:, None, None])
    s = np.where(see, scale * np.einsum("bthk,bjhk->bthj", q, k), -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def decoded(q, k, v, *, ratio=0.1, min_pages=16, page_size=16, scale=None):
    """Token by token, as a model writes: choose pages for a whole group, gather them once, attend.

    Args and returns: as `quadratic`.

    Cost: that of `bounds`; for a token 4 B HKV p K FLOPs for p past pages, B H n (2 K + 2 V + 5) for n keys.
    Source: Sun et al. 2025, arXiv:2506.04108.
    """
    (B, T, H, K), HKV, V, P = q.shape, k.shape[2], v.shape[3], page_size
    scale = K**-0.5 if scale is None else scale
    low, high = np.zeros((B, T // P, HKV, K)), np.zeros((B, T // P, HKV, K))
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    b, h = np.arange(B)[:, None, None], np.arange(HKV)[:, None]
    for t in range(T):
        own = t // P
        s = score(q[:, t : t + 1], low[:, :own], high[:, :own])[:, 0]  # [B, HKV, own]
        n = count(own + 1, ratio=ratio, min_pages=min_pages) - 1
        best = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., :n]
        # tokens of the chosen pages, and those of the newest page so far: [B, HKV, n]
        j = (best[..., None] * P + np.arange(P)).reshape(B, HKV, -1)
        new = np.broadcast_to(np.arange(own * P, t + 1), (B, HKV, t + 1 - own * P))
        j = np.concatenate((j, new), axis=-1)
        # [B, HKV, G, K] x [B, HKV, n, K] -> [B, HKV, G, n]
        s = scale * np.einsum("bhgk,bhjk->bhgj", q[:, t].reshape(B, HKV, -1, K), k[b, j, h])
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [B, HKV, G, n] x [B, HKV, n, V] -> [B, HKV, G, V]
        o[:, t] = (np.einsum("bhgj,bhjv->bhgv", p, v[b, j, h]) / l).reshape(B, H, V)
        lse[:, t] = (m + np.log(l)).reshape(B, H)
        if (t + 1) % P == 0:  # the page is whole
            page = bounds(k[:, own * P : t + 1], page_size=P)
            low[:, own], high[:, own] = page[0][:, 0], page[1][:, 0]
    return o, lse


def rectify(q, k, v, keys, values, *, scale=None):
    """One dense pass over the newest tokens: their keys and values are written anew, and read exactly.

    Args:
        q: queries of the newest n tokens, [B, n, H, K], from a pass that saw no sparse output.
        k: their keys, [B, n, HKV, K].
        v: their values, [B, n, HKV, V].
        keys: all keys of the cache, [B, T, HKV, K]; the last n are overwritten.
        values: all values of the cache, [B, T, HKV, V]; the last n are overwritten.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, n, H, V], and lse, [B, n, H], of causal attention to the whole cache.

    Cost: B H n T (2 K + 2 V + 5) FLOPs, once every n tokens; the cache is read once for all n.
    Source: Sun et al. 2025, arXiv:2506.04108.
    """
    n, T, G = q.shape[1], keys.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    keys[:, T - n :], values[:, T - n :] = k, v
    see = np.arange(T) <= np.arange(T - n, T)[:, None, None]
    s = scale * np.einsum("bthk,bjhk->bthj", q, keys.repeat(G, axis=2))
    s = np.where(see, s, -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    o = np.einsum("bthj,bjhv->bthv", p, values.repeat(G, axis=2))
    return o / l, (m + np.log(l))[..., 0]


def cost(*, form, B, T, H, K, V, HKV=None, ratio=0.1, min_pages=16, page_size=16, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "decoded".
        B, T, H, K, V, HKV: sizes.
        ratio, min_pages, page_size: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read, o and lse written once, and for `quadratic` the pages' bounds, scores and
        weights written and read, for `decoded` at every token the bounds of all past pages and, once a
        group, the chosen keys and values; state_bytes: all keys, all values, and two keys a page.
    """
    HKV, rows, whole = HKV or H, B * T * H, T // page_size
    pages = [t // page_size for t in range(T)]
    moved = rows * (K + V + 1) + B * T * HKV * (K + V)
    # smallest and largest; the mean: sum and division
    flops = 2 * B * whole * page_size * HKV * K + rows * K + B * T * HKV * K
    if form == "quadratic":
        # products, their sum, their sign turned for the sort
        flops += B * T * HKV * (whole * (4 * K + 1) + whole + 1)
        flops += B * H * T * T * (2 * K + 2 * V + 5) + rows * (V + 2)
        moved += 4 * B * H * T * T + 2 * B * T * HKV * whole + 4 * B * whole * HKV * K
    else:
        past = [int(count(i + 1, ratio=ratio, min_pages=min_pages)) - 1 for i in pages]
        n = sum(i * page_size + t % page_size + 1 for t, i in enumerate(past))
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        flops += B * HKV * sum(pages) * (4 * K + 2)
        flops += B * H * n * (2 * K + 2 * V + 5) + rows * (V + 2)
        moved += B * HKV * (2 * K * (sum(pages) + whole) + n * (K + V))
    return {
        "flops": flops,
        "bytes": moved * itemsize,
        "state_bytes": B * HKV * (T * (K + V) + 2 * whole * K) * itemsize,
    }
