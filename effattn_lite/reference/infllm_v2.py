r"""InfLLM-V2: means of small overlapping spans of keys point at blocks; dense attention gets no new weight.

Source: Zhao et al. 2025, arXiv:2509.24663; MiniCPM4, arXiv:2506.07900.
"""

import numpy as np


def compress(k, *, kernel_size=32, kernel_stride=16):
    """Means of spans of l tokens that begin every d tokens; k is [B, T, HKV, K], the result [B, NC, HKV, K].

    NC = (T - l) // d + 1: a span that the text cuts is left out.
    """
    starts = range(0, k.shape[1] - kernel_size + 1, kernel_stride)
    means = [k[:, i : i + kernel_size].mean(1) for i in starts]
    return np.stack(means, axis=1) if means else k[:, :0]


def block_scores(p, NK, *, block_size=64, kernel_size=32, kernel_stride=16):
    r"""The largest weight among the spans that overlap a block, for NK blocks; p is [..., NC].

    .. math:: \max_{i = a j - c + 1}^{a j + a - 1} p_i, \qquad a = B_S / d, \quad c = l / d

    Cost: a + c - 2 FLOPs a block.
    Source: Zhao et al. 2025, arXiv:2509.24663: 5 spans for blocks of 64, spans of 32 and strides of 16.
    """
    a, c = block_size // kernel_stride, kernel_size // kernel_stride
    # a span that is not there weighs 0, and so does one that has not ended
    p = np.pad(p, [(0, 0)] * (p.ndim - 1) + [(c - 1, a * (NK + 1))])
    score = p[..., a * np.arange(NK)]
    for m in range(1, a + c - 1):
        score = np.maximum(score, p[..., a * np.arange(NK) + m])
    return score


