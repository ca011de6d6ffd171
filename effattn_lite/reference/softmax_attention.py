r"""Softmax attention: o_t = sum_j softmax_j(s q_t . k_j) v_j, in one sweep or with the whole score matrix.

Source: Vaswani et al. 2017, arXiv:1706.03762, eq. (1); Milakov & Gimelshein 2018, arXiv:1805.02867, alg. 3;
Dao 2023, arXiv:2307.08691, alg. 1 and 2.
"""

import numpy as np


def quadratic(q, k, v, *, causal=True, window=None, sinks=0, scale=None):
    r"""All scores at once: write a T by T matrix, normalise its rows, multiply by the values.

    .. math:: \mathrm{lse}_t = \ln \sum_{j \in \mathcal S(t)} e^{s\, q_t^\top k_j}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} e^{s\, q_t^\top k_j - \mathrm{lse}_t}\, v_j

    Args:
        q: queries, [B, T, H, K]; query i stands at position Tk - T + i, Tk the number of keys.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV, each key head serves H / HKV query heads.
        v: values, [B, Tk, HKV, V].
        causal: see no later token.
        window: W >= 1, see j > t - W only (and j < t + W, when not causal); None sees all.
        sinks: the first tokens, seen from outside the window too.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H]; a query that sees nothing has o = 0, lse = -inf.

    Cost: B H T Tk (2 K + 2 V + 5) FLOPs and a little for each row; as many scores and weights in memory
        as there are pairs.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. (1).
    """
    G = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    # [B, T, H, K] x [B, Tk, H, K] -> [B, T, H, Tk]
    s = scale * np.einsum("bthk,bjhk->bthj", q, k)
    see = visible(q.shape[1], k.shape[1], causal=causal, window=window, sinks=sinks)
    s = np.where(see[:, None], s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    # exp of a difference <= 0: cannot overflow
    p = np.exp(s - np.where(m == -np.inf, 0, m))
    l = p.sum(-1, keepdims=True)
    # [B, T, H, Tk] x [B, Tk, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    with np.errstate(divide="ignore"):
        lse = m + np.log(l)
    return o / np.where(l == 0, 1, l), lse[..., 0]


def online(q, k, v, *, causal=True, window=None, sinks=0, scale=None, block=16):
    r"""One sweep over blocks of keys: keep the running maximum m, sum l and output, rescale when m grows.

    .. math:: m' = \max(m, \max_j s_j), \quad l' = e^{m - m'} l + \sum_j e^{s_j - m'}, \quad
        o' = e^{m - m'} o + \sum_j e^{s_j - m'} v_j

    Args and returns: as `quadratic`; block is the number of keys read at a time.

    Cost: as `quadratic`, and B H T (V + 5) FLOPs a block; no scores in memory.
    Source: Milakov & Gimelshein 2018, arXiv:1805.02867, alg. 3; Dao 2023, arXiv:2307.08691, alg. 1.
    """
    (B, T, H, K), Tk, V, G = q.shape, k.shape[1], v.shape[3], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    see = visible(T, Tk, causal=causal, window=window, sinks=sinks)
    m, l, o = np.full((B, T, H), -np.inf), np.zeros((B, T, H)), np.zeros((B, T, H, V))
    for j in range(0, Tk, block):
        kj, vj = k[:, j : j + block].repeat(G, axis=2), v[:, j : j + block].repeat(G, axis=2)
        # [B, T, H, K] x [B, C, H, K] -> [B, T, H, C]
        s = scale * np.einsum("bthk,bjhk->bthj", q, kj)
        s = np.where(see[:, None, j : j + block], s, -np.inf)
        m_new = np.maximum(m, s.max(-1))
        # nothing seen yet: keep -inf - -inf from being NaN
        top = np.where(m_new == -np.inf, 0, m_new)
        p = np.exp(s - top[..., None])
        shrink = np.exp(m - top)  # what was summed under the old maximum
        l = shrink * l + p.sum(-1)
        # [B, T, H, C] x [B, C, H, V]
        o = shrink[..., None] * o + np.einsum("bthj,bjhv->bthv", p, vj)
        m = m_new
    with np.errstate(divide="ignore"):
        lse = m + np.log(l)
    return o / np.where(l == 0, 1, l)[..., None], lse


def merge(o1, lse1, o2, lse2):
    r"""The attention over two disjoint sets of keys, from the attention over each.

    .. math:: \mathrm{lse} = \ln(e^{\mathrm{lse}_1} + e^{\mathrm{lse}_2}), \qquad
        o = e^{\mathrm{lse}_1 - \mathrm{lse}}\, o_1 + e^{\mathrm{lse}_2 - \mathrm{lse}}\, o_2

    Args:
        o1, o2: outputs, [B, T, H, V].
        lse1, lse2: log-sum-exp of their scores, [B, T, H]; -inf where a set is empty.

    Returns:
        o and lse over the union, of the same shapes.

    Cost: B T H (3 V + 8) FLOPs.
    Source: Dao 2023, arXiv:2307.08691, section 2.3.1.
    """
    m = np.maximum(lse1, lse2)
    top = np.where(m == -np.inf, 0, m)  # both sets empty
    w1, w2 = np.exp(lse1 - top), np.exp(lse2 - top)
    l = w1 + w2
    o = (w1[..., None] * o1 + w2[..., None] * o2) / np.where(l == 0, 1, l)[..., None]
    with np.errstate(divide="ignore"):
        return o, top + np.log(l)


def backward(q, k, v, o, lse, do, dlse=None, *, causal=True, window=None, sinks=0, scale=None):
    r"""Gradients, with the weights computed again from lse: no matrix has to be kept from the forward pass.

    .. math:: p_{tj} = e^{s\, q_t^\top k_j - \mathrm{lse}_t}, \qquad
        ds_{tj} = p_{tj}\,(do_t^\top v_j - do_t^\top o_t + d\mathrm{lse}_t)

        dq_t = s \sum_j ds_{tj} k_j, \qquad dk_j = s \sum_t ds_{tj} q_t, \qquad dv_j = \sum_t p_{tj}\, do_t

    Args:
        q, k, v, and the keywords: as `quadratic`.
        o, lse: what the forward pass returned.
        do: gradient of the loss by o, [B, T, H, V].
        dlse: gradient by lse, [B, T, H]; default 0.

    Returns:
        dq, dk, dv, of the shapes of q, k, v.

    Cost: B H T Tk (6 K + 4 V + 6) FLOPs, five products where the forward pass has two.
    Source: Dao 2023, arXiv:2307.08691, section 3.1.2; lse as an output adds dlse.
    """
    HKV, G = k.shape[2], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    kr, vr = k.repeat(G, axis=2), v.repeat(G, axis=2)
    see = visible(q.shape[1], k.shape[1], causal=causal, window=window, sinks=sinks)
    # [B, T, H, Tk]
    s = np.where(see[:, None], scale * np.einsum("bthk,bjhk->bthj", q, kr), -np.inf)
    p = np.exp(s - np.where(lse == -np.inf, 0, lse)[..., None])
    # [B, T, H]: all that a row needs of the others
    delta = (do * o).sum(-1) - (0 if dlse is None else dlse)
    # [B, T, H, V] x [B, Tk, H, V] -> [B, T, H, Tk]
    dp = np.einsum("bthv,bjhv->bthj", do, vr)
    ds = scale * p * (dp - delta[..., None])
    # [B, T, H, Tk] x [B, Tk, H, K] -> [B, T, H, K]
    dq = np.einsum("bthj,bjhk->bthk", ds, kr)
    # [B, T, H, Tk] x [B, T, H, K] -> [B, Tk, H, K]
    dk = np.einsum("bthj,bthk->bjhk", ds, q)
    # [B, T, H, Tk] x [B, T, H, V] -> [B, Tk, H, V]
    dv = np.einsum("bthj,bthv->bjhv", p, do)
    # a key head gathers the gradients of all query heads it served
    return dq, *(x.reshape(*x.shape[:2], HKV, G, x.shape[-1]).sum(3) for x in (dk, dv))


def cost(*, form, B, T, H, K, V, HKV=None, causal=True, window=None, sinks=0, block=16, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "online"; both compute masked scores too, so a mask saves no FLOPs.
        B, T, H, K, V, HKV: sizes; T keys.
        block: of `online`.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once, and for `quadratic` the scores and the weights,
        both written and read; state_bytes: keys and values of the tokens that decoding can still see.
    """
    HKV, rows, pairs = HKV or H, B * T * H, B * T * H * T
    # scale, maximum, difference, exp, sum
    flops = pairs * (2 * K + 2 * V + 5) + rows * (V + 2)
    if form == "online":
        # a block: maximum, difference, exp, l rescaled and added to; o likewise
        flops += -(-T // block) * rows * (5 + 2 * V)
    items = rows * (K + V + 1) + B * T * HKV * (K + V) + (4 * pairs if form == "quadratic" else 0)
    kept = T if window is None else min(T, sinks + window)
    return {"flops": flops, "bytes": items * itemsize, "state_bytes": B * kept * HKV * (K + V) * itemsize}


def visible(T, Tk, *, causal=True, window=None, sinks=0):
    """Which of Tk keys each of T queries sees, [T, Tk] of bool; the queries are the last T tokens."""
    t, j = np.arange(Tk - T, Tk)[:, None], np.arange(Tk)
    see = np.ones((T, Tk), bool)
    if window is not None:
        see = (j > t - window) & (j < t + window) | (j < sinks)
    return see & (j <= t) if causal else see
