r"""RetrievalAttention: a new token searches its keys as a vector database, and a few tokens are always read.

Source: Liu et al. 2024, arXiv:2409.10516.
"""

import numpy as np


def select(q, k, *, budget, sinks=128, window=512):
    r"""Retrieved tokens of each query, by exact search: the largest products outside what is always read.

    .. math:: \mathcal R(t) = \operatorname{top}_n\ q_t^\top k_j \ \text{over}\ \mathrm{sinks} \le j \le t - W

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        budget: n, tokens to retrieve; a tie goes to the earlier token.
        sinks: first tokens, always read.
        window: W, newest tokens, always read; the token itself is one.

    Returns:
        Token numbers, [B, T, H, min(n, T)], the best first; -1 where there is none.

    Cost: 2 B H T^2 K FLOPs; an index spares nearly all of it, see `graph`.
    Source: Liu et al. 2024, arXiv:2409.10516.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    # [B, T, H, K] x [B, T, H, K] -> [B, T, H, T]
    s = np.einsum("bthk,bjhk->bthj", q, k.repeat(G, axis=2))
    t, j = np.arange(T)[:, None, None], np.arange(T)
    may = (j >= sinks) & (j <= t - window)
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the earlier token first
    s = np.where(may, s, -np.inf).astype(np.float32)
    best = np.argsort(-s, axis=-1, kind="stable")[..., :budget]
    return np.where((best >= sinks) & (best <= t - window), best, -1)


def quadratic(q, k, v, *, budget, sinks=128, window=512, scale=None):
    r"""Full attention under the mask of what is always read and what was retrieved.

    .. math:: \mathcal S = \mathcal W(t) \cup \mathcal R(t), \qquad
        o_t = \sum_{j \in \mathcal S} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q, k, budget, sinks, window: as in `select`.
        v: values, [B, T, HKV, V].
        scale: s; default K ** -0.5. The search needs none.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Liu et al. 2024, arXiv:2409.10516.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    found = select(q, k, budget=budget, sinks=sinks, window=window)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    t, j = np.arange(T)[:, None, None], np.arange(T)
    see = ((found[..., None] == j).any(-2) | (j < sinks) | (j > t - window)) & (j <= t)  # [B, T, H, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bthj", q, k), -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def attend(q, k, v, *, scale):
    """Attention of one query a head to n keys of its own: q [B, H, K], k [B, H, n, K], v [B, H, n, V].

    Returns:
        o, [B, H, V], and lse, [B, H].

    Cost: B H n (2 K + 2 V + 5) + B H (V + 2) FLOPs.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. (1).
    """
    # [B, H, K] x [B, H, n, K] -> [B, H, n]
    s = scale * np.einsum("bhk,bhjk->bhj", q, k)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    return np.einsum("bhj,bhjv->bhv", p, v) / l, (m + np.log(l))[..., 0]


def merge(one, other):
    r"""One softmax over two disjoint sets of keys, from one over each; parts and result are (o, lse).

    .. math:: o = \frac{e^{\ell_1} o_1 + e^{\ell_2} o_2}{e^{\ell_1} + e^{\ell_2}}, \qquad
        \ell = \log(e^{\ell_1} + e^{\ell_2})

    Args:
        one, other: o, [..., V], and lse, [...]: of the sets that two devices hold.

    Returns:
        o and lse of their union.

    Cost: 3 V + 10 FLOPs a row.
    Source: Liu et al. 2024, arXiv:2409.10516.
    """
    m = np.maximum(one[1], other[1])
    a, b = np.exp(one[1] - m), np.exp(other[1] - m)  # exp of differences <= 0
    l = a + b
    return (a / l)[..., None] * one[0] + (b / l)[..., None] * other[0], m + np.log(l)


