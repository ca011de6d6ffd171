r"""SeerAttention: a small gate reads pooled queries and keys, and says which blocks are worth attention.

Source: Gao et al. 2024, arXiv:2410.13276; code https://github.com/microsoft/SeerAttention.
"""

import numpy as np


def pool(x, function, block_size):
    """A function of each block of tokens of x [B, T, H, K], the last one maybe cut: [B, NK, H, K]."""
    starts = range(0, x.shape[1], block_size)
    return np.stack([function(x[:, i : i + block_size], axis=1) for i in starts], axis=1)


def rotate(x, positions, theta):
    """Turn the channel pairs (i, i + M/2) of x [B, N, H, M] by positions [N] over growing wavelengths."""
    a, b = np.split(x, 2, axis=-1)
    angle = positions[:, None, None] * theta ** (-np.arange(a.shape[-1]) / a.shape[-1])
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def gate(q, k, *, w_q, w_max, w_min, w_avg, block_size=64, rope_theta=None):
    r"""Share of the attention that each block of queries is expected to give to each block of keys.

    .. math:: \tilde q_I = W_q^\top \operatorname{mean}_{t \in I} q_t, \quad
        \tilde k_J = W_{\max}^\top \max_{j \in J} k_j + W_{\min}^\top \min_{j \in J} k_j
        + W_{\mathrm{avg}}^\top \operatorname{mean}_{j \in J} k_j, \quad
        p_{IJ} = \operatorname{softmax}_{J \le I}(\tilde q_I^\top \tilde k_J / \sqrt M)

    Args:
        q: queries before rotation, [B, T, H, K].
        k: keys before rotation, [B, T, HKV, K].
        w_q: [H, K, M].
        w_max, w_min, w_avg: the three parts of one matrix on the concatenated pools, [HKV, K, M].
        block_size: B_S, tokens in a block.
        rope_theta: turn both by the position of the block's first token; None leaves positions out.

    Returns:
        p, [B, H, NQ, NQ], NQ = ceil(T / B_S); rows sum to 1.

    Cost: B NQ (2 H K M + 6 HKV K M + 2 H NQ M) FLOPs in products.
    Source: Gao et al. 2024, arXiv:2410.13276.
    """
    G, M = q.shape[2] // k.shape[2], w_q.shape[2]
    # [B, NQ, H, K] x [H, K, M] -> [B, NQ, H, M]
    qg = np.einsum("bihk,hkm->bihm", pool(q, np.mean, block_size), w_q)
    pools = ((np.max, w_max), (np.min, w_min), (np.mean, w_avg))
    kg = sum(np.einsum("bjhk,hkm->bjhm", pool(k, f, block_size), w) for f, w in pools)
    i = np.arange(qg.shape[1])
    if rope_theta is not None:
        qg, kg = (rotate(x, i * block_size, rope_theta) for x in (qg, kg))
    # [B, NQ, H, M] x [B, NK, H, M] -> [B, H, NQ, NK]
    s = np.einsum("bihm,bjhm->bhij", qg, kg.repeat(G, axis=2)) / M**0.5
    s = np.where(i <= i[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True, initial=-np.inf))
    return p / p.sum(-1, keepdims=True)


def select(q, k, *, block_size=64, top_k=None, threshold=None, **gate_weights):
    """Blocks that each block of queries sees: its own, and the best of the past, by number or by share.

    Args:
        q, k, block_size, and the gate's weights: as in `gate`.
        top_k: blocks of a block of queries, the own among them; a tie goes to the lower block. Or
        threshold: a block with a larger share is kept.

    Returns:
        A mask, [B, H, NQ, NQ].

    Cost: that of `gate`.
    Source: Gao et al. 2024, arXiv:2410.13276.
    """
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the lower block first
    p = gate(q, k, block_size=block_size, **gate_weights).astype(np.float32)
    i = np.arange(p.shape[2])
    own, past = i == i[:, None], i <= i[:, None]
    if top_k is None:
        return ((p > threshold) | own) & past
    order = np.argsort(-np.where(own, np.inf, np.where(past, p, -np.inf)), axis=-1, kind="stable")
    chosen = np.zeros(p.shape, bool)
    np.put_along_axis(chosen, order[..., :top_k], True, -1)
    return chosen & past


