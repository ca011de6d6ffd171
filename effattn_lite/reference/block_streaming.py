r"""Block streaming: sinks and window rounded to blocks, so that no tile of a kernel is half empty.

Source: Guo et al. 2024, Block Sparse Attention, https://github.com/mit-han-lab/Block-Sparse-Attention.
"""

import numpy as np


def quadratic(q, k, v, *, sink_blocks=1, local_blocks, block_size=128, scale=None):
    r"""Full attention under a mask of blocks: a block of queries sees the first blocks and the last.

    .. math:: \mathcal S(t) = \{j \le t : J < n_{\mathrm{sink}} \ \text{or}\ I - n_{\mathrm{loc}} < J\},
        \qquad I = \lfloor t / B_S \rfloor, \quad J = \lfloor j / B_S \rfloor

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        sink_blocks: blocks at the start that are always seen.
        local_blocks: last blocks that are seen, the query's own included; >= 1.
        block_size: BS, tokens in a block; the last block may be cut short.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Guo et al. 2024, the streaming pattern of Block Sparse Attention.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    t, j = np.arange(T)[:, None], np.arange(T)
    I, J = t // block_size, j // block_size
    see = (j <= t) & ((J < sink_blocks) | (I - local_blocks < J))
    # [B, T, H, K] x [B, T, H, K] -> [B, T, H, T]
    s = scale * np.einsum("bthk,bjhk->bthj", q, k)
    s = np.where(see[:, None], s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, T, H, T] x [B, T, H, V] -> [B, T, H, V]
    o = np.einsum("bthj,bjhv->bthv", p, v)
    return o / l, (m + np.log(l))[..., 0]


def blockwise(q, k, v, *, sink_blocks=1, local_blocks, block_size=128, scale=None):
    """Block by block of queries: gather the blocks of keys it sees, attend to those alone.

    Args and returns: as `quadratic`.

    Cost: B H T n (2 K + 2 V + 5) FLOPs, n <= (sink_blocks + local_blocks) BS keys gathered at a time.
    Source: Guo et al. 2024, the streaming pattern of Block Sparse Attention.
    """
    (B, T, H, K), V, G = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for t in range(0, T, block_size):
        end = min(t + block_size, T)
        # first token of the local blocks
        start = max(t - (local_blocks - 1) * block_size, 0)
        # the sink blocks, as far as they lie before the local ones, then the local ones
        j = np.r_[: min(sink_blocks * block_size, start), start:end]
        # [B, BS, H, n]
        s = scale * np.einsum("bthk,bjhk->bthj", q[:, t:end], k[:, j].repeat(G, axis=2))
        see = j <= np.arange(t, end)[:, None]  # cuts the query's own block
        s = np.where(see[:, None], s, -np.inf)
        m = s.max(-1, keepdims=True)
        p = np.exp(s - m)
        l = p.sum(-1, keepdims=True)
        # [B, BS, H, V]
        o[:, t:end] = np.einsum("bthj,bjhv->bthv", p, v[:, j].repeat(G, axis=2)) / l
        lse[:, t:end] = (m + np.log(l))[..., 0]
    return o, lse


def cost(*, form, B, T, H, K, V, HKV=None, sink_blocks=1, local_blocks, block_size=128, itemsize=2, **_sizes):
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "blockwise".
        B, T, H, K, V, HKV: sizes.
        sink_blocks, local_blocks, block_size: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once, and for `quadratic` scores and weights
        written and read, for `blockwise` the keys and values gathered for each block of queries
        instead of once; state_bytes: keys and values of the sink and local blocks.
    """
    HKV, rows, starts = HKV or H, B * T * H, range(0, T, block_size)
    ends = [min(t + block_size, T) for t in starts]
    lows = [max(t - (local_blocks - 1) * block_size, 0) for t in starts]
    seen = [end - low + min(sink_blocks * block_size, low) for end, low in zip(ends, lows, strict=True)]
    pairs = B * H * sum((end - t) * n for t, end, n in zip(starts, ends, seen, strict=True))
    read = sum(seen)
    if form == "quadratic":
        pairs, read = B * H * T * T, T
    items = rows * (K + V + 1) + B * read * HKV * (K + V) + (4 * pairs if form == "quadratic" else 0)
    return {
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        "flops": pairs * (2 * K + 2 * V + 5) + rows * (V + 2),
        "bytes": items * itemsize,
        "state_bytes": B * (sink_blocks + local_blocks) * block_size * HKV * (K + V) * itemsize,
    }
