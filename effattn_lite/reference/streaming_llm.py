r"""StreamingLLM: a sliding window, and the first few tokens for ever.

Source: Xiao et al. 2023, arXiv:2309.17453, section 3.2.
"""

import numpy as np


def quadratic(q, k, v, *, sinks=4, window, scale=None):
    r"""Full attention under a mask: token t sees the first `sinks` tokens and the last `window`.

    .. math:: \mathcal S(t) = \{j \le t : j < n_{\mathrm{sink}} \ \text{or}\ j > t - W\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        sinks: tokens at the start that are always seen.
        window: W >= 1 last tokens that are seen, the query's own included.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Xiao et al. 2023, arXiv:2309.17453, section 3.2; there positions are counted inside the cache.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    t, j = np.arange(T)[:, None], np.arange(T)
    see = (j <= t) & ((j < sinks) | (j > t - window))
    # [B, T, H, K] x [B, T, H, K] -> [B, T, H, T]
    s = scale * np.einsum("bthk,bjhk->bthj", q, k)
    s = np.where(see[:, None], s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def rolling(q, k, v, *, sinks=4, window, scale=None):
    """Token by token over a cache of sinks + window entries; the oldest token that is no sink makes room.

    Args and returns: as `quadratic`.

    Cost: B H n (2 K + 2 V + 5) FLOPs for token t, n = min(t + 1, sinks + window) the entries in use.
    Source: Xiao et al. 2023, arXiv:2309.17453, figure 4.
    """
    (B, T, H, K), HKV, V, G = q.shape, k.shape[2], v.shape[3], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    keys, values = np.zeros((B, sinks + window, HKV, K)), np.zeros((B, sinks + window, HKV, V))
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for t in range(T):
        # sinks stay in their slots; the others go round, each written over the oldest
        slot = t if t < sinks else sinks + (t - sinks) % window
        keys[:, slot], values[:, slot] = k[:, t], v[:, t]
        n = min(t + 1, sinks + window)  # slots in use
        # [B, H, n]
        s = scale * np.einsum("bhk,bjhk->bhj", q[:, t], keys[:, :n].repeat(G, axis=2))
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [B, H, V]
        o[:, t] = np.einsum("bhj,bjhv->bhv", p, values[:, :n].repeat(G, axis=2)) / l
        lse[:, t] = (m + np.log(l))[..., 0]
    return o, lse


def cost(*, form, B, T, H, K, V, HKV=None, sinks=4, window, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "rolling".
        B, T, H, K, V, HKV: sizes.
        sinks, window: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once, and for `quadratic` scores and weights
        written and read, for `rolling` the used part of the cache read at every token; state_bytes:
        the cache.
    """
    HKV, rows = HKV or H, B * T * H
    full = min(T, sinks + window)  # tokens until the cache is full
    seen = full * (full + 1) // 2 + (T - full) * (sinks + window)
    pairs = B * H * (T * T if form == "quadratic" else seen)
    items = rows * (K + V + 1) + B * T * HKV * (K + V)
    items += 4 * pairs if form == "quadratic" else B * seen * HKV * (K + V)
    return {
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        "flops": pairs * (2 * K + 2 * V + 5) + rows * (V + 2),
        "bytes": items * itemsize,
        "state_bytes": B * (sinks + window) * HKV * (K + V) * itemsize,
    }
