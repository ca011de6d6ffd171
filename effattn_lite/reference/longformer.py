r"""Longformer: every token sees a window around it, a few global tokens see all and are seen by all.

Source: Beltagy et al. 2020, arXiv:2004.05150.
"""

import numpy as np


def sets(T, H, *, window, dilation=1, global_tokens=(0,)):
    r"""Which keys a query sees, as a picture of 0 and 1 for each head.

    .. math:: \mathcal S_h(t) = \{j : |t - j| \le \tfrac w2 r_h,\ r_h \mid t - j\} \cup \mathcal G, \qquad
        \mathcal S_h(t) = \{0, \dots, T - 1\} \text{ for } t \in \mathcal G

    Args:
        T: tokens.
        H: heads.
        window: w, even; w / 2 tokens on each side are seen.
        dilation: r >= 1, distance between seen tokens; an integer, or one for each head.
        global_tokens: G, positions.

    Returns:
        see, [H, T, T], bool; row t is the query's.

    Source: Beltagy et al. 2020, arXiv:2004.05150; the paper writes d for r.
    """
    t, j = np.arange(T)[:, None], np.arange(T)
    r = np.broadcast_to(dilation, H)[:, None, None]
    near = (abs(t - j) <= window // 2 * r) & ((t - j) % r == 0)
    return near | np.isin(j, global_tokens) | np.isin(t, global_tokens)


def quadratic(
    q, k, v, *, q_global, k_global, v_global, window, dilation=1, global_tokens=(0,), scale=None
):  # fmt: skip
    r"""Full attention under a mask; rows of global tokens come from projections of their own.

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j, \qquad
        o_t = \sum_j \operatorname{softmax}_j(s\, \bar q_t^\top \bar k_j)\, \bar v_j
        \text{ for } t \in \mathcal G

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        q_global, k_global, v_global: from the second projections; of q_global only global rows are read.
        window, dilation, global_tokens: as in `sets`.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Beltagy et al. 2020, arXiv:2004.05150.
    """
    (B, T, H, K), V, G = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    see = sets(T, H, window=window, dilation=dilation, global_tokens=global_tokens)
    every = np.isin(np.arange(T), global_tokens)
    o, lse = np.empty((B, T, H, V)), np.empty((B, T, H))
    for t, (a, b, c) in ((~every, (q, k, v)), (every, (q_global, k_global, v_global))):
        b, c = b.repeat(G, axis=2), c.repeat(G, axis=2)  # one key head serves G query heads
        # [B, n, H, K] x [B, T, H, K] -> [B, H, n, T]
        s = np.where(see[:, t], scale * np.einsum("bthk,bjhk->bhtj", a[:, t], b), -np.inf)
        m = s.max(-1, keepdims=True, initial=-np.inf)
        p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
        l = p.sum(-1, keepdims=True)
        # [B, H, n, T] x [B, T, H, V] -> [B, n, H, V]
        o[:, t] = (np.einsum("bhtj,bjhv->bhtv", p, c) / l).swapaxes(1, 2)
        lse[:, t] = (m + np.log(l))[..., 0].swapaxes(1, 2)
    return o, lse


def banded(
    q, k, v, *, q_global, k_global, v_global, window, dilation=1, global_tokens=(0,), scale=None
):  # fmt: skip
    r"""Only what is seen: the w + 1 keys of each window and the n global ones, in one softmax of w + 1 + n.

    A global token inside the window is hidden there, since it has a column of its own.

    Args and returns: as `quadratic`.

    Cost: B H T (w + 1 + 2 n) (2 K + 2 V + 5) FLOPs, for n much smaller than T.
    Source: Beltagy et al. 2020, arXiv:2004.05150.
    """
    (B, T, H, K), V, G = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    is_global = np.isin(np.arange(T), global_tokens)
    every, some = np.flatnonzero(is_global), np.flatnonzero(~is_global)
    # keys of each query and head, [n, keys, H]; -1 is none
    steps = np.arange(-(window // 2), window // 2 + 1)[:, None] * np.broadcast_to(dilation, H)
    near = some[:, None, None] + steps
    near = np.where((near < 0) | (near >= T) | np.isin(near, every), -1, near)
    far = np.broadcast_to(every[:, None], (len(some), len(every), H))
    all_keys = np.broadcast_to(np.arange(T)[:, None], (len(every), T, H))
    o, lse = np.empty((B, T, H, V)), np.empty((B, T, H))
    for t, j, (a, b, c) in (
        (some, np.concatenate((near, far), axis=1), (q, k, v)),
        (every, all_keys, (q_global, k_global, v_global)),
    ):
        own = np.arange(H) // G  # one key head serves G query heads
        # [B, n, H, K] x [B, n, keys, H, K] -> [B, n, H, keys]
        s = scale * np.einsum("bthk,btwhk->bthw", a[:, t], b[:, j, own])
        s = np.where((j >= 0).swapaxes(1, 2), s, -np.inf)
        m = s.max(-1, keepdims=True, initial=-np.inf)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        o[:, t] = np.einsum("bthw,btwhv->bthv", p, c[:, j, own]) / l
        lse[:, t] = (m + np.log(l))[..., 0]
    return o, lse


def cost(
    *, form, B, T, H, K, V, HKV=None, window, dilation=1, global_tokens=(0,), itemsize=2, **_sizes
):  # fmt: skip
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "banded".
        B, T, H, K, V, HKV: sizes.
        window, dilation, global_tokens: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: both sets of q, k, v read and o, lse written once, scores and weights written and read,
        and for `banded` the gathered keys and values written and read; state_bytes: 0, since an old token
        sees new ones, and nothing decodes.
    """
    HKV, rows, n = HKV or H, B * T * H, int(np.isin(np.arange(T), global_tokens).sum())
    pairs = B * H * (T * T if form == "quadratic" else (T - n) * (window + 1 + n) + n * T)
    gathered = 0 if form == "quadratic" else pairs * (K + V)
    items = rows * (2 * K + V + 1) + 2 * B * T * HKV * (K + V) + 4 * pairs + 2 * gathered
    return {
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        "flops": pairs * (2 * K + 2 * V + 5) + rows * (V + 2),
        "bytes": items * itemsize,
        "state_bytes": 0,
    }
