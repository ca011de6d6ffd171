r"""DoubleSparsity: a few channels of the keys, kept apart, choose the tokens; exact attention to these.

Source: Yang et al. 2024, arXiv:2408.07092.
"""

import numpy as np


def calibrate(q, k, *, r):
    r"""Channels that carry the products, found offline on a sample of text.

    .. math:: \mathcal C = \operatorname{top}_r \textstyle\sum_{t} |q_{t,c}\, k_{t,c}|

    Args:
        q: queries of the sample, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        r: channels to keep, of K; a tie goes to the lower one.

    Returns:
        Channel numbers, [HKV, r], the strongest first.

    Cost: 3 B T H K FLOPs, once.
    Source: Yang et al. 2024, arXiv:2408.07092, the released calibration, where each token meets its own key
        and channels belong to query heads; here to a key head, summed over its queries.
    """
    G = q.shape[2] // k.shape[2]
    strength = np.abs(q * k.repeat(G, axis=2)).sum((0, 1))  # [H, K]
    strength = strength.reshape(k.shape[2], G, -1).sum(1)
    return np.argsort(-strength, axis=-1, kind="stable")[:, :r]


def labels(x, heads, *, channels):
    """The chosen channels of each head of x.

    Args:
        x: queries or keys, [B, T, H, K].
        heads: number of key heads, HKV.
        channels: channel numbers, [HKV, r], or [r] for all heads.

    Returns:
        Labels, [B, T, H, r].

    Cost: none: numbers are copied.
    Source: Yang et al. 2024, arXiv:2408.07092, the label cache.
    """
    channels = np.broadcast_to(np.asarray(channels), (heads, np.shape(channels)[-1]))
    index = channels.repeat(x.shape[2] // heads, axis=0)  # [H, r]
    return np.take_along_axis(x, index[None, None], axis=3)


def select(q, k, *, channels, budget):
    r"""Tokens of each query: those whose labels answer its own best.

    .. math:: \hat s_j = q_{[\mathcal C]}^\top k_{j[\mathcal C]}, \qquad
        \mathcal S(t) = \operatorname{top}_{n}\ \hat s_j \ \text{over}\ j \le t

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        channels: as in `labels`.
        budget: n, tokens a query may read; a tie goes to the earlier token.

    Returns:
        Token numbers, [B, T, H, min(n, T)], the best first; -1 where there is none.

    Cost: 2 B H T^2 r FLOPs.
    Source: Yang et al. 2024, arXiv:2408.07092.
    """
    (T, H), HKV = q.shape[1:3], k.shape[2]
    few = labels(k, HKV, channels=channels).repeat(H // HKV, axis=2)
    # [B, T, H, r] x [B, T, H, r] -> [B, T, H, T]
    s = np.einsum("bthr,bjhr->bthj", labels(q, HKV, channels=channels), few)
    t, j = np.arange(T)[:, None, None], np.arange(T)
    s = np.where(j <= t, s, -np.inf)
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the earlier token first
    best = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., :budget]
    return np.where(best <= t, best, -1)


def quadratic(q, k, v, *, channels, budget, scale=None):
    r"""Full attention under the mask of the chosen tokens.

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q, k, channels, budget: as in `select`.
        v: values, [B, T, HKV, V].
        scale: s; default K ** -0.5. The selection needs none.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Yang et al. 2024, arXiv:2408.07092.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(q, k, channels=channels, budget=budget)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    see = (chosen[..., None] == np.arange(T)).any(-2)  # [B, T, H, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bthj", q, k), -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def decoded(q, k, v, *, channels, budget, scale=None):
    """Token by token, as a model writes: rank all tokens by their labels, gather the best, attend to those.

    Args and returns: as `quadratic`.

    Cost: 2 B H t r FLOPs for the labels of t tokens, B H n (2 K + 2 V + 5) for n <= budget keys.
    Source: Yang et al. 2024, arXiv:2408.07092.
    """
    (B, T, H, K), HKV, V = q.shape, k.shape[2], v.shape[3]
    scale = K**-0.5 if scale is None else scale
    heads, b = np.arange(H)[:, None] // (H // HKV), np.arange(B)[:, None, None]
    few = labels(k, HKV, channels=channels)  # the label cache: r numbers a key, side by side
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for t in range(T):
        mine = labels(q[:, t : t + 1], HKV, channels=channels)[:, 0]
        # [B, H, r] x [B, t + 1, H, r] -> [B, H, t + 1]
        s = np.einsum("bhr,bjhr->bhj", mine, few[:, : t + 1].repeat(H // HKV, axis=2))
        j = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., :budget]
        # [B, H, K] x [B, H, n, K] -> [B, H, n]
        s = scale * np.einsum("bhk,bhjk->bhj", q[:, t], k[b, j, heads])
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [B, H, n] x [B, H, n, V] -> [B, H, V]
        o[:, t] = np.einsum("bhj,bhjv->bhv", p, v[b, j, heads]) / l
        lse[:, t] = (m + np.log(l))[..., 0]
    return o, lse


def cost(*, form, B, T, H, K, V, HKV=None, channels, budget, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "decoded".
        B, T, H, K, V, HKV: sizes.
        channels, budget: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read, o and lse written once, and for `quadratic` labels' products, scores and
        weights written and read, for `decoded` at every token all labels and the chosen keys and values;
        state_bytes: all keys and values, and r numbers more a key.
    """
    HKV, rows, r = HKV or H, B * T * H, np.shape(channels)[-1]
    pairs = B * H * T * T
    moved = rows * (K + V + 1) + B * T * HKV * (K + V + r)
    if form == "quadratic":
        # products, their sign turned for the sort; scale, maximum, difference, exp, sum
        flops, moved = pairs * (2 * r + 1 + 2 * K + 2 * V + 5), moved + 6 * pairs
    else:
        labelled, read = T * (T + 1) // 2, sum(min(t + 1, budget) for t in range(T))
        flops = B * H * (labelled * (2 * r + 1) + read * (2 * K + 2 * V + 5))
        moved += B * HKV * labelled * r + B * H * read * (K + V)
    return {
        # the division and lse of each row
        "flops": flops + rows * (V + 2),
        "bytes": moved * itemsize,
        "state_bytes": B * T * HKV * (K + V + r) * itemsize,
    }
