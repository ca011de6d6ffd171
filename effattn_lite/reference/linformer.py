r"""Linformer: attention to M mixtures of tokens instead of T tokens, the mixtures being learned.

Attention maps of trained models are nearly of low rank, so keys and values are first projected along the text
by two learned matrices. The place of a token in the text decides where it goes: so there is a longest text,
and no token may be hidden from another. Two forms compute the same output.
"""

import numpy as np


def quadratic(q, k, v, *, e, f, scale=None):
    r"""Linformer with the text's T by T map written out: of rank at most M, whatever the scores.

    .. math:: o_t = \sum_j P_{tj} v_j, \qquad P = \operatorname{softmax}(s\, Q (E^\top K)^\top)\, F^\top

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        e: projection of the keys, [L, M], L >= T: a text of T tokens takes the first T rows.
        f: projection of the values, [L, M].
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], of the M scores.

    Cost: B H (T^2 (2 M + 2 V) + T (4 M K + 6 M + 2)) FLOPs, quadratic in T.
    Source: Wang et al. 2020, arXiv:2006.04768. Differs: the paper writes n for L, k for M and E^T for e.
    """
    T = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = np.einsum("bjhk,jm->bmhk", k, e[:T])  # [M, T] @ [T, K] -> [M, K]
    x = scale * np.einsum("bthk,bmhk->bthm", q, keys)
    top = x.max(-1, keepdims=True)
    p = np.exp(x - top)
    total = p.sum(-1, keepdims=True)
    # a map of T by T: weights of tokens, which need not be positive
    P = np.einsum("bthm,jm->btjh", p / total, f[:T])  # [T, M] @ [M, T] -> [T, T]
    return np.einsum("btjh,bjhv->bthv", P, v), (top + np.log(total))[..., 0]


def linear(q, k, v, *, e, f, scale=None):
    r"""Linformer as it is run: project keys and values along the text, then attend to M of them.

    .. math:: o_t = \sum_m \operatorname{softmax}_m(s\, q_t^\top \bar k_m)\, \bar v_m, \qquad
        \bar k_m = \sum_j E_{jm} k_j, \quad \bar v_m = \sum_j F_{jm} v_j

    Args and returns: as `quadratic`.

    Cost: B H T (M (4 K + 4 V + 6) + 2) FLOPs, linear in T.
    Source: Wang et al. 2020, arXiv:2006.04768.
    """
    T = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = np.einsum("bjhk,jm->bmhk", k, e[:T])  # [M, T] @ [T, K] -> [M, K]
    values = np.einsum("bjhv,jm->bmhv", v, f[:T])
    x = scale * np.einsum("bthk,bmhk->bthm", q, keys)
    top = x.max(-1, keepdims=True)
    p = np.exp(x - top)
    total = p.sum(-1, keepdims=True)
    # [T, M] @ [M, V] -> [T, V]
    return np.einsum("bthm,bmhv->bthv", p / total, values), (top + np.log(total))[..., 0]


def cost(*, form, B, T, H, K, V, M, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v, e, f
    read once, o written once; the projected keys and values, or a tile of the map, stay on chip. There is no
    state: a new token changes every projected key, so nothing decodes.

    Args:
        form: "quadratic" or "linear".
        B, T, H, K, V, M: sizes.
        itemsize: bytes of an entry of q, k, v, e, f, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    # keys projected, scores, scale, maximum, difference, exp, sum, division; log and sum
    flops = T * (M * (4 * K + 6) + 2)
    # the map and its sum with v; or values projected, and read
    flops += T * T * (2 * M + 2 * V) if form == "quadratic" else T * 4 * M * V
    return {
        "flops": B * H * flops,
        "bytes": itemsize * (B * T * H * (2 * K + 2 * V) + 2 * T * M),
        "state_bytes": 0,
    }
