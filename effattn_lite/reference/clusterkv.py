r"""ClusterKV: keys that point alike form clusters, and a new token reads those whose centres answer it best.

Source: Liu et al. 2024, arXiv:2412.03213.
"""

import numpy as np


def spans(T, *, prompt, every=320, sinks=16):
    """The spans of tokens that are clustered, each by itself, while T tokens are read or written.

    Args:
        T: tokens.
        prompt: tokens that are read before the first is written: one span, behind the sinks.
        every: tokens in each span after it.
        sinks: first tokens, in no cluster.

    Returns:
        Pairs (start, end); the clusters of a span are known to token `end` and those after it.

    Cost: none.
    Source: Liu et al. 2024, arXiv:2412.03213.
    """
    first = max(prompt, sinks)
    edges = [sinks] * (prompt > sinks) + list(range(first, T, every))
    return list(zip(edges, edges[1:], strict=False))


def direction(x):
    """Vectors [..., K] at length 1; a zero stays zero.

    Cost: 3 K + 1 FLOPs a vector.
    Source: Liu et al. 2024, arXiv:2412.03213, the cosine's denominator.
    """
    length = np.sqrt(np.einsum("...k,...k->...", x, x))[..., None]
    return x / np.where(length > 0, length, 1)


def cluster(k, *, cluster_size=80, iterations=10):
    r"""K-means of the keys of a span by the cosine: what points alike belongs together, however long it is.

    .. math:: c(j) = \arg\min_c\, 1 - \frac{k_j^\top \mu_c}{\|k_j\| \|\mu_c\|}, \qquad
        \mu_c = \operatorname{mean}_{c(j) = c}\, k_j

    Args:
        k: keys of the span, [B, n, HKV, K].
        cluster_size: keys in a cluster on average: there are C = ceil(n / cluster_size) of them.
        iterations: rounds of both steps.

    Returns:
        Centres, [B, C, HKV, K], and the cluster of each key, [B, n, HKV].

    Cost: 4 n C K FLOPs a round and key head, in products.
    Source: Liu et al. 2024, arXiv:2412.03213. Differs: the first centres are keys at even distances, not
        random ones; a tie goes to the lower cluster; an empty cluster keeps its centre.
    """
    n, C = k.shape[1], -(-k.shape[1] // cluster_size)
    centres, unit = k[:, (2 * np.arange(C) + 1) * n // (2 * C)], direction(k)
    for i in range(iterations + 1):
        # [B, n, HKV, K] x [B, C, HKV, K] -> [B, n, HKV, C]
        s = np.einsum("bjhk,bchk->bjhc", unit, direction(centres))
        # compared in float32, so that rounding of float64 breaks no tie
        own = s.astype(np.float32).argmax(-1)
        if i < iterations:
            member = own[..., None] == np.arange(C)
            total = np.einsum("bjhc,bjhk->bchk", member, k)
            count = member.sum(1).swapaxes(1, 2)[..., None]  # [B, C, HKV, 1]
            centres = np.where(count > 0, total / np.maximum(count, 1), centres)
    return centres, own


def fill(s, own, *, budget):
    """Tokens of the best cluster, then of the next, until the budget is spent; the last cluster is cut.

    Args:
        s: scores of the clusters, [..., C].
        own: the cluster of each token, [..., n].
        budget: tokens to take; a tie goes to the lower cluster, inside a cluster to the earlier token.

    Returns:
        Places in `own`, [..., min(budget, n)].

    Cost: C FLOPs a row, signs turned for the sort.
    Source: Liu et al. 2024, arXiv:2412.03213.
    """
    order = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")  # of each cluster
    return np.argsort(np.take_along_axis(rank, own, axis=-1), axis=-1, kind="stable")[..., :budget]


def select(q, k, *, budget, prompt, every=320, sinks=16, cluster_size=80, iterations=10):
    """Clustered tokens of each query, those of the clusters with the largest products q mu first.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        budget: clustered tokens that a query may read; sinks, and tokens in no cluster yet, come on top.
        prompt, every, sinks: as in `spans`.
        cluster_size, iterations: as in `cluster`.

    Returns:
        Token numbers, [B, T, H, n], n at most `budget`; -1 where a query knows no more.

    Cost: that of `cluster` for each span, and 2 B H T K FLOPs a cluster.
    Source: Liu et al. 2024, arXiv:2412.03213.
    """
    (B, T, H, _), HKV = q.shape, k.shape[2]
    found = spans(T, prompt=prompt, every=every, sinks=sinks)
    if not found:
        return np.zeros((B, T, H, 0), int)
    made = [cluster(k[:, a:b], cluster_size=cluster_size, iterations=iterations) for a, b in found]
    sizes = [centres.shape[1] for centres, _ in made]
    ends, base = np.repeat([b for _, b in found], sizes), np.cumsum([0, *sizes])
    centres = np.concatenate([x for x, _ in made], axis=1)
    own = np.concatenate([x + first for (_, x), first in zip(made, base, strict=False)], axis=1)
    own = own.repeat(H // HKV, axis=2).swapaxes(1, 2)[:, None]  # [B, 1, H, n]
    # [B, T, H, K] x [B, C, H, K] -> [B, T, H, C]
    s = np.einsum("bthk,bchk->bthc", q, centres.repeat(H // HKV, axis=2))
    t = np.arange(T)[:, None, None]
    best = fill(np.where(ends <= t, s, -np.inf), own, budget=budget)
    known = ends[np.take_along_axis(np.broadcast_to(own, (B, T, *own.shape[2:])), best, axis=-1)] <= t
    return np.where(known, best + found[0][0], -1)


def quadratic(q, k, v, *, budget, prompt, every=320, sinks=16, cluster_size=80, iterations=10, scale=None):
    r"""Full attention under the mask of sinks, chosen tokens, and those since the last clustering.

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Tokens of the prompt read all before them: no cluster is known to them yet.

    Args:
        q, k, budget, prompt, every, sinks, cluster_size, iterations: as in `select`.
        v: values, [B, T, HKV, V].
        scale: s; default K ** -0.5. The selection needs none.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Liu et al. 2024, arXiv:2412.03213.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    when = dict(prompt=prompt, every=every, sinks=sinks)
    chosen = select(q, k, budget=budget, **when, cluster_size=cluster_size, iterations=iterations)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    j, t = np.arange(T), np.arange(T)[:, None, None]
    ends = np.array([0] + [b for _, b in spans(T, **when)])
    last = np.where(ends <= t, ends, 0).max(-1, keepdims=True)  # first token in no cluster yet
    see = ((chosen[..., None] == j).any(-2) | (j < sinks) | (j >= last)) & (j <= t)  # [B, T, H, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bthj", q, k), -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def decoded(q, k, v, *, budget, prompt, every=320, sinks=16, cluster_size=80, iterations=10, scale=None):
    """Token by token, as a model writes: cluster what a span has gathered, rank the centres, gather, attend.

    Args and returns: as `quadratic`.

    Cost: that of `cluster` once a span; for a token 2 B H C K FLOPs for C centres, B H n (2 K + 2 V + 5) for
        n keys.
    Source: Liu et al. 2024, arXiv:2412.03213.
    """
    (B, T, H, K), HKV, V = q.shape, k.shape[2], v.shape[3]
    scale, G = K**-0.5 if scale is None else scale, H // HKV
    starts = {b: a for a, b in spans(T, prompt=prompt, every=every, sinks=sinks)}
    centres, own, last = np.zeros((B, 0, HKV, K)), np.zeros((B, 0, HKV), int), 0
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    b, heads = np.arange(B)[:, None, None], np.arange(H)[:, None] // G
    for t in range(T):
        if t in starts:  # a span is whole
            new, last = cluster(k[:, starts[t] : t], cluster_size=cluster_size, iterations=iterations), t
            own = np.concatenate((own, new[1] + centres.shape[1]), axis=1)
            centres = np.concatenate((centres, new[0]), axis=1)
        # [B, H, K] x [B, C, H, K] -> [B, H, C]
        s = np.einsum("bhk,bchk->bhc", q[:, t], centres.repeat(G, axis=2))
        j = fill(s, own.repeat(G, axis=2).swapaxes(1, 2), budget=budget) + sinks
        exact = np.concatenate((np.arange(min(sinks, last)), np.arange(last, t + 1)))
        j = np.concatenate((j, np.broadcast_to(exact, (B, H, exact.size))), axis=-1)
        # [B, H, K] x [B, H, n, K] -> [B, H, n]
        s = scale * np.einsum("bhk,bhjk->bhj", q[:, t], k[b, j, heads])
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [B, H, n] x [B, H, n, V] -> [B, H, V]
        o[:, t] = np.einsum("bhj,bhjv->bhv", p, v[b, j, heads]) / l
        lse[:, t] = (m + np.log(l))[..., 0]
    return o, lse


def cost(
    *, form, B, T, H, K, V, HKV=None, budget, prompt, every=320, sinks=16, cluster_size=80, iterations=10,
    itemsize=2, **_sizes,
):  # fmt: skip
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "decoded".
        B, T, H, K, V, HKV: sizes.
        budget, prompt, every, sinks, cluster_size, iterations: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read, o and lse written once, keys read twice a round of clustering, and for
        `quadratic` centres, scores and weights written and read, for `decoded` at every token all centres
        and the chosen keys and values; state_bytes: all keys and values, the centres, and an int32 a key.
    """
    HKV, rows, R = HKV or H, B * T * H, iterations
    found = spans(T, prompt=prompt, every=every, sinks=sinks)
    sizes = [(b - a, -(-(b - a) // cluster_size)) for a, b in found]
    n, C = (sum(x[i] for x in sizes) for i in (0, 1))
    pairs = sum(x * c for x, c in sizes)
    # directions of keys and centres, cosines, sums and means
    rounds = n * (3 * K + 1) + (R + 1) * (C * (3 * K + 1) + 2 * pairs * K) + R * (2 * pairs * K + C * K)
    flops = B * HKV * rounds + rows * (V + 2)
    moved = rows * (K + V + 1) + B * T * HKV * (K + V) + B * HKV * (2 * R + 1) * n * K
    if form == "quadratic":
        # products of centres, their sign turned for the sort; scale, maximum, difference, exp, sum
        flops += rows * C * (2 * K + 1) + rows * T * (2 * K + 2 * V + 5)
        moved += 4 * rows * T + 2 * rows * C + 2 * B * HKV * C * K
    else:
        read = ranked = 0
        for t in range(T):
            last = max([0, *(b for _, b in found if b <= t)])
            ranked += sum(c for (_, c), (_, b) in zip(sizes, found, strict=True) if b <= t)
            clustered = sum(b - a for a, b in found if b <= t)
            read += min(budget, clustered) + min(sinks, last) + t + 1 - last
        flops += B * H * (ranked * (2 * K + 1) + read * (2 * K + 2 * V + 5))
        moved += B * HKV * ranked * K + B * H * read * (K + V)
    state = B * HKV * ((T * (K + V) + C * K) * itemsize + 4 * n)
    return {"flops": flops, "bytes": moved * itemsize, "state_bytes": state}
