r"""Reformer: a token attends to those whose direction random rotations put into the same bucket.

Source: Kitaev et al. 2020, arXiv:2001.04451.
"""

import numpy as np


def hashes(q, omega, *, rounds):
    r"""Bucket of each token in each round: the random axis, with its sign, that lies nearest to it.

    .. math:: h(x) = \operatorname{argmax}\,[\Omega x;\, -\Omega x]

    Args:
        q: tokens, [B, T, H, K]; their length does not matter.
        omega: random directions, [H, M, K], M / rounds of them for each round.
        rounds: R, hashes of a token; a tie goes to the lower bucket.

    Returns:
        Bucket numbers, [B, T, H, R], from 0 to 2 M / R - 1.

    Source: Kitaev et al. 2020, arXiv:2001.04451; the paper writes R for the matrix omega.
    """
    # [B, T, H, K] x [H, M, K] -> [B, T, H, R, M / R]
    x = np.einsum("bthk,hmk->bthm", q, omega).reshape(*q.shape[:3], rounds, -1)
    # compared in float32, so that rounding of float64 breaks no tie
    x = x.astype(np.float32)
    return np.concatenate((x, -x), axis=-1).argmax(-1)


def counts(q, omega, *, rounds, chunk_size, causal=True):
    r"""In how many rounds a query sees a key: same bucket, and at most one chunk back in the sorted order.

    .. math:: N_{tj} = \#\{r : h_r(t) = h_r(j),\ 0 \le c_r(t) - c_r(j) \le 1\}, \qquad
        c_r(t) = \lfloor \operatorname{rank}_r(t) / C \rfloor

    Args:
        q, omega, rounds: as in `hashes`.
        chunk_size: C, tokens in a chunk; rank is the place after a stable sort by bucket.
        causal: see no later token.

    Returns:
        N, [B, T, T, H], integers; 0 where j = t, and where j > t if causal.

    Source: Kitaev et al. 2020, arXiv:2001.04451.
    """
    bucket, t = hashes(q, omega, rounds=rounds), np.arange(q.shape[1])
    order = np.argsort(bucket, axis=1, kind="stable")
    chunk = np.argsort(order, axis=1) // chunk_size
    back = chunk[:, :, None] - chunk[:, None]  # [B, T, T, H, R]
    n = ((bucket[:, :, None] == bucket[:, None]) & (back >= 0) & (back <= 1)).sum(-1)
    see = t < t[:, None] if causal else t != t[:, None]
    return n * see[..., None]