def ground_truth(q, k, *, block_size=64, scale=None):
    r"""What the gate is to learn: the largest weight in each block of the attention map, as shares of a row.

    .. math:: g_{IJ} = \max_{t \in I,\, j \in J} \operatorname{softmax}_j(s\, q_t^\top k_j), \qquad
        \hat g_{IJ} = g_{IJ} / \textstyle\sum_J g_{IJ}

    Args:
        q, k: queries [B, T, H, K] and keys [B, T, HKV, K] as the attention multiplies them, rotated.
        block_size, scale: as in `quadratic`.

    Returns:
        [B, H, NQ, NQ].

    Source: Gao et al. 2024, arXiv:2410.13276.
    """
    T, scale = q.shape[1], q.shape[3] ** -0.5 if scale is None else scale
    s = scale * np.einsum("bthk,bjhk->bhtj", q, k.repeat(q.shape[2] // k.shape[2], axis=2))
    s = np.where(np.arange(T) <= np.arange(T)[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True, initial=-np.inf))
    p = p / p.sum(-1, keepdims=True)
    starts = np.arange(0, T, block_size)
    g = np.maximum.reduceat(np.maximum.reduceat(p, starts, axis=2), starts, axis=3)
    return g / g.sum(-1, keepdims=True)


def quadratic(
    q, k, v, *, w_q, w_max, w_min, w_avg, block_size=64, top_k=None, threshold=None, rope_theta=None,
    q_gate=None, k_gate=None, scale=None,
):  # fmt: skip
    r"""Full attention under the mask of the blocks that the gate chose.

    .. math:: \mathcal S(t) = \{j \le t : \lfloor j / B_S \rfloor \in \mathcal I(\lfloor t / B_S \rfloor)\},
        \qquad o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        w_q, w_max, w_min, w_avg, rope_theta: the gate, as in `gate`.
        block_size, top_k, threshold: as in `select`.
        q_gate, k_gate: queries and keys before rotation, for the gate; default q and k.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Gao et al. 2024, arXiv:2410.13276.
    """
    T, G, scale = q.shape[1], q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    q_gate, k_gate = q if q_gate is None else q_gate, k if k_gate is None else k_gate
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg, rope_theta=rope_theta)
    chosen = select(q_gate, k_gate, block_size=block_size, top_k=top_k, threshold=threshold, **weights)
    t = np.arange(T)
    see = chosen[:, :, t // block_size][..., t // block_size] & (t <= t[:, None])
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q, k.repeat(G, axis=2)), -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, H, T, T] x [B, T, H, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bjhv->bhtv", p, v.repeat(G, axis=2)) / l
    return o.swapaxes(1, 2), (m + np.log(l))[..., 0].swapaxes(1, 2)


def blockwise(
    q, k, v, *, w_q, w_max, w_min, w_avg, block_size=64, top_k=None, threshold=None, rope_theta=None,
    q_gate=None, k_gate=None, scale=None,
):  # fmt: skip
    """The gate chooses; then one pass over the blocks of keys, with a running softmax.

    Args and returns: as `quadratic`.

    Cost: that of `select`, and B H n (2 K + 2 V + 5) FLOPs, n pairs in all blocks up to the diagonal: a
        kernel leaves out those that were not chosen.
    Source: Gao et al. 2024, arXiv:2410.13276.
    """
    (B, T, H, K), V, G, BS = q.shape, v.shape[3], q.shape[2] // k.shape[2], block_size
    scale = K**-0.5 if scale is None else scale
    q_gate, k_gate = q if q_gate is None else q_gate, k if k_gate is None else k_gate
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg, rope_theta=rope_theta)
    chosen = select(q_gate, k_gate, block_size=BS, top_k=top_k, threshold=threshold, **weights)
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for i in range(0, T, BS):
        t, n = np.arange(i, min(i + BS, T)), min(BS, T - i)
        m, l, b_o = np.full((B, H, n), -np.inf), np.zeros((B, H, n)), np.zeros((B, H, n, V))
        for j in range(i, -1, -BS):  # its own block first: no maximum stays -inf
            u = np.arange(j, min(j + BS, T))
            see = chosen[:, :, i // BS, j // BS, None, None] & (u <= t[:, None])
            # [B, n, H, K] x [B, BS, H, K] -> [B, H, n, BS]
            s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q[:, t], k[:, u]), -np.inf)
            top = np.maximum(m, s.max(-1))
            p, shrink = np.exp(s - top[..., None]), np.exp(m - top)
            l = l * shrink + p.sum(-1)
            # [B, H, n, BS] x [B, BS, H, V] -> [B, H, n, V]
            b_o = b_o * shrink[..., None] + np.einsum("bhtj,bjhv->bhtv", p, v[:, u])
            m = top
        o[:, t] = (b_o / l[..., None]).swapaxes(1, 2)
        lse[:, t] = (m + np.log(l)).swapaxes(1, 2)
    return o, lse


def cost(
    *, form, B, T, H, K, V, M, HKV=None, block_size=64, top_k=None, rope_theta=None, itemsize=2, **_sizes
):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "blockwise".
        B, T, H, K, V, M, HKV: sizes; M is the gate's.
        block_size, top_k, rope_theta: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k and the gate read for the choice and q, k, v for the attention, o and lse written
        once, and for `quadratic` scores and weights written and read; state_bytes: all keys and values,
        since a later block of queries may choose any block.
    """
    HKV, NQ, rows = HKV or H, -(-T // block_size), B * T * H
    # means, maxima and minima; a mean divides
    gate = B * (T * (H + 3 * HKV) + NQ * (H + HKV)) * K
    # projections and their sum, which starts at 0; rotations
    gate += B * NQ * M * (2 * H * K + HKV * (6 * K + 3) + (0 if rope_theta is None else 3 * (H + HKV)))
    # products, scale, maximum, difference, exp, sum, division; the best are found by a sort of the negatives
    gate += B * H * NQ * NQ * (2 * M + 6 + (top_k is not None))
    if form == "quadratic":
        # scale, maximum, difference, exp, sum
        flops = rows * T * (2 * K + 2 * V + 5) + rows * (V + 2)
    else:
        starts = range(0, T, block_size)
        sizes = [min(block_size, T - i) for i in starts]
        pairs = sum(n * (i + n) for i, n in zip(starts, sizes, strict=True))
        steps = sum(n * (i // block_size + 1) for i, n in zip(starts, sizes, strict=True))
        flops = B * H * (pairs * (2 * K + 2 * V + 5) + steps * (2 * V + 5)) + rows * (V + 2)
    items = rows * (2 * K + V + 1) + B * T * HKV * (2 * K + V) + (4 * rows * T if form == "quadratic" else 0)
    items += K * M * (H + 3 * HKV)
    return {
        "flops": flops + gate,
        "bytes": items * itemsize,
        "state_bytes": B * T * HKV * (K + V) * itemsize,
    }
