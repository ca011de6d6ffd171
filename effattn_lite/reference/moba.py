r"""MoBA: every query of every head picks the blocks whose mean key answers it best, and attends to those.

Source: Lu et al. 2025, arXiv:2502.13189.
"""

import numpy as np


def select(q, k, *, block_size, top_k):
    r"""Blocks of each query: its own, and the past ones whose mean key has the largest product with it.

    .. math:: g_t(i) = q_t^\top \operatorname{mean}_{j \in i} k_j, \quad i < \lfloor t / B_S \rfloor, \qquad
        \mathcal I(t) = \{\lfloor t / B_S \rfloor\} \cup \operatorname{top}_{k-1}\, g_t

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        block_size: BS, tokens in a block.
        top_k: blocks of a query, its own among them; ties go to the lower block.

    Returns:
        Block numbers, [B, T, H, min(top_k, ceil(T / BS))], the best first; -1 where there is none.

    Cost: B T HKV K FLOPs for the means, 2 K a query and block for the scores.
    Source: Lu et al. 2025, arXiv:2502.13189.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    starts = range(0, T, block_size)
    # [B, NK, H, K]: one key head serves G query heads
    mean = np.stack([k[:, i : i + block_size].mean(1) for i in starts], axis=1).repeat(G, axis=2)
    # [B, T, H, K] x [B, NK, H, K] -> [B, T, H, NK]
    gate = np.einsum("bthk,bihk->bthi", q, mean)
    own, i = np.arange(T)[:, None, None] // block_size, np.arange(len(starts))
    gate = np.where(i == own, np.inf, np.where(i < own, gate, -np.inf))
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the lower block first
    best = np.argsort(-gate.astype(np.float32), axis=-1, kind="stable")[..., :top_k]
    return np.where(best <= own, best, -1)


def quadratic(q, k, v, *, block_size, top_k, scale=None):
    r"""Full attention under the mask of the chosen blocks.

    .. math:: \mathcal S(t) = \{j \le t : \lfloor j / B_S \rfloor \in \mathcal I(t)\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q, k, block_size, top_k: as in `select`.
        v: values, [B, T, HKV, V].
        scale: s; default K ** -0.5. The selection needs none.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Lu et al. 2025, arXiv:2502.13189.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(q, k, block_size=block_size, top_k=top_k)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    j = np.arange(T)
    # [B, T, H, T]
    see = (chosen[..., None] == j // block_size).any(-2) & (j <= j[:, None, None])
    s = np.where(see, scale * np.einsum("bthk,bjhk->bthj", q, k), -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def routed(q, k, v, *, block_size, top_k, scale=None):
    """Block by block of keys, as an expert serves its tokens: gather who chose it, attend, merge.

    The running maximum m and sum l of a query make one softmax of its blocks, in whatever order they come.

    Args and returns: as `quadratic`.

    Cost: that of `select`, and B H n (2 K + 2 V + 5) FLOPs, n the pairs in chosen blocks; 2 V + 5 a visit.
    Source: Lu et al. 2025, arXiv:2502.13189.
    """
    (B, T, H, K), V, G = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    chosen = select(q, k, block_size=block_size, top_k=top_k)
    m, l, o = np.full((B, T, H), -np.inf), np.zeros((B, T, H)), np.zeros((B, T, H, V))
    for b, h, i in np.ndindex(B, H, -(-T // block_size)):
        t = np.flatnonzero((chosen[b, :, h] == i).any(-1))  # the n queries that chose block i
        j = np.arange(i * block_size, min((i + 1) * block_size, T))
        # [n, K] @ [K, BS] -> [n, BS]
        s = scale * (q[b, t, h] @ k[b, j, h // G].T)
        s = np.where(j <= t[:, None], s, -np.inf)  # cuts a query's own block
        m_new = np.maximum(m[b, t, h], s.max(-1))
        p = np.exp(s - m_new[:, None])
        shrink = np.exp(m[b, t, h] - m_new)  # what was summed under the old maximum
        l[b, t, h] = shrink * l[b, t, h] + p.sum(-1)
        # [n, BS] @ [BS, V] -> [n, V]
        o[b, t, h] = shrink[:, None] * o[b, t, h] + p @ v[b, j, h // G]
        m[b, t, h] = m_new
    return o / l[..., None], m + np.log(l)


def cost(*, form, B, T, H, K, V, HKV=None, block_size, top_k, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "routed".
        B, T, H, K, V, HKV: sizes.
        block_size, top_k: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read, o and lse written once, the scores of the selection written and read, and
        for `quadratic` scores and weights too, for `routed` q, o, m and l of every visit instead of once;
        state_bytes: all keys and values: a block that nobody chose may be chosen by the next token.
    """
    HKV, rows, NK = HKV or H, B * T * H, -(-T // block_size)
    # past blocks that a query chose, and keys of them and of its own block
    past = [min(top_k - 1, t // block_size) for t in range(T)]
    own = [min(t // block_size * block_size + block_size, T) - t // block_size * block_size for t in range(T)]
    visits = B * H * sum(n + 1 for n in past)
    pairs = B * H * sum(n * block_size + m for n, m in zip(past, own, strict=True))
    # means: sum and division; scores; their sign is turned for the sort
    choice = B * HKV * K * (T + NK) + rows * NK * (2 * K + 1)
    moved = rows * (K + V + 1) + B * T * HKV * (K + V) + 2 * rows * NK
    if form == "quadratic":
        flops, moved = B * H * T * T * (2 * K + 2 * V + 5) + rows * (V + 2), moved + 4 * B * H * T * T
    else:
        # scale, maximum, difference, exp, sum a pair; a visit rescales l and o and adds to them
        flops = pairs * (2 * K + 2 * V + 5) + visits * (2 * V + 5) + rows * (V + 2)
        moved += visits * (K + 2 * V + 4)
    return {
        "flops": choice + flops,
        "bytes": moved * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
