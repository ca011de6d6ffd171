r"""Luna: attention packs the text into M vectors, and a second attention unpacks them at every token.

The M queries that pack are an input too, so a next layer can go on with what they found. A Linformer whose
projection is an attention map: it fits any length, but every token is seen by every other. Two forms compute
the same output.
"""

import numpy as np


def quadratic(q, k, v, *, c, p, scale=None):
    r"""Luna with the text's T by T map written out: a product of two maps, of rank at most M.

    .. math:: A = \operatorname{softmax}(D^{-1/2}\, P C^\top), \qquad
        O = \bigl(\operatorname{softmax}(s\, Q (A K)^\top)\, A\bigr)\, V

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        c: what the packing queries look at, [B, T, HKV, D]; a pack head serves H / HKV heads.
        p: packing queries, [B, M, HKV, D].
        scale: s, of the second attention; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], of the M scores of the second attention.

    Cost: B (T^2 H (2 M + 2 V) + T (HKV M (2 D + 6) + H (4 M K + 6 M + 2))) FLOPs, quadratic in T.
    Source: Ma et al. 2021, arXiv:2106.01540. Differs: keys and values are projected before they are packed;
    packing and projecting commute.
    """
    G = q.shape[2] // c.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # pack: every one of M queries spreads over the text, [M, D] @ [D, T] -> [M, T]
    y = c.shape[-1] ** -0.5 * np.einsum("bmhd,bjhd->bmhj", p, c)
    A = np.exp(y - y.max(-1, keepdims=True))
    A = (A / A.sum(-1, keepdims=True)).repeat(G, axis=2)
    keys = np.einsum("bmhj,bjhk->bmhk", A, k)
    # unpack: every token attends to M packed keys
    x = scale * np.einsum("bthk,bmhk->bthm", q, keys)
    top = x.max(-1, keepdims=True)
    w = np.exp(x - top)
    total = w.sum(-1, keepdims=True)
    P = np.einsum("bthm,bmhj->bthj", w / total, A)  # [T, M] @ [M, T] -> [T, T]
    return np.einsum("bthj,bjhv->bthv", P, v), (top + np.log(total))[..., 0]


def linear(q, k, v, *, c, p, scale=None):
    r"""Luna as it is run: two attentions with M queries or M keys.

    .. math:: O = \operatorname{softmax}(s\, Q (A K)^\top)\, (A V), \qquad
        A = \operatorname{softmax}(D^{-1/2}\, P C^\top)

    Args and returns: as `quadratic`.

    Cost: B T (HKV M (2 D + 6) + H (M (4 K + 4 V + 6) + 2)) FLOPs, linear in T.
    Source: Ma et al. 2021, arXiv:2106.01540. Differs: as `quadratic`.
    """
    G = q.shape[2] // c.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # pack: every one of M queries spreads over the text, [M, D] @ [D, T] -> [M, T]
    y = c.shape[-1] ** -0.5 * np.einsum("bmhd,bjhd->bmhj", p, c)
    A = np.exp(y - y.max(-1, keepdims=True))
    A = (A / A.sum(-1, keepdims=True)).repeat(G, axis=2)
    keys = np.einsum("bmhj,bjhk->bmhk", A, k)
    values = np.einsum("bmhj,bjhv->bmhv", A, v)
    # unpack: every token attends to M packed keys
    x = scale * np.einsum("bthk,bmhk->bthm", q, keys)
    top = x.max(-1, keepdims=True)
    w = np.exp(x - top)
    total = w.sum(-1, keepdims=True)
    # [T, M] @ [M, V] -> [T, V]
    return np.einsum("bthm,bmhv->bthv", w / total, values), (top + np.log(total))[..., 0]


def cost(*, form, B, T, H, HKV, K, V, D, M, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v, c, p
    read once, o written once; packed keys and values, or a tile of a map, stay on chip. There is no state: a
    new token changes every packed key.

    Args:
        form: "quadratic" or "linear".
        B, T, H, HKV, K, V, D, M: sizes.
        itemsize: bytes of an entry of q, k, v, c, p, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    # pack: scores, scale, softmax; keys packed, scores, scale, softmax; log and sum
    flops = T * (HKV * M * (2 * D + 6) + H * (M * (4 * K + 6) + 2))
    # the map and its sum with v; or values packed, and read
    flops += H * (T * T * (2 * M + 2 * V) if form == "quadratic" else T * 4 * M * V)
    return {
        "flops": B * flops,
        "bytes": itemsize * B * (T * (H * (2 * K + 2 * V) + HKV * D) + M * HKV * D),
        "state_bytes": 0,
    }
