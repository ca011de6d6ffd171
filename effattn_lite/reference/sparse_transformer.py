r"""Sparse Transformer: two sparse heads, so laid out that two steps reach from any token to any later one.

Source: Child et al. 2019, arXiv:1904.10509.
"""

import numpy as np


def sets(T, *, pattern="strided", stride, summary=8):
    r"""Which keys a query sees, as a picture of 0 and 1 for each of the two kinds of heads.

    .. math:: \text{strided:}\quad A(t) = \{j : t - \ell \le j \le t\}, \qquad
        B(t) = \{j \le t : (t - j) \bmod \ell = 0\}

    .. math:: \text{fixed:}\quad A(t) = \{j \le t : \lfloor j/\ell \rfloor = \lfloor t/\ell \rfloor\}, \qquad
        B(t) = \{j \le t : j \bmod \ell \ge \ell - c\}

    Args:
        T: tokens.
        pattern: "strided", for data with a period, or "fixed", for text.
        stride: l, tokens in a period or a block; near sqrt(T) both heads cost the same.
        summary: c, last tokens of each block that all later ones see; only in "fixed".

    Returns:
        see, [2, T, T], bool: see[0] of heads A, see[1] of heads B; row t is the query's.

    Source: Child et al. 2019, arXiv:1904.10509; the paper writes i for t.
    """
    t, j = np.arange(T)[:, None], np.arange(T)
    if pattern == "strided":
        A, B = j >= t - stride, (t - j) % stride == 0
    else:
        A, B = j // stride == t // stride, np.tile(j % stride >= stride - summary, (T, 1))
    return np.stack((A, B)) & (j <= t)


def quadratic(q, k, v, *, pattern="strided", stride, summary=8, scale=None):
    r"""Full attention under a mask: heads 0, 2, 4, ... see A(t), heads 1, 3, 5, ... see B(t).

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        pattern, stride, summary: as in `sets`.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator; in the fixed pattern
        the first tokens of heads B see nothing: o = 0, lse = -inf.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Child et al. 2019, arXiv:1904.10509.
    """
    T, H, G = q.shape[1], q.shape[2], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    see = sets(T, pattern=pattern, stride=stride, summary=summary)[np.arange(H) % 2]  # [H, T, T]
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q, k), -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    m = np.where(np.isfinite(m), m, 0)  # a row that sees nothing: exp(-inf - 0) = 0
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    full = np.where(l > 0, l, 1)
    # [B, H, T, T] x [B, T, H, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bjhv->bhtv", p, v) / full
    lse = np.where(l > 0, m + np.log(full), -np.inf)
    return o.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)


def gathered(q, k, v, *, pattern="strided", stride, summary=8, scale=None):
    """Token by token: fetch the keys of the set and no others.

    Args and returns: as `quadratic`.

    Cost: B H n (2 K + 2 V + 5) FLOPs, n the pairs of all sets of a head: about T sqrt(T) at l = sqrt(T).
    Source: Child et al. 2019, arXiv:1904.10509.
    """
    (B, T, H, K), V, G = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    o, lse = np.zeros((B, T, H, V)), np.full((B, T, H), -np.inf)
    for kind, see in enumerate(sets(T, pattern=pattern, stride=stride, summary=summary)):
        heads = slice(kind, None, 2)
        for t in range(T):
            j = np.flatnonzero(see[t])
            if not len(j):
                continue
            # [B, H/2, n]
            s = scale * np.einsum("bhk,bjhk->bhj", q[:, t, heads], k[:, j, heads])
            m = s.max(-1, keepdims=True)
            p = np.exp(s - m)
            l = p.sum(-1, keepdims=True)
            # [B, H/2, V]
            o[:, t, heads] = np.einsum("bhj,bjhv->bhv", p, v[:, j, heads]) / l
            lse[:, t, heads] = (m + np.log(l))[..., 0]
    return o, lse


def cost(
    *, form, B, T, H, K, V, HKV=None, pattern="strided", stride, summary=8, itemsize=2, **_sizes
):  # fmt: skip
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "gathered".
        B, T, H, K, V, HKV: sizes.
        pattern, stride, summary: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once, and for `quadratic` scores and weights
        written and read, for `gathered` the keys and values fetched for each query instead of once;
        state_bytes: all keys and values, since heads B come back to any of them.
    """
    HKV, see = HKV or H, sets(T, pattern=pattern, stride=stride, summary=summary)
    heads = (H + 1) // 2, H // 2  # of kind A and B
    pairs, rows = B * H * T * T, B * H * T
    items = rows * (K + V + 1) + B * T * HKV * (K + V) + 4 * pairs
    if form == "gathered":
        pairs = B * sum(n * int(x.sum()) for n, x in zip(heads, see, strict=True))
        rows = B * sum(n * int(x.any(1).sum()) for n, x in zip(heads, see, strict=True))
        items = B * H * T * (K + V + 1) + B * T * HKV * (K + V) + pairs * (K + V)
    return {
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        "flops": pairs * (2 * K + 2 * V + 5) + rows * (V + 2),
        "bytes": items * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
