r"""MagicPIG: keys are sampled by hashes that like what the query likes, and weighed by how likely that was.

Source: Chen et al. 2024, arXiv:2410.16179.
"""

import numpy as np


def draw_planes(rng, tables, bits, K):
    """Normals of random hyperplanes, `bits` for each table.

    Args:
        rng: a `numpy.random.Generator`.
        tables: L, hash tables.
        bits: hyperplanes of a table.
        K: key dimension.

    Returns:
        planes, [L bits, K].

    Source: Charikar 2002, random hyperplanes; Chen et al. 2024, arXiv:2410.16179.
    """
    return rng.normal(size=(tables * bits, K))


def hashes(x, planes, *, bits):
    """Bucket of each vector in each table: on which side of the table's planes it lies.

    Args:
        x: queries or centred keys, [..., K].
        planes: [L bits, K].
        bits: hyperplanes of a table.

    Returns:
        Buckets, [..., L], 0 to 2^bits - 1; the zero vector lies in bucket 0.

    Cost: 2 L bits K FLOPs a vector.
    Source: Chen et al. 2024, arXiv:2410.16179.
    """
    side = np.einsum("...k,mk->...m", x, planes) > 0
    return (side.reshape(*side.shape[:-1], -1, bits) << np.arange(bits)).sum(-1)


def probability(cosine, *, bits, tables):
    r"""Chance that a key shares its bucket with the query in two tables or more.

    .. math:: p = 1 - \tfrac1\pi \arccos \cos(q, k), \qquad
        u = 1 - (1 - p^b)^L - L\, p^b (1 - p^b)^{L - 1}

    Args:
        cosine: of query and centred key, any shape.
        bits: b, hyperplanes of a table.
        tables: L >= 2.

    Returns:
        u, of the same shape.

    Cost: 15 FLOPs an entry.
    Source: Chen et al. 2024, arXiv:2410.16179. Written so that small chances keep their digits.
    """
    p = 1 - np.arccos(np.minimum(np.maximum(cosine, -1), 1)) / np.pi
    x = np.minimum(p**bits, 1 - 2.0**-53)
    return -np.expm1((tables - 1) * np.log1p(-x) + np.log1p((tables - 1) * x))


def centred(k, *, prompt, sinks):
    """Keys less the mean key of the prompt behind its sinks; what is left of a key at the mean is zero.

    Args:
        k: keys, [B, T, HKV, K].
        prompt: tokens of the prompt; where no more than `sinks`, nothing is subtracted.
        sinks: first tokens, which do not count.

    Returns:
        [B, T, HKV, K].

    Cost: the mean; 5 K + 2 FLOPs a key.
    Source: Chen et al. 2024, arXiv:2410.16179: keys lie far from the origin, all on one side of the queries;
        a softmax does not see a shift of all keys, but the angles do.
    """
    mean = k[:, sinks:prompt].mean(1, keepdims=True) if min(prompt, k.shape[1]) > sinks else 0 * k[:, :1]
    left = k - mean
    # rounding of equal keys is no direction
    size, of = (np.sqrt(np.einsum("bthk,bthk->bth", x, x)) for x in (left, k))
    return np.where((size > 1e-6 * of)[..., None], left, 0)


