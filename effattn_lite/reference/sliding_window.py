r"""Sliding-window attention: each token sees itself and the W - 1 tokens before it.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1; Jiang et al. 2023, arXiv:2310.06825, section 2.
"""

import numpy as np


def quadratic(q, k, v, *, window, scale=None):
    r"""Full attention under a mask: the last W tokens stay, all others get the score minus infinity.

    .. math:: \mathcal S(t) = \{j : t - W < j \le t\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        window: W >= 1 last tokens that are seen, the query's own included.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1; there the window also lies ahead of the token,
        here it ends with it, as in Jiang et al. 2023, arXiv:2310.06825, section 2.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    t, j = np.arange(T)[:, None], np.arange(T)
    see = (j <= t) & (j > t - window)
    # [B, T, H, K] x [B, T, H, K] -> [B, T, H, T]
    s = scale * np.einsum("bthk,bjhk->bthj", q, k)
    s = np.where(see[:, None], s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def banded(q, k, v, *, window, scale=None):
    r"""Only the band of the score matrix: gather each token's window, so that row t holds W scores, not T.

    .. math:: s_{tw} = s\, q_t^\top k_{t-W+1+w}, \qquad
        o_t = \sum_{w=0}^{W-1} \operatorname{softmax}_w(s_{tw})\, v_{t-W+1+w}

    Args and returns: as `quadratic`.

    Cost: B H T W (2 K + 2 V + 5) FLOPs, at most T for W; every key and value is copied W times, which a
        kernel, holding a block of queries and the keys of all their windows, avoids.
    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1: O(T W) where full attention takes O(T^2).
    """
    T, G, W = q.shape[1], q.shape[2] // k.shape[2], min(window, q.shape[1])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    # [T, W]; < 0 where the window begins before token 0
    j = np.arange(T)[:, None] + np.arange(1 - W, 1)
    see, j = j >= 0, np.maximum(j, 0)
    # [B, T, W, H, K] and [B, T, W, H, V]
    kw, vw = k[:, j].repeat(G, axis=3), v[:, j].repeat(G, axis=3)
    s = scale * np.einsum("bthk,btwhk->bthw", q, kw)
    s = np.where(see[:, None], s, -np.inf)  # [B, T, H, W]
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    o = np.einsum("bthw,btwhv->bthv", p, vw)
    return o / l, (m + np.log(l))[..., 0]


def cost(*, form, B, T, H, K, V, HKV=None, window, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "banded".
        B, T, H, K, V, HKV: sizes.
        window: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once, scores and weights written and read, and for
        `banded` the gathered keys and values written and read; state_bytes: the rolling cache, W keys and
        values.
    """
    HKV, rows, W = HKV or H, B * T * H, min(window, T)
    pairs = rows * (T if form == "quadratic" else W)
    gathered = 0 if form == "quadratic" else B * T * W * HKV * (K + V)
    items = rows * (K + V + 1) + B * T * HKV * (K + V) + 4 * pairs + 2 * gathered
    return {
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        "flops": pairs * (2 * K + 2 * V + 5) + rows * (V + 2),
        "bytes": items * itemsize,
        "state_bytes": B * window * HKV * (K + V) * itemsize,
    }
