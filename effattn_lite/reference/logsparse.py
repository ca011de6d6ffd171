r"""LogSparse: each token sees itself and tokens at distances 1, 2, 4, 8, ...: log T keys a query.

Source: Li et al. 2019, arXiv:1907.00235.
"""

import numpy as np


def offsets(T, *, local=1, restart=None):
    r"""Distances at which a token sees another one, in rising order; they are the same for every token.

    .. math:: \mathcal D = \{0, \dots, c - 1\} \cup \{c - 1 + 2^i : i \ge 0\}, \qquad
        \mathcal S(t) = \{t - d \ge 0 : d \in \mathcal D\}

    With `restart` only distances below L_sub are taken of these, and all are repeated every L_sub tokens.

    Args:
        T: tokens.
        local: c >= 1 last tokens that are all seen, the query's own included.
        restart: L_sub >= local, tokens after which the pattern starts again; None: never.

    Returns:
        d, [n], integers from 0 to T - 1.

    Source: Li et al. 2019, arXiv:1907.00235: with c = 1 the LogSparse set, then local and restart attention.
    """
    period = T if restart is None else restart
    near = np.r_[:local, local - 1 + 2 ** np.arange(int(T).bit_length())]
    near = near[near < period]
    d = np.unique(near + period * np.arange(-(-T // max(period, 1)))[:, None])
    return d[d < T]


def quadratic(q, k, v, *, local=1, restart=None, scale=None):
    r"""Full attention under a mask of a few diagonals.

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        local, restart: as in `offsets`.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Li et al. 2019, arXiv:1907.00235.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    see = np.isin(np.arange(T)[:, None] - np.arange(T), offsets(T, local=local, restart=restart))
    # [B, T, H, K] x [B, T, H, K] -> [B, T, H, T]
    s = scale * np.einsum("bthk,bjhk->bthj", q, k)
    s = np.where(see[:, None], s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def gathered(q, k, v, *, local=1, restart=None, scale=None):
    r"""Only the diagonals: row t holds n scores, one a distance, not T.

    .. math:: s_{ti} = s\, q_t^\top k_{t - d_i}, \qquad
        o_t = \sum_i \operatorname{softmax}_i(s_{ti})\, v_{t - d_i}

    Args and returns: as `quadratic`.

    Cost: B H T n (2 K + 2 V + 5) FLOPs, n distances: about c + log2 T, times T / L_sub with restart.
    Source: Li et al. 2019, arXiv:1907.00235.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    # [T, n]; < 0 where the text has not begun
    j = np.arange(T)[:, None] - offsets(T, local=local, restart=restart)
    see, j = j >= 0, np.maximum(j, 0)
    # [B, T, n, H, K] and [B, T, n, H, V]
    kd, vd = k[:, j].repeat(G, axis=3), v[:, j].repeat(G, axis=3)
    s = scale * np.einsum("bthk,btnhk->bthn", q, kd)
    s = np.where(see[:, None], s, -np.inf)  # [B, T, H, n]
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    o = np.einsum("bthn,btnhv->bthv", p, vd)
    return o / l, (m + np.log(l))[..., 0]


def cost(*, form, B, T, H, K, V, HKV=None, local=1, restart=None, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "gathered".
        B, T, H, K, V, HKV: sizes.
        local, restart: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once, scores and weights written and read, and for
        `gathered` the gathered keys and values written and read; state_bytes: all keys and values, since
        every token lies at a seen distance from some later one.
    """
    HKV, rows = HKV or H, B * T * H
    n = T if form == "quadratic" else len(offsets(T, local=local, restart=restart))
    gathered = 0 if form == "quadratic" else B * T * n * HKV * (K + V)
    items = rows * (K + V + 1) + B * T * HKV * (K + V) + 4 * rows * n + 2 * gathered
    return {
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        "flops": rows * n * (2 * K + 2 * V + 5) + rows * (V + 2),
        "bytes": items * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