def quadratic(q, k, v, planes, *, bits, prompt, sinks=4, window=64, scale=None):
    r"""Full attention under the mask of exact and sampled tokens; a sampled score is raised by -log u.

    .. math:: s_j = s\, q_t^\top k_j, \qquad
        o_t = \frac{\sum_{j \in \mathcal W} e^{s_j} v_j + \sum_{j \in \mathcal D} e^{s_j} v_j / u_j}
        {\sum_{j \in \mathcal W} e^{s_j} + \sum_{j \in \mathcal D} e^{s_j} / u_j}

    W are the sinks and the newest tokens; D, of the others, those that share a bucket with the query in two
    tables or more, each drawn with chance u. Over the planes both sums average to those of full attention.
    Tokens of the prompt read all before them.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        planes: normals of the hyperplanes, [L bits, K].
        bits: hyperplanes of a table.
        prompt: tokens that are read before the first is written.
        sinks: first tokens, always read.
        window: newest tokens, always read; the token itself is one.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the estimated denominator.

    Cost: that of the hashes, and B H T^2 (4 K + 2 V + 24) FLOPs: the mask hides work, it saves none.
    Source: Chen et al. 2024, arXiv:2410.16179.
    """
    T, G, tables = q.shape[1], q.shape[2] // k.shape[2], planes.shape[0] // bits
    scale = q.shape[3] ** -0.5 if scale is None else scale
    left = centred(k, prompt=prompt, sinks=sinks)
    buckets = hashes(left, planes, bits=bits).repeat(G, axis=2)
    left, k, v = (x.repeat(G, axis=2) for x in (left, k, v))
    # [B, T, 1, H, L] = [B, 1, T, H, L]
    same = hashes(q, planes, bits=bits)[:, :, None] == buckets[:, None]
    t, j = np.arange(T)[:, None, None], np.arange(T)
    exact = (t < prompt) | (j < sinks) | (j > t - window)
    drawn = (same.sum(-1) >= 2).swapaxes(2, 3) & ~exact
    a, b = (np.sqrt(np.einsum("bthk,bthk->bth", x, x)) for x in (q, left))
    sizes = a[..., None] * b.swapaxes(1, 2)[:, None]
    cosine = np.einsum("bthk,bjhk->bthj", q, left) / np.where(sizes > 0, sizes, 1)
    u = np.where(drawn, probability(cosine, bits=bits, tables=tables), 1)
    s = scale * np.einsum("bthk,bjhk->bthj", q, k) - np.log(u)
    s = np.where((exact | drawn) & (j <= t), s, -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def decoded(q, k, v, planes, *, bits, prompt, sinks=4, window=64, scale=None):
    """Token by token, as a model writes: hash the query, look up its buckets, attend to what stood in two.

    The keys' buckets are kept, and their distance from the mean. What was not drawn is masked here; tables
    that list their keys by bucket never touch it.

    Args and returns: as `quadratic`.

    Cost: 2 L bits K FLOPs a query and key for the hashes; for a token B H (t (2 K + 2 V + 5) + n (2 K + 19)),
        n of its t keys in the tables. Those that are drawn, the sum of all u on average, need as much each.
    Source: Chen et al. 2024, arXiv:2410.16179.
    """
    (B, T, H, K), V, L = q.shape, v.shape[3], planes.shape[0] // bits
    scale, G = K**-0.5 if scale is None else scale, H // k.shape[2]
    left = centred(k, prompt=prompt, sinks=sinks)
    buckets = hashes(left, planes, bits=bits).repeat(G, axis=2)
    length = np.sqrt(np.einsum("bthk,bthk->bth", left, left)).repeat(G, axis=2).swapaxes(1, 2)
    left, k, v = (x.repeat(G, axis=2) for x in (left, k, v))
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for t in range(T):
        end = t - window + 1 if t >= prompt else 0  # tokens before it, behind the sinks, are drawn
        a, b = min(sinks, max(end, 0)), max(end, 0)
        # [B, H, K] x [B, t + 1, H, K] -> [B, H, t + 1]
        s = scale * np.einsum("bhk,bjhk->bhj", q[:, t], k[:, : t + 1])
        if a < b:
            same = hashes(q[:, t], planes, bits=bits)[:, None] == buckets[:, a:b]
            drawn = (same.sum(-1) >= 2).swapaxes(1, 2)
            sizes = np.sqrt(np.einsum("bhk,bhk->bh", q[:, t], q[:, t]))[..., None] * length[:, :, a:b]
            cosine = np.einsum("bhk,bjhk->bhj", q[:, t], left[:, a:b]) / np.where(sizes > 0, sizes, 1)
            u = np.where(drawn, probability(cosine, bits=bits, tables=L), 1)
            s[..., a:b] = np.where(drawn, s[..., a:b] - np.log(u), -np.inf)
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [B, H, t + 1] x [B, t + 1, H, V] -> [B, H, V]
        o[:, t] = np.einsum("bhj,bjhv->bhv", p, v[:, : t + 1]) / l
        lse[:, t] = (m + np.log(l))[..., 0]
    return o, lse


def cost(*, form, B, T, H, K, V, M, HKV=None, bits, prompt, sinks=4, window=64, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "decoded".
        B, T, H, K, V, HKV: sizes.
        M: hyperplanes, L bits.
        bits, prompt, sinks, window: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v and planes read, o, lse written once, and for `quadratic` products, cosines and
        weights written and read, for `decoded` at every token the buckets of the keys in the tables (int32),
        and all keys and values; state_bytes: all keys and values, the mean key, and L buckets a key.
    """
    HKV, rows, L = HKV or H, B * T * H, M // bits
    moved = rows * (K + V + 1) + B * T * HKV * (K + V) + M * K
    # the mean, keys less it, two lengths, buckets of keys
    flops = B * HKV * K * max(min(prompt, T) - sinks + 1, 1) + B * T * HKV * (5 * K + 3 + 2 * M * K)
    if form == "quadratic":
        # buckets and lengths of queries and keys; two products, their sizes, u, its log; softmax
        flops += rows * (2 * M * K + 2 * (2 * K + 1) + T * (4 * K + 2 * V + 24))
        moved += 6 * rows * T
    else:
        ends = [max(t - window + 1 - sinks, 0) if t >= prompt else 0 for t in range(T)]
        listed, read, asked = sum(ends), T * (T + 1) // 2, sum(n > 0 for n in ends)
        flops += B * T * HKV * (2 * K + 1) + B * H * asked * (2 * M * K + 2 * K + 1)
        flops += B * H * (read * (2 * K + 2 * V + 5) + listed * (2 * K + 19))
        moved += B * HKV * listed * L * 4 // itemsize + B * H * read * (K + V)
    return {
        # the division and lse of each row
        "flops": flops + rows * (V + 2),
        "bytes": moved * itemsize,
        "state_bytes": B * HKV * ((T * (K + V) + K) * itemsize + 4 * T * L),
    }
