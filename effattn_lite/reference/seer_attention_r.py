r"""SeerAttention-R: a learned gate for decoding; one gate query a group of heads names blocks of the cache.

Source: Gao et al. 2025, arXiv:2506.08889; code https://github.com/microsoft/SeerAttention.
"""

import numpy as np


def rotate(x, positions, theta):
    """Turn the channel pairs (i, i + M/2) of x [B, N, H, M] by positions [N]; not at all without theta."""
    if theta is None:
        return x
    a, b = np.split(x, 2, axis=-1)
    angle = positions[:, None, None] * theta ** (-np.arange(a.shape[-1]) / a.shape[-1])
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def compress(k, *, w_max, w_min, w_avg, block_size=64, rope_theta=None, first=0):
    r"""One vector for each whole block of keys: what decoding keeps of it for the gate.

    .. math:: \tilde k_J = W_{\max}^\top \max_{j \in J} k_j + W_{\min}^\top \min_{j \in J} k_j
        + W_{\mathrm{avg}}^\top \operatorname{mean}_{j \in J} k_j

    Args:
        k: keys before rotation, [B, T, HKV, K].
        w_max, w_min, w_avg: [HKV, K, M].
        block_size: B_S, tokens in a block.
        rope_theta: turn by the position of the block's first token; None leaves positions out.
        first: number of the first block.

    Returns:
        [B, T // B_S, HKV, M].

    Cost: 6 HKV K M FLOPs a block in products.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    B, T, HKV, K = k.shape
    n = T // block_size
    pages = k[:, : n * block_size].reshape(B, n, block_size, HKV, K)
    pools = ((pages.max(2), w_max), (pages.min(2), w_min), (pages.mean(2), w_avg))
    # [B, n, HKV, K] x [HKV, K, M] -> [B, n, HKV, M]
    x = sum(np.einsum("bjhk,hkm->bjhm", p, w) for p, w in pools)
    return rotate(x, (first + np.arange(n)) * block_size, rope_theta)


def project(q, w_q, HKV, *, rope_theta=None, first=0):
    """The gate's query for each key head, [B, T, HKV, M]: w_q [H, K, M] joins the heads of a group."""
    B, T, H, K = q.shape
    # [B, T, HKV, G, K] x [HKV, G, K, M] -> [B, T, HKV, M]
    x = np.einsum("btngk,ngkm->btnm", q.reshape(B, T, HKV, -1, K), w_q.reshape(HKV, H // HKV, K, -1))
    return rotate(x, first + np.arange(T), rope_theta)


def choose(s, own, *, block_size, budget, threshold):
    """Numbers of past blocks for their scores s [..., P], -1 for none; own is the number of the newest.

    Compared in float32, so that rounding of float64 breaks no tie: of equals the first goes first.
    """
    s = np.where(np.arange(s.shape[-1]) < own, s, -np.inf)
    if threshold is None:
        best = np.argsort(-s.astype(np.float32), axis=-1, kind="stable")[..., : -(-budget // block_size) - 1]
        return np.where(np.isinf(np.take_along_axis(s, best, -1)), -1, best)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isinf(m), 0, m))
    l = p.sum(-1, keepdims=True)
    share = p / np.where(l == 0, 1, l)
    return np.where(share.astype(np.float32) > threshold, np.arange(s.shape[-1]), -1)


def select(q, k, *, w_q, w_max, w_min, w_avg, budget=None, threshold=None, block_size=64, rope_theta=None):
    r"""Blocks of each query's group of heads: the newest, and past ones by the gate.

    .. math:: p_t = \operatorname{softmax}_{J < \lfloor t/B_S \rfloor}(\tilde q_t^\top \tilde k_J / \sqrt M),
        \qquad \tilde q_t = \textstyle\sum_{h \in \mathrm{group}} W_h^\top q_{t,h}

    Args:
        q: queries before rotation, [B, T, H, K].
        k: keys before rotation, [B, T, HKV, K]; H is a multiple of HKV.
        w_q: [H, K, M].
        w_max, w_min, w_avg, block_size, rope_theta: as in `compress`; a query turns by its own position.
        budget: tokens a query may read, rounded up to whole blocks, the newest among them; ties go to the
            lower block. Or
        threshold: a past block with a larger share p is read.

    Returns:
        Block numbers, [B, T, HKV, n], the newest first; -1 where there is none.

    Cost: that of `compress`; 2 (H K M + HKV M P) FLOPs a token in products, P blocks.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    (T, _, _), (HKV, M) = q.shape[1:], (k.shape[2], w_q.shape[2])
    kg = compress(k, w_max=w_max, w_min=w_min, w_avg=w_avg, block_size=block_size, rope_theta=rope_theta)
    qg = project(q, w_q, HKV, rope_theta=rope_theta)
    # [B, T, HKV, M] x [B, P, HKV, M] -> [B, T, HKV, P]
    s = np.einsum("bthm,bphm->bthp", qg, kg) / M**0.5
    own = np.arange(T)[:, None, None] // block_size
    past = choose(s, own, block_size=block_size, budget=budget, threshold=threshold)
    return np.concatenate((np.broadcast_to(own, (*past.shape[:3], 1)), past), axis=-1)


def ground_truth(q, k, *, block_size=64, scale=None):
    r"""What the gate is to learn: the largest weight in each past block, of any head of the group, as shares.

    .. math:: g_{tJ} = \max_{h \in \mathrm{group},\, j \in J} \operatorname{softmax}_j(s\, q_{t,h}^\top k_j),
        \qquad \hat g_{tJ} = g_{tJ} / \textstyle\sum_{J < \lfloor t / B_S \rfloor} g_{tJ}

    Args:
        q, k: queries [B, T, H, K] and keys [B, T, HKV, K] as the attention multiplies them, rotated.
        block_size, scale: as in `quadratic`.

    Returns:
        [B, HKV, T, T // block_size]; a row without a past is 0.

    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    (B, T, H, K), HKV, P = q.shape, k.shape[2], q.shape[1] // block_size
    t, scale = np.arange(T), K**-0.5 if scale is None else scale
    s = scale * np.einsum("bthk,bjhk->bhtj", q, k.repeat(H // HKV, axis=2))
    s = np.where(t <= t[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True, initial=-np.inf))
    p = p / p.sum(-1, keepdims=True)
    g = p[..., : P * block_size].reshape(B, HKV, H // HKV, T, P, block_size).max((2, 5), initial=0)
    g = np.where(np.arange(P) < t[:, None] // block_size, g, 0)
    total = g.sum(-1, keepdims=True)
    return g / np.where(total == 0, 1, total)


def quadratic(
    q, k, v, *, w_q, w_max, w_min, w_avg, budget=None, threshold=None, block_size=64, rope_theta=None,
    q_gate=None, k_gate=None, scale=None,
):  # fmt: skip
    r"""Full attention under the mask of the chosen blocks.

    .. math:: \mathcal S(t) = \{j \le t : \lfloor j / B_S \rfloor \in \mathcal I(t)\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K].
        v: values, [B, T, HKV, V].
        w_q, w_max, w_min, w_avg, budget, threshold, block_size, rope_theta: as in `select`.
        q_gate, k_gate: queries and keys before rotation, for the gate; default q and k.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    T, G, scale = q.shape[1], q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg, rope_theta=rope_theta)
    chosen = select(
        q if q_gate is None else q_gate, k if k_gate is None else k_gate, **weights,
        budget=budget, threshold=threshold, block_size=block_size,
    ).repeat(G, axis=2)  # fmt: skip
    k, v, j = k.repeat(G, axis=2), v.repeat(G, axis=2), np.arange(T)
    # [B, T, H, T]
    see = (chosen[..., None] == j // block_size).any(-2) & (j <= j[:, None, None])
    s = np.where(see, scale * np.einsum("bthk,bjhk->bthj", q, k), -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    return np.einsum("bthj,bjhv->bthv", p, v) / l, (m + np.log(l))[..., 0]


def decoded(
    q, k, v, *, w_q, w_max, w_min, w_avg, budget=None, threshold=None, block_size=64, rope_theta=None,
    q_gate=None, k_gate=None, scale=None,
):  # fmt: skip
    """Token by token, as a model writes: ask the gate, gather the chosen blocks, attend to those alone.

    A block is compressed once, when its last token has come.

    Args and returns: as `quadratic`.

    Cost: that of `compress`; a token 2 (H K M + HKV M p) for p past blocks, H n (2 K + 2 V + 5) for n keys.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    (B, T, H, K), (HKV, V), P, M = q.shape, v.shape[2:], block_size, w_q.shape[2]
    scale, how = K**-0.5 if scale is None else scale, dict(block_size=P, budget=budget, threshold=threshold)
    weights = dict(w_max=w_max, w_min=w_min, w_avg=w_avg, block_size=P, rope_theta=rope_theta)
    q_gate, k_gate = q if q_gate is None else q_gate, k if k_gate is None else k_gate
    o, lse, kg = np.zeros((B, T, H, V)), np.zeros((B, T, H)), np.zeros((B, T // P, HKV, M))
    for t in range(T):
        own = t // P
        qg = project(q_gate[:, t : t + 1], w_q, HKV, rope_theta=rope_theta, first=t)[:, 0]
        past = choose(np.einsum("bhm,bphm->bhp", qg, kg[:, :own]) / M**0.5, own, **how)
        for b, h in np.ndindex(B, HKV):
            pages = np.append(past[b, h], own)[:, None]
            j = (pages * P + np.arange(P))[pages[:, 0] >= 0].ravel()
            j, heads = j[j <= t], slice(h * (H // HKV), (h + 1) * (H // HKV))
            # [G, K] x [n, K] -> [G, n]
            s = scale * np.einsum("hk,jk->hj", q[b, t, heads], k[b, j, h])
            m = s.max(-1, keepdims=True)
            p = np.exp(s - m)
            l = p.sum(-1, keepdims=True)
            # [G, n] x [n, V] -> [G, V]
            o[b, t, heads] = np.einsum("hj,jv->hv", p, v[b, j, h]) / l
            lse[b, t, heads] = (m + np.log(l))[:, 0]
        if (t + 1) % P == 0:  # the block is whole
            kg[:, own] = compress(k_gate[:, own * P : t + 1], **weights, first=own)[:, 0]
    return o, lse


def cost(
    *, form, B, T, H, K, V, M, HKV=None, budget, block_size=64, rope_theta=None, itemsize=2, **_sizes
):  # fmt: skip
    """FLOPs, bytes and state bytes of a form, as integers; for a budget, since a threshold reads what it may.

    Args:
        form: "quadratic" or "decoded".
        B, T, H, K, V, M, HKV: sizes; M is the gate's.
        budget, block_size, rope_theta: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v and the gate read, o and lse written once, and for `quadratic` compressed keys,
        scores and weights written and read, for `decoded` at every token the compressed keys of all past
        blocks and the chosen keys and values; state_bytes: all keys, all values, and M numbers a block.
    """
    HKV, rows, past, P = HKV or H, B * T * H, -(-budget // block_size) - 1, T // block_size
    own, turn = [t // block_size for t in range(T)], 0 if rope_theta is None else 3
    moved = rows * (K + V + 1) + B * T * HKV * (K + V) + K * M * (H + 3 * HKV)
    # extremes and means; their projections and sum, which starts at 0; the queries' projection; rotations
    flops = B * P * HKV * (K * (3 * block_size + 1) + M * (6 * K + 3 + turn))
    flops += B * T * M * (2 * H * K + HKV * turn)
    if form == "quadratic":
        # products, their division, their sign turned for the sort
        flops += B * T * HKV * P * (2 * M + 2)
        flops += rows * T * (2 * K + 2 * V + 5) + rows * (V + 2)
        moved += 4 * rows * T + 2 * B * HKV * P * (T + M)
    else:
        n = sum(min(past, i) * block_size + t % block_size + 1 for t, i in enumerate(own))
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        flops += B * HKV * sum(own) * (2 * M + 2) + B * H * n * (2 * K + 2 * V + 5) + rows * (V + 2)
        moved += B * HKV * (M * (sum(own) + P) + n * (K + V))
    return {
        "flops": flops,
        "bytes": moved * itemsize,
        "state_bytes": B * HKV * (T * (K + V) + P * M) * itemsize,
    }