def select(
    q, k, *, block_size=64, top_k=64, init_blocks=1, local_blocks=32, kernel_size=32, kernel_stride=16,
    scale=None,
):  # fmt: skip
    r"""Blocks that the query heads of a key head read: the first, the last, and those the spans point at.

    .. math:: r_t = \sum_{h \in \mathrm{group}} \operatorname{softmax}_{i \text{ ended}}(s\, q_{t,h}^\top
        \bar k_i)

    Args:
        q, k and the rest: as in `quadratic`.

    Returns:
        Block numbers, [B, T, HKV, min(top_k + local_blocks, ceil(T / BS))]; -1 where there are no more.

    Cost: B H T NC (2 K + 7) FLOPs for the weights of the spans, and those of `block_scores`.
    Source: Zhao et al. 2025, arXiv:2509.24663.
    """
    (B, T, H, K), HKV, NK = q.shape, k.shape[2], -(-q.shape[1] // block_size)
    spans, scale = (
        dict(kernel_size=kernel_size, kernel_stride=kernel_stride),
        K**-0.5 if scale is None else scale,
    )
    means = compress(k, **spans).repeat(H // HKV, axis=2)
    # [B, T, H, K] x [B, NC, H, K] -> [B, T, H, NC]
    s = scale * np.einsum("bthk,bihk->bthi", q, means)
    t, i = np.arange(T)[:, None, None], np.arange(means.shape[1])
    s = np.where(i * kernel_stride + kernel_size - 1 <= t, s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(m == -np.inf, 0, m))  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    p = p / np.where(l == 0, 1, l)
    # all heads of a group read the same blocks
    score = block_scores(p.reshape(B, T, HKV, H // HKV, -1).sum(3), NK, block_size=block_size, **spans)
    j, own = np.arange(NK), t // block_size
    score = np.where((j < init_blocks) | (j > own - local_blocks), np.inf, score)
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the lower block first
    score = np.where(j <= own, score, -np.inf).astype(np.float32)
    best = np.argsort(-score, axis=-1, kind="stable")[..., : top_k + local_blocks]
    return np.where(best <= own, best, -1)


def quadratic(
    q, k, v, *, block_size=64, top_k=64, init_blocks=1, local_blocks=32, kernel_size=32, kernel_stride=16,
    scale=None,
):  # fmt: skip
    r"""Full attention under the mask of the chosen blocks.

    .. math:: \mathcal S(t) = \{j \le t : \lfloor j / B_S \rfloor \in \mathcal I(t)\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        block_size: BS, tokens in a block, a multiple of kernel_stride.
        top_k: blocks of a query beside its local ones, the first init_blocks among them.
        init_blocks: first blocks that are always read.
        local_blocks: last blocks that are always read, the own among them, >= 1.
        kernel_size, kernel_stride: l and d, tokens in a span and from one to the next; l is a multiple of d.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: that of `select`, and B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Zhao et al. 2025, arXiv:2509.24663.
    """
    T, G, scale = q.shape[1], q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    chosen = select(
        q, k, block_size=block_size, top_k=top_k, init_blocks=init_blocks, local_blocks=local_blocks,
        kernel_size=kernel_size, kernel_stride=kernel_stride, scale=scale,
    ).repeat(G, axis=2)  # fmt: skip
    k, v, j = k.repeat(G, axis=2), v.repeat(G, axis=2), np.arange(T)
    # [B, T, H, T]
    see = (chosen[..., None] == j // block_size).any(-2) & (j <= j[:, None, None])
    s = np.where(see, scale * np.einsum("bthk,bjhk->bthj", q, k), -np.inf)
    m = s.max(-1, keepdims=True)
    p = np.exp(s - m)
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    return np.einsum("bthj,bjhv->bthv", p, v) / l, (m + np.log(l))[..., 0]


def gathered(
    q, k, v, *, block_size=64, top_k=64, init_blocks=1, local_blocks=32, kernel_size=32, kernel_stride=16,
    scale=None,
):  # fmt: skip
    """Token by token: gather the chosen blocks as far as they lie behind it, attend to those alone.

    The query heads of a key head are the rows of one small product: that is what fills a tile of a GPU.

    Args and returns: as `quadratic`.

    Cost: that of `select`; then B H n (2 K + 2 V + 5) FLOPs a token, n <= (top_k + local_blocks) BS keys.
    Source: Zhao et al. 2025, arXiv:2509.24663.
    """
    (B, T, H, K), (HKV, V), BS = q.shape, v.shape[2:], block_size
    scale = K**-0.5 if scale is None else scale
    chosen = select(
        q, k, block_size=BS, top_k=top_k, init_blocks=init_blocks, local_blocks=local_blocks,
        kernel_size=kernel_size, kernel_stride=kernel_stride, scale=scale,
    )  # fmt: skip
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    b, h = np.arange(B)[:, None, None], np.arange(HKV)[:, None]
    for t in range(T):
        n = min(chosen.shape[3], t // BS + 1)
        # in order, so that the own block stands last and may be cut: [B, HKV, tokens]
        blocks = np.sort(chosen[:, t], axis=-1)[..., -n:, None]
        j = (blocks * BS + np.arange(BS)).reshape(B, HKV, -1)[..., : (n - 1) * BS + t % BS + 1]
        # [B, HKV, G, K] x [B, HKV, tokens, K] -> [B, HKV, G, tokens]
        s = scale * np.einsum("bhgk,bhjk->bhgj", q[:, t].reshape(B, HKV, -1, K), k[b, j, h])
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [B, HKV, G, tokens] x [B, HKV, tokens, V] -> [B, HKV, G, V]
        o[:, t] = (np.einsum("bhgj,bhjv->bhgv", p, v[b, j, h]) / l).reshape(B, H, V)
        lse[:, t] = (m + np.log(l)).reshape(B, H)
    return o, lse


def cost(
    *, form, B, T, H, K, V, HKV=None, block_size=64, top_k=64, local_blocks=32, kernel_size=32,
    kernel_stride=16, itemsize=2, **_sizes,
):  # fmt: skip
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "gathered".
        B, T, H, K, V, HKV: sizes.
        block_size, top_k, local_blocks, kernel_size, kernel_stride: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read, o and lse written once, and for `quadratic` scores and weights written and
        read, for `gathered` at every token the spans that have ended and the chosen keys and values;
        state_bytes: all keys, all values, and the means of the spans.
    """
    HKV, rows, BS, NK = HKV or H, B * T * H, block_size, -(-T // block_size)
    NC = max(0, (T - kernel_size) // kernel_stride + 1)
    moved = rows * (K + V + 1) + B * T * HKV * (K + V)
    # means; products, scale, maximum, difference, exp, sum, division; sum of the group; maxima, sort
    flops = B * NC * HKV * K * (kernel_size + 1) + rows * NC * (2 * K + 7)
    flops += B * T * HKV * NK * ((block_size + kernel_size) // kernel_stride - 1)
    if form == "quadratic":
        flops += rows * T * (2 * K + 2 * V + 5) + rows * (V + 2)
        moved += 4 * rows * (T + NC)
    else:
        blocks = [min(top_k + local_blocks, t // BS + 1) for t in range(T)]
        n = sum((i - 1) * BS + t % BS + 1 for t, i in enumerate(blocks))
        ended = sum(max(0, (t + 1 - kernel_size) // kernel_stride + 1) for t in range(T))
        flops += B * H * n * (2 * K + 2 * V + 5) + rows * (V + 2)
        moved += B * HKV * (n * (K + V) + ended * K)
    return {
        "flops": flops,
        "bytes": moved * itemsize,
        "state_bytes": B * HKV * (T * (K + V) + NC * K) * itemsize,
    }
