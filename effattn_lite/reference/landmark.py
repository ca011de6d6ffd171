r"""Landmark attention: a token at the end of a block stands for it; a query weighs those, then the rest.

Source: Mohtashami and Jaggi 2023, arXiv:2305.16300.
"""

import numpy as np


def select(q, k, *, block_size, top_k=None):
    """Past blocks of each query, by the product with their landmarks.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        block_size: BS, tokens in a block, its landmark, which is the last, among them.
        top_k: blocks of a query beside its own; ties go to the lower block; None: all of the past.

    Returns:
        Block numbers, [B, T, H, min(top_k, T // BS)], the best first; -1 where there is none.

    Cost: 2 B H T P K FLOPs in products, P = T // BS landmarks.
    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    landmarks = k[:, block_size - 1 :: block_size].repeat(G, axis=2)
    # [B, T, H, K] x [B, P, H, K] -> [B, T, H, P]
    s = np.einsum("bthk,bphk->bthp", q, landmarks)
    own = np.arange(T)[:, None, None] // block_size
    s = np.where(np.arange(s.shape[3]) < own, s, -np.inf)
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the lower block first
    best = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., :top_k]
    return np.where(best < own, best, -1)


def softmax(x):
    """Softmax along the last axis, and the log of its denominator; -inf is left out."""
    m = x.max(-1, keepdims=True)
    p = np.exp(x - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    return p / l, (m + np.log(l))[..., 0]


def quadratic(q, k, v, *, block_size, top_k=None, scale=None):
    r"""The grouped softmax: tokens of the own block and landmarks of past blocks, and inside each past block.

    .. math:: w_{tj} = \begin{cases} \sigma_{G(t)}(s_{tj}) & j \text{ in the own block} \\
        \sigma_{G(t)}(s_{t \ell(j)})\; \sigma_{\mathrm{block}(j)}(s_{tj}) & j \text{ in a past block} \\
        0 & j \text{ a landmark} \end{cases}

    with G(t) the tokens j <= t of the own block and the landmarks of chosen past blocks, l(j) the landmark of
    the block of j; a block shares its weight out among its other tokens.

    Args:
        q, k, block_size, top_k: as in `select`; block_size >= 2.
        v: values, [B, T, HKV, V].
        scale: of the scores s; default K ** -0.5. The selection needs none.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the denominator of the group G(t).

    Cost: that of `select`, and B H T^2 (2 K + 4 V + 12) FLOPs: the mask hides work, it saves none.
    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300, and the released code: an own landmark is left out
        for itself too.
    """
    (B, T, H, K), V, G, BS, P = (
        q.shape,
        v.shape[3],
        q.shape[2] // k.shape[2],
        block_size,
        q.shape[1] // block_size,
    )
    scale = K**-0.5 if scale is None else scale
    chosen = select(q, k, block_size=BS, top_k=top_k)
    k, v, t, j = k.repeat(G, axis=2), v.repeat(G, axis=2), np.arange(T)[:, None, None], np.arange(T)
    # [B, T, H, K] x [B, T, H, K] -> [B, T, H, T]
    s = scale * np.einsum("bthk,bjhk->bthj", q, k)
    near = (j // BS == t // BS) & (j <= t) & (j % BS < BS - 1)
    marks = (chosen[..., None] == j // BS).any(-2) & (j % BS == BS - 1)
    p, lse = softmax(np.where(near | marks, s, -np.inf))
    # tokens of whole blocks, without their landmarks: [B, T, H, P, BS - 1]
    inside, _ = softmax(s[..., : P * BS].reshape(B, T, H, P, BS)[..., :-1])
    w = inside * np.where(marks, p, 0)[..., BS - 1 :: BS, None]
    # [B, T, H, T] x [B, T, H, V] and [B, T, H, P, BS - 1] x [B, P, BS - 1, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", np.where(near, p, 0), v)
    return o + np.einsum("bthpn,bpnhv->bthv", w, v[:, : P * BS].reshape(B, P, BS, H, V)[:, :, :-1]), lse


def retrieved(q, k, v, *, block_size, top_k=None, scale=None):
    """Token by token: score the landmarks, fetch the chosen blocks, share each landmark's weight out inside.

    Args and returns: as `quadratic`.

    Cost: a token B H (p (2 K + 2) + n (2 K + 2 V + 5)) FLOPs and less than 6 a number of the second kind, p
        past blocks, n tokens of its own and the chosen ones.
    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300.
    """
    (B, T, H, K), V, G, BS = q.shape, v.shape[3], q.shape[2] // k.shape[2], block_size
    scale = K**-0.5 if scale is None else scale
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    b, heads = np.arange(B)[:, None, None, None], np.arange(H)[:, None, None] // G
    for t in range(T):
        own = t // BS
        near = np.arange(own * BS, min(t + 1, own * BS + BS - 1))  # the landmark is left out
        far = k[:, BS - 1 : own * BS : BS].repeat(G, axis=2)
        # [B, H, K] x [B, own, H, K] -> [B, H, own]
        s = np.einsum("bhk,bphk->bhp", q[:, t], far)
        best = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., :top_k]
        marks = scale * np.take_along_axis(s, best, -1)
        s = scale * np.einsum("bhk,bjhk->bhj", q[:, t], k[:, near].repeat(G, axis=2))
        p, lse[:, t] = softmax(np.concatenate((s, marks), axis=-1))
        # the chosen blocks: [B, H, c, BS - 1]
        j = best[..., None] * BS + np.arange(BS - 1)
        # [B, H, K] x [B, H, c, BS - 1, K] -> [B, H, c, BS - 1]
        inside, _ = softmax(scale * np.einsum("bhk,bhcnk->bhcn", q[:, t], k[b, j, heads]))
        o[:, t] = np.einsum("bhj,bjhv->bhv", p[..., : near.size], v[:, near].repeat(G, axis=2))
        w = inside * p[..., near.size :, None]
        o[:, t] += np.einsum("bhcn,bhcnv->bhv", w, v[b, j, heads])
    return o, lse


def cost(*, form, B, T, H, K, V, HKV=None, block_size, top_k=None, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "retrieved".
        B, T, H, K, V, HKV: sizes.
        block_size, top_k: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read, o and lse written once, and for `quadratic` scores and weights written and
        read, for `retrieved` at every token all landmarks' keys and the keys and values of what it sees;
        state_bytes: all keys and values.
    """
    HKV, rows, P, BS = HKV or H, B * T * H, T // block_size, block_size
    moved = rows * (K + V + 1) + B * T * HKV * (K + V)
    if form == "quadratic":
        # the choice and its sort; scale, two softmaxes, their denominators' logs, the products of weights
        flops = rows * (P * (2 * K + 1) + T * (2 * K + 6 + 2 * V) + 2 + P * ((BS - 1) * (6 + 2 * V) + 2) + V)
        moved += 4 * rows * T
    else:
        flops = 0
        for t in range(T):
            past = t // BS
            n, c = min(t % BS + 1, BS - 1), past if top_k is None else min(top_k, past)
            flops += past * (2 * K + 1) + c + n * (2 * K + 1) + (n + c) * 5 + 2 + n * 2 * V
            flops += c * ((BS - 1) * (2 * K + 1 + 5 + 1 + 2 * V) + 2) + V
            moved += B * H * (past * K + (n + c * (BS - 1)) * (K + V))
        flops *= B * H
    return {
        "flops": flops,
        "bytes": moved * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
