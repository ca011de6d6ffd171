r"""LongNet: dilated attention, dense inside short segments, ever sparser inside ever longer ones.

Source: Ding et al. 2023, arXiv:2307.02486.
"""

import numpy as np


def counts(T, H, *, segments=(2048, 4096, 8192, 16384, 32768), dilations=(1, 2, 4, 6, 12)):
    r"""How many patterns let a query see a key: segment by segment, every r-th token sees every r-th one.

    .. math:: n_h(t, j) = \#\{i : \lfloor t/w_i \rfloor = \lfloor j/w_i \rfloor,\
        (t \bmod w_i) \equiv (j \bmod w_i) \equiv h \pmod{r_i}\}, \qquad j \le t

    Args:
        T: tokens.
        H: heads; head h begins at token h mod r of a segment, so that r heads together use all tokens.
        segments: w_i, tokens in a segment of pattern i.
        dilations: r_i, distance between the tokens that pattern i keeps of a segment.

    Returns:
        n, [H, T, T], integers; row t is the query's.

    Source: Ding et al. 2023, arXiv:2307.02486.
    """
    t, h = np.arange(T), np.arange(H)[:, None]
    n = np.zeros((H, T, T), int)
    for w, r in zip(segments, dilations, strict=True):
        kept = t % w % r == h % r  # [H, T]
        n += (t[:, None] // w == t // w) & kept[:, :, None] & kept[:, None]
    return n * (t <= t[:, None])


def quadratic(
    q, k, v, *, segments=(2048, 4096, 8192, 16384, 32768), dilations=(1, 2, 4, 6, 12), scale=None
):  # fmt: skip
    r"""Full attention in which a pair's weight is times the number of patterns that hold it.

    .. math:: o_t = \frac{\sum_j n_h(t, j)\, e^{s\, q_t^\top k_j}\, v_j}
        {\sum_j n_h(t, j)\, e^{s\, q_t^\top k_j}}

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        segments, dilations: as in `counts`.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the denominator; a token that no pattern keeps in
        a head, where no dilation is 1, has o = 0 and lse = -inf there.

    Cost: B H T^2 (2 K + 2 V + 6) FLOPs: the counts hide work, they save none.
    Source: Ding et al. 2023, arXiv:2307.02486.
    """
    T, H, G = q.shape[1], q.shape[2], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    n = counts(T, H, segments=segments, dilations=dilations)
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = np.where(n > 0, scale * np.einsum("bthk,bjhk->bhtj", q, k), -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    m = np.where(np.isfinite(m), m, 0)  # a row that sees nothing: exp(-inf - 0) = 0
    p = n * np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    full = np.where(l > 0, l, 1)
    # [B, H, T, T] x [B, T, H, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bjhv->bhtv", p, v) / full
    lse = np.where(l > 0, m + np.log(full), -np.inf)
    return o.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)


def dilated(
    q, k, v, *, segments=(2048, 4096, 8192, 16384, 32768), dilations=(1, 2, 4, 6, 12), scale=None
):  # fmt: skip
    r"""Pattern by pattern: dense attention among the kept tokens of each segment, then a mean of the outputs.

    .. math:: o = \sum_i \alpha_i\, o_i, \qquad
        \alpha_i = \frac{e^{\mathrm{lse}_i}}{\sum_j e^{\mathrm{lse}_j}}

    Each output weighs as much as its softmax's denominator, so the mean is one softmax over all patterns.

    Args and returns: as `quadratic`.

    Cost: B H T (2 K + 2 V + 5) sum_i w_i / r_i^2 FLOPs, scores ahead of the query included.
    Source: Ding et al. 2023, arXiv:2307.02486.
    """
    (B, T, H, K), V, G = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    scale, P = K**-0.5 if scale is None else scale, len(segments)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    o, lse = np.zeros((P, B, T, H, V)), np.full((P, B, T, H), -np.inf)
    for i, (w, r) in enumerate(zip(segments, dilations, strict=True)):
        for start in range(0, T, w):
            for h in range(H):
                t = np.arange(start + h % r, min(start + w, T), r)  # the kept tokens
                # [B, n, K] x [B, n, K] -> [B, n, n]
                s = scale * np.einsum("btk,bjk->btj", q[:, t, h], k[:, t, h])
                s = np.where(t <= t[:, None], s, -np.inf)
                m = s.max(-1, keepdims=True, initial=-np.inf)
                p = np.exp(s - m)
                l = p.sum(-1, keepdims=True)
                o[i][:, t, h] = np.einsum("btj,bjv->btv", p, v[:, t, h]) / l
                lse[i][:, t, h] = (m + np.log(l))[..., 0]
    m = lse.max(0)
    m = np.where(np.isfinite(m), m, 0)
    l = np.exp(lse - m)
    total = l.sum(0)
    full = np.where(total > 0, total, 1)
    # [P, B, T, H] x [P, B, T, H, V] -> [B, T, H, V]
    o = np.einsum("pbth,pbthv->bthv", l / full, o)
    return o, np.where(total > 0, m + np.log(full), -np.inf)


def cost(
    *, form, B, T, H, K, V, HKV=None, segments=(2048, 4096, 8192, 16384, 32768),
    dilations=(1, 2, 4, 6, 12), itemsize=2, **_sizes,
):  # fmt: skip
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "dilated".
        B, T, H, K, V, HKV: sizes.
        segments, dilations: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once, and for `quadratic` scores and weights
        written and read, for `dilated` each pattern's kept q, k, v, o and lse and its lse and output of all
        tokens written and read; state_bytes: keys and values of a period of all segments, at most.
    """
    HKV, P, rows, pairs, kept = HKV or H, len(segments), B * T * H, 0, 0
    for w, r in zip(segments, dilations, strict=True):
        lengths = [min(w, T - start) for start in range(0, T, w)]
        n = [max(-(-(length - h % r) // r), 0) for length in lengths for h in range(H)]
        pairs, kept = pairs + B * sum(x * x for x in n), kept + B * sum(n)
    once = rows * (K + V + 1) + B * T * HKV * (K + V)
    # scale, maximum, difference, exp, sum; the division and lse of each row; then the merge
    flops = pairs * (2 * K + 2 * V + 5) + kept * (V + 2) + rows * (P * (5 + 2 * V) + 2)
    items = once + 2 * kept * (2 * K + 2 * V + 1) + 2 * P * rows * (V + 1)
    if form == "quadratic":
        flops = rows * T * (2 * K + 2 * V + 6) + rows * (V + 2)
        items = once + 4 * rows * T
    period = min(int(np.lcm.reduce(segments)), T)
    return {
        "flops": flops,
        "bytes": items * itemsize,
        "state_bytes": B * period * HKV * (K + V) * itemsize,
    }