def decoded(q, k, v, *, budget, sinks=128, window=512, scale=None):
    """Token by token, as a model writes: the fast memory's part and the retrieved part apart, then merged.

    Args and returns: as `quadratic`.

    Cost: for a token 2 B H n K FLOPs to search n keys, B H m (2 K + 2 V + 5) for m that are read.
    Source: Liu et al. 2024, arXiv:2409.10516.
    """
    (B, T, H, K), V = q.shape, v.shape[3]
    scale, G = K**-0.5 if scale is None else scale, H // k.shape[2]
    b, heads, h = np.arange(B)[:, None, None], np.arange(H)[:, None] // G, np.arange(H)
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for t in range(T):
        near = max(t - window + 1, 0)
        j = np.concatenate((np.arange(min(sinks, near)), np.arange(near, t + 1)))
        fast = attend(q[:, t], k[b, j, heads], v[b, j, heads], scale=scale)
        if min(budget, near - sinks) > 0:
            # [B, H, K] x [B, n, H, K] -> [B, H, n]
            s = np.einsum("bhk,bjhk->bhj", q[:, t], k[:, sinks:near, h // G])
            j = sinks + np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., :budget]
            fast = merge(fast, attend(q[:, t], k[b, j, heads], v[b, j, heads], scale=scale))
        o[:, t], lse[:, t] = fast
    return o, lse


def graph(q, k, *, links=32, degree=16, sinks=128):
    r"""An index of keys that queries have drawn: keys wanted by the same query are neighbours.

    Queries are no keys: they lie elsewhere, and the keys nearest to one need not be near each other. So every
    query of the prompt is linked to the keys that answer it best, and then left out: two keys are as near as
    the number of queries that both answer.

    Args:
        q: queries of the prompt, [B, T, H, K].
        k: its keys, [B, n, HKV, K]; all query heads of a key head draw the same graph.
        links: keys that a query is linked to; a tie goes to the earlier.
        degree: neighbours that a key keeps; a tie goes to the earlier.
        sinks: first tokens, not in the index.

    Returns:
        Neighbours of each key, [B, HKV, n, degree], the nearest first, -1 for none; and the number of queries
        that each key answers, [B, HKV, n]: searches start where it is largest.

    Cost: 2 B H T n K FLOPs for the links, which attention to the prompt computes anyway; then counting.
    Source: Liu et al. 2024, arXiv:2409.10516, after RoarGraph, Chen et al. 2024, arXiv:2408.08933: links from
        queries to their exact nearest keys, projected onto the keys. Differs: neighbours are ranked by the
        queries they share; RoarGraph prunes by distances, and adds edges so that every key can be reached.
    """
    (B, T, H, K), (n, HKV) = q.shape, k.shape[1:3]
    q = q.reshape(B, T, HKV, H // HKV, K)
    # [B, T, HKV, G, K] x [B, n, HKV, K] -> [B, HKV, T, G, n], then a row a query
    s = np.einsum("bthgk,bjhk->bhtgj", q, k).reshape(B, HKV, -1, n)
    s = np.where(np.arange(n) >= sinks, s, -np.inf).astype(np.float32)
    rank = np.argsort(np.argsort(-s, axis=-1, kind="stable"), axis=-1, kind="stable")
    wanted = (rank < links) & (s > -np.inf)
    together = np.einsum("bhqi,bhqj->bhij", wanted, wanted, dtype=np.float64)
    count = np.einsum("bhii->bhi", together).astype(int)
    together = np.where(np.eye(n, dtype=bool), 0, together)
    near = np.argsort(-together, axis=-1, kind="stable")[..., :degree]
    return np.where(np.take_along_axis(together, near, axis=-1) > 0, near, -1), count


def search(q, k, near, count, *, budget, beam=32, starts=8):
    """Follow a graph to the keys that answer a query: look at the neighbours of the best, until none is new.

    Args:
        q: one query, [K].
        k: the keys of its head, [n, K].
        near, count: the head's part of the graph, [n, degree] and [n].
        budget: keys to return.
        beam: best keys so far whose neighbours are looked at.
        starts: keys to begin with, those that most queries of the prompt wanted.

    Returns:
        Token numbers, [at most budget], the best first, and how many keys were looked at.

    Cost: 2 K FLOPs a key looked at.
    Source: Liu et al. 2024, arXiv:2409.10516; the search of RoarGraph, Chen et al. 2024, with the whole beam
        expanded at a time.
    """
    s, done = np.full(len(k), -np.inf), np.zeros(len(k), bool)
    new = np.argsort(-count, kind="stable")[:starts]
    new = new[count[new] > 0]
    while new.size:
        s[new] = k[new] @ q
        best = np.argsort(-s.astype(np.float32), kind="stable")[:beam]
        best = best[(s[best] > -np.inf) & ~done[best]]
        done[best] = True
        new = np.unique(near[best])
        new = new[(new >= 0) & (s[new] == -np.inf)]
    best = np.argsort(-s.astype(np.float32), kind="stable")[:budget]
    return best[s[best] > -np.inf], int((s > -np.inf).sum())


def cost(*, form, B, T, H, K, V, HKV=None, budget, sinks=128, window=512, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "decoded".
        B, T, H, K, V, HKV: sizes.
        budget, sinks, window: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read, o and lse written once, and for `quadratic` products, scores and weights
        written and read, for `decoded` at every token the searched keys, and those that are read with their
        values; state_bytes: all keys and values.
    """
    HKV, rows, pairs = HKV or H, B * T * H, B * H * T * T
    moved = rows * (K + V + 1) + B * T * HKV * (K + V)
    if form == "quadratic":
        # products, their sign turned for the sort; scale, maximum, difference, exp, sum; division and lse
        flops, moved = pairs * (2 * K + 1 + 2 * K + 2 * V + 5) + rows * (V + 2), moved + 6 * pairs
    else:
        near = [max(t - window + 1, 0) for t in range(T)]
        searched = [max(a - sinks, 0) if budget else 0 for a in near]
        found = [min(budget, n) for n in searched]
        read = sum(min(sinks, a) + t + 1 - a for t, a in enumerate(near)) + sum(found)
        merged = sum(n > 0 for n in found)
        flops = B * H * (sum(searched) * (2 * K + 1) + read * (2 * K + 2 * V + 5) + (T + merged) * (V + 2))
        # weights, their sum and shares, outputs, lse
        flops += B * H * merged * (3 * V + 10)
        moved += B * HKV * sum(searched) * K + B * H * read * (K + V)
    return {
        "flops": flops,
        "bytes": moved * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