def quadratic(q, v, *, omega, rounds, chunk_size, causal=True, scale=None):
    r"""Full attention under the mask of all rounds: queries are keys too, of length 1.

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j\Bigl(
        s\, \frac{q_t^\top q_j}{\lVert q_j \rVert}\Bigr)\, v_j, \qquad \mathcal S(t) = \{j : N_{tj} > 0\}

    A token would be its own best match, so S(t) is {t} only where it is empty otherwise.

    Args:
        q: queries and, over their length, keys, [B, T, H, K].
        v: values, [B, T, H, V].
        omega, rounds, chunk_size, causal: as in `counts`.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs and B H T M (2 K + 1) of hashes: the mask hides work, it saves none.
    Source: Kitaev et al. 2020, arXiv:2001.04451.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6)
    see = counts(q, omega, rounds=rounds, chunk_size=chunk_size, causal=causal) > 0
    see |= np.eye(q.shape[1], dtype=bool)[..., None] & ~see.any(2, keepdims=True)
    # [B, T, H, K] x [B, T, H, K] -> [B, T, T, H]
    s = np.where(see, scale * np.einsum("bthk,bjhk->btjh", q, k), -np.inf)
    m = s.max(2, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(2)
    # [B, T, T, H] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("btjh,bjhv->bthv", p, v)
    return o / l[..., None], m[:, :, 0] + np.log(l)


def hashed(q, v, *, omega, rounds, chunk_size, causal=True, scale=None):
    r"""Round by round: sort by bucket, attend chunk by chunk with one look back, then merge the rounds.

    .. math:: o^{(r)} \propto \sum_{j} e^{s\, q_t^\top k_j - \log N_{tj}} v_j, \qquad
        o = \sum_r e^{\mathrm{lse}_r - \mathrm{lse}}\, o^{(r)}

    A pair that N rounds see weighs 1 / N in each of them, so that the merged softmax counts it once.

    Args and returns: as `quadratic`.

    Cost: 2 R B H T C (2 K + 2 V + 6) FLOPs, and those of hashes, sorts and merging.
    Source: Kitaev et al. 2020, arXiv:2001.04451.
    """
    (B, T, H, K), V, C = q.shape, v.shape[3], chunk_size
    scale = K**-0.5 if scale is None else scale
    k, bucket = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6), hashes(q, omega, rounds=rounds)
    o, lse = np.zeros((rounds, B, T, H, V)), np.full((rounds, B, T, H), -np.inf)
    for b, h in np.ndindex(B, H):
        order = np.argsort(bucket[b, :, h], axis=0, kind="stable")  # [T, R]
        chunk = np.argsort(order, axis=0) // C
        for r, start in np.ndindex(rounds, -(-T // C)):
            i, j = (order[max(start - back, 0) * C : (start + 1) * C, r] for back in (0, 1))
            same, back = bucket[b, i, None, h] == bucket[b, j, h], chunk[i, None] - chunk[j]
            n = (same & (back >= 0) & (back <= 1)).sum(-1)
            see = same[..., r] & (j < i[:, None] if causal else j != i[:, None])
            # [C, K] @ [K, 2 C] -> [C, 2 C]
            s = scale * (q[b, i, h] @ k[b, j, h].T) - np.log(np.maximum(n, 1))
            s = np.where(see, s, -np.inf)
            m = s.max(-1, keepdims=True)
            m = np.where(np.isfinite(m), m, 0)  # a row that sees nothing: exp(-inf - 0) = 0
            p = np.exp(s - m)
            l = p.sum(-1, keepdims=True)
            full = np.where(l > 0, l, 1)
            # [C, 2 C] @ [2 C, V] -> [C, V]
            o[r, b, i, h] = p @ v[b, j, h] / full
            lse[r, b, i, h] = np.where(l > 0, m + np.log(full), -np.inf)[:, 0]
    alone = np.isinf(lse).all(0)
    own = scale * np.einsum("bthk,bthk->bth", q, k)
    m = np.where(alone, own, lse.max(0))
    l = np.exp(lse - m)  # [R, B, T, H]
    total = np.where(alone, 1, l.sum(0))
    # [R, B, T, H] x [R, B, T, H, V] -> [B, T, H, V]
    merged = np.einsum("rbth,rbthv->bthv", l / total, o)
    return np.where(alone[..., None], v, merged), m + np.log(total)


def cost(*, form, B, T, H, K, V, M, rounds, chunk_size, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "hashed".
        B, T, H, K, V, M: sizes.
        rounds, chunk_size: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, v, omega read and o and lse written once, and for `quadratic` scores and weights
        written and read, for `hashed` each round's sorted q, v, o and lse written and read, q and v twice for
        the look back; state_bytes: all tokens and values: a later token may be hashed beside any of them.
    """
    rows, R, C = B * T * H, rounds, chunk_size
    lengths = [min(C, T - start) for start in range(0, T, C)]
    pairs = B * H * R * sum(n * (n + before) for n, before in zip(lengths, [0, *lengths], strict=False))
    # the sign of the products; square, sum, epsilon, root and division of the keys
    flops = rows * M * (2 * K + 1) + rows * (3 * K + 2)
    once = rows * (K + 2 * V + 1) + H * M * K
    if form == "quadratic":
        flops += rows * T * (2 * K + 2 * V + 5) + rows * (V + 2)
        items = once + 4 * rows * T
    else:
        # scale, log N off, maximum, difference, exp, sum a pair; the division and lse of each row
        flops += pairs * (2 * K + 2 * V + 6) + R * rows * (V + 2)
        # own score; maximum, difference, exp, sum, weight and sum of the rounds; lse
        flops += rows * (2 * K + 1 + R * (5 + 2 * V) + 2)
        items = once + 2 * R * rows * (2 * K + 3 * V + 1)
    return {
        "flops": flops,
        "bytes": items * itemsize,
        "state_bytes": rows * (K + V) * itemsize,
    }
