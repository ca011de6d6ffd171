r"""Quest: the smallest and largest number of each channel bound what a page of keys can answer.

Source: Tang et al. 2024, arXiv:2406.10774.
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
    Source: Tang et al. 2024, arXiv:2406.10774.
    """
    whole = k.shape[1] // page_size * page_size
    pages = k[:, :whole].reshape(k.shape[0], -1, page_size, *k.shape[2:])
    return pages.min(2), pages.max(2)


def score(q, low, high):
    r"""What no key of a page can exceed: every channel takes the end of its range that suits the query.

    .. math:: \textstyle\sum_c \max(q_c M_c,\, q_c m_c) = q_+^\top M + q_-^\top m
        \ \ge\ \max_{j \in \mathrm{page}} q^\top k_j

    Args:
        q: queries, [B, T, H, K].
        low, high: m and M of P pages, [B, P, HKV, K].

    Returns:
        Bounds, [B, T, H, P].

    Cost: 4 B T H P K FLOPs in products.
    Source: Tang et al. 2024, arXiv:2406.10774; there the maximum is taken channel by channel.
    """
    G = q.shape[2] // low.shape[2]
    low, high = low.repeat(G, axis=2), high.repeat(G, axis=2)  # one key head serves G query heads
    # [B, T, H, K] x [B, P, H, K] -> [B, T, H, P]
    s = np.einsum("bthk,bphk->bthp", np.where(q > 0, q, 0), high)
    return s + np.einsum("bthk,bphk->bthp", np.where(q > 0, 0, q), low)


def select(q, k, *, budget, page_size=16):
    """Pages of each query: the newest, and the past ones with the largest bounds.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        budget: tokens a query may read, rounded up to whole pages.
        page_size: tokens in a page; a tie goes to the lower page.

    Returns:
        Page numbers, [B, T, H, n], n = min(ceil(budget / page_size), ceil(T / page_size)), the newest first,
        then the best; -1 where there is none.

    Cost: that of `bounds`, and of `score` for T // page_size pages.
    Source: Tang et al. 2024, arXiv:2406.10774.
    """
    T = q.shape[1]
    s = score(q, *bounds(k, page_size=page_size))
    # one column more: the newest page may be a part of one
    s = np.concatenate((s, np.full((*s.shape[:3], 1), -np.inf)), axis=-1)
    own, i = np.arange(T)[:, None, None] // page_size, np.arange(s.shape[3])
    s = np.where(i == own, np.inf, np.where(i < own, s, -np.inf))
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the lower page first
    best = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")
    best = best[..., : min(-(-budget // page_size), -(-T // page_size))]
    return np.where(best <= own, best, -1)


def quadratic(q, k, v, *, budget, page_size=16, scale=None):
    r"""Full attention under the mask of the chosen pages.

    .. math:: \mathcal S(t) = \{j \le t : \lfloor j / P \rfloor \in \mathcal I(t)\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q, k, budget, page_size: as in `select`.
        v: values, [B, T, HKV, V].
        scale: s; default K ** -0.5. The selection needs none.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Tang et al. 2024, arXiv:2406.10774.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(q, k, budget=budget, page_size=page_size)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
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


def decoded(q, k, v, *, budget, page_size=16, scale=None):
    """Token by token, as a model writes: bound the pages, choose, gather the chosen, attend to those alone.

    A page's bounds are taken once, when its last token has come.

    Args and returns: as `quadratic`.

    Cost: that of `bounds`; for a token 4 B H p K FLOPs for p past pages, B H n (2 K + 2 V + 5) for n keys.
    Source: Tang et al. 2024, arXiv:2406.10774.
    """
    (B, T, H, K), HKV, V, P = q.shape, k.shape[2], v.shape[3], page_size
    scale = K**-0.5 if scale is None else scale
    low, high = np.zeros((B, T // P, HKV, K)), np.zeros((B, T // P, HKV, K))
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    heads = np.arange(H)[:, None] // (H // HKV)  # the key head of each query head
    for t in range(T):
        own = t // P
        s = score(q[:, t : t + 1], low[:, :own], high[:, :own])[:, 0]  # [B, H, own]
        best = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., : -(-budget // P) - 1]
        # tokens of the chosen pages, and those of the newest page so far: [B, H, n]
        j = (best[..., None] * P + np.arange(P)).reshape(B, H, -1)
        j = np.concatenate((j, np.broadcast_to(np.arange(own * P, t + 1), (B, H, t + 1 - own * P))), axis=-1)
        b = np.arange(B)[:, None, None]
        # [B, H, K] x [B, H, n, K] -> [B, H, n]
        s = scale * np.einsum("bhk,bhjk->bhj", q[:, t], k[b, j, heads])
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [B, H, n] x [B, H, n, V] -> [B, H, V]
        o[:, t] = np.einsum("bhj,bhjv->bhv", p, v[b, j, heads]) / l
        lse[:, t] = (m + np.log(l))[..., 0]
        if (t + 1) % P == 0:  # the page is whole
            page = bounds(k[:, own * P : t + 1], page_size=P)
            low[:, own], high[:, own] = page[0][:, 0], page[1][:, 0]
    return o, lse


def cost(*, form, B, T, H, K, V, HKV=None, budget, page_size=16, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "decoded".
        B, T, H, K, V, HKV: sizes.
        budget, page_size: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read, o and lse written once, and for `quadratic` the pages' bounds, scores and
        weights written and read, for `decoded` at every token the bounds of all past pages and the chosen
        keys and values; state_bytes: all keys, all values, and two keys a page.
    """
    HKV, rows, past = HKV or H, B * T * H, -(-budget // page_size) - 1
    whole, pages = T // page_size, [t // page_size for t in range(T)]
    moved = rows * (K + V + 1) + B * T * HKV * (K + V)
    flops = 2 * B * whole * page_size * HKV * K  # smallest and largest
    if form == "quadratic":
        # products, their sum, their sign turned for the sort
        flops += rows * (whole * (4 * K + 1) + whole + 1)
        flops += B * H * T * T * (2 * K + 2 * V + 5) + rows * (V + 2)
        moved += 4 * B * H * T * T + 2 * rows * whole + 4 * B * whole * HKV * K
    else:
        n = sum(min(past, i) * page_size + t % page_size + 1 for t, i in enumerate(pages))
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        flops += B * H * (sum(pages) * (4 * K + 2) + n * (2 * K + 2 * V + 5)) + rows * (V + 2)
        moved += 2 * B * HKV * K * (sum(pages) + whole) + B * H * n * (K + V)
    return {
        "flops": flops,
        "bytes": moved * itemsize,
        "state_bytes": B * HKV * (T * (K + V) + 2 * whole * K) * itemsize,
    }
