r"""NSA: three readers of one text. One skims summaries, one rereads what skimming found, one looks around.

Source: Yuan et al. 2025, arXiv:2502.11089.
"""

import numpy as np


def compress(x, *, cmp_size=64, cmp_stride=64):
    """Means of spans of l tokens that begin every d tokens; x is [B, T, HKV, K], the result [B, NC, HKV, K].

    NC = (T - l) // d + 1: a span that the text cuts is left out. The paper learns an MLP for the mean.
    """
    starts = range(0, x.shape[1] - cmp_size + 1, cmp_stride)
    means = [x[:, i : i + cmp_size].mean(1) for i in starts]
    return np.stack(means, axis=1) if means else x[:, :0]


def importance(p, NK, *, block_size=64, cmp_size=64, cmp_stride=64):
    r"""Weight of NK blocks, from weights p [..., NC] of spans: a span counts for what it shares with a block.

    .. math:: p^{\mathrm{slc}}[j] = \sum_{m=0}^{a-1} \sum_{n=0}^{c-1} p^{\mathrm{cmp}}[a j + m - n], \qquad
        a = B_S / d, \quad c = l / d

    Cost: a c FLOPs a block.
    Source: Yuan et al. 2025, arXiv:2502.11089, with tokens counted from 0.
    """
    a, c = block_size // cmp_stride, cmp_size // cmp_stride
    p = np.pad(p, [(0, 0)] * (p.ndim - 1) + [(c - 1, a * NK + c)])
    score = np.zeros((*p.shape[:-1], NK))
    for m, n in np.ndindex(a, c):
        score = score + p[..., c - 1 + m - n + a * np.arange(NK)]
    return score


def weigh(q, k, see, scale):
    """Softmax weights, [B, T, H, Tk], of what `see`, [T, Tk] or [B, T, HKV, Tk], shows, and their lse."""
    G = q.shape[2] // k.shape[2]
    see = see[:, None] if see.ndim == 2 else see.repeat(G, axis=2)
    # [B, T, H, K] x [B, Tk, H, K] -> [B, T, H, Tk]
    s = scale * np.einsum("bthk,bjhk->bthj", q, k.repeat(G, axis=2))
    s = np.where(see, s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(m == -np.inf, 0, m))  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return p / np.where(l == 0, 1, l), (m + np.log(l))[..., 0]


def attend(q, k, v, see, scale):
    """Attention to what `see` shows, as in `weigh`: o, [B, T, H, V], and lse."""
    p, lse = weigh(q, k, see, scale)
    # [B, T, H, Tk] x [B, Tk, H, V] -> [B, T, H, V]
    return np.einsum("bthj,bjhv->bthv", p, v.repeat(q.shape[2] // k.shape[2], axis=2)), lse


def select(q, k, *, block_size=64, top_n=16, cmp_size=64, cmp_stride=64, k_cmp=None, scale=None):
    """Blocks that the heads of a key head read: the first, the last two, and those the summaries point at.

    Args:
        q, k, block_size, top_n, cmp_size, cmp_stride, k_cmp, scale: as in `quadratic`.

    Returns:
        Block numbers, [B, T, HKV, min(top_n, ceil(T / BS))]; -1 where there are no more.

    Cost: B H T NC (2 K + 6) FLOPs for the weights, twice their number over a block's stride for the map.
    Source: Yuan et al. 2025, arXiv:2502.11089.
    """
    (B, T, H, K), HKV, NK = q.shape, k.shape[2], -(-q.shape[1] // block_size)
    scale = K**-0.5 if scale is None else scale
    k_cmp = compress(k, cmp_size=cmp_size, cmp_stride=cmp_stride) if k_cmp is None else k_cmp
    t, i = np.arange(T)[:, None], np.arange(k_cmp.shape[1])
    p, _ = weigh(q, k_cmp, i * cmp_stride + cmp_size - 1 <= t, scale)
    # all heads of a group read the same blocks
    p = p.reshape(B, T, HKV, H // HKV, -1).sum(3)
    score = importance(p, NK, block_size=block_size, cmp_size=cmp_size, cmp_stride=cmp_stride)
    j, own = np.arange(NK), t[..., None] // block_size
    score = np.where((j == 0) | (j > own - 2), np.inf, score)
    # compared in float32, so that rounding of float64 breaks no tie; the sort keeps the lower block first
    score = np.where(j <= own, score, -np.inf).astype(np.float32)
    best = np.argsort(-score, axis=-1, kind="stable")[..., :top_n]
    return np.where(best <= own, best, -1)


def quadratic(
    q, k, v, *, g_cmp, g_slc, g_win, block_size=64, top_n=16, window=512, cmp_size=64, cmp_stride=64,
    k_cmp=None, v_cmp=None, k_win=None, v_win=None, scale=None,
):  # fmt: skip
    r"""The three branches as three masked attentions, weighted by gates.

    .. math:: o_t = g^{\mathrm{cmp}}_t\, o^{\mathrm{cmp}}_t + g^{\mathrm{slc}}_t\, o^{\mathrm{slc}}_t
        + g^{\mathrm{win}}_t\, o^{\mathrm{win}}_t

    Args:
        q: queries, [B, T, H, K].
        k, v: keys [B, T, HKV, K] and values [B, T, HKV, V] of the selected branch.
        g_cmp, g_slc, g_win: gates of the branches, [B, T, H].
        block_size: BS, tokens in a selected block, a multiple of d.
        top_n: blocks of a query, the first and the last two among them.
        window: W, tokens that the near branch sees, the own included.
        cmp_size, cmp_stride: l and d, tokens in a span and from one to the next; l is a multiple of d.
        k_cmp, v_cmp: compressed keys and values, [B, NC, HKV, K or V]; default means of k and v.
        k_win, v_win: keys and values of the near branch; default k and v.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], of the selected branch.

    Cost: that of `select`, and B H T (2 T + NC) (2 K + 2 V + 6) FLOPs: the masks hide work, they save none.
    Source: Yuan et al. 2025, arXiv:2502.11089.
    """
    T, scale = q.shape[1], q.shape[3] ** -0.5 if scale is None else scale
    spans = dict(cmp_size=cmp_size, cmp_stride=cmp_stride)
    k_cmp, v_cmp = (compress(x, **spans) if y is None else y for x, y in ((k, k_cmp), (v, v_cmp)))
    k_win, v_win = k if k_win is None else k_win, v if v_win is None else v_win
    chosen = select(q, k, block_size=block_size, top_n=top_n, k_cmp=k_cmp, scale=scale, **spans)
    t, j = np.arange(T)[:, None], np.arange(T)
    ended = np.arange(k_cmp.shape[1]) * cmp_stride + cmp_size - 1 <= t
    in_block = (chosen[..., None] == j // block_size).any(-2) & (j <= t)[:, None]  # [B, T, HKV, T]
    o_cmp, _ = attend(q, k_cmp, v_cmp, ended, scale)
    o_slc, lse = attend(q, k, v, in_block, scale)
    o_win, _ = attend(q, k_win, v_win, (j <= t) & (j > t - window), scale)
    return g_cmp[..., None] * o_cmp + g_slc[..., None] * o_slc + g_win[..., None] * o_win, lse


def gathered(
    q, k, v, *, g_cmp, g_slc, g_win, block_size=64, top_n=16, window=512, cmp_size=64, cmp_stride=64,
    k_cmp=None, v_cmp=None, k_win=None, v_win=None, scale=None,
):  # fmt: skip
    """Token by token: gather the spans, the blocks and the window that it sees, attend to those alone.

    The query heads of a key head are the rows of one small product: that is what fills a tile of a GPU.

    Args and returns: as `quadratic`.

    Cost: that of `select`; then B H T n (2 K + 2 V + 6) FLOPs, n <= NC + top_n BS + W keys a query.
    Source: Yuan et al. 2025, arXiv:2502.11089.
    """
    (B, T, H, K), (HKV, V), G = q.shape, v.shape[2:], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    spans = dict(cmp_size=cmp_size, cmp_stride=cmp_stride)
    k_cmp, v_cmp = (compress(x, **spans) if y is None else y for x, y in ((k, k_cmp), (v, v_cmp)))
    k_win, v_win = k if k_win is None else k_win, v if v_win is None else v_win
    chosen = select(q, k, block_size=block_size, top_n=top_n, k_cmp=k_cmp, scale=scale, **spans)
    o, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
    for b, t, h in np.ndindex(B, T, HKV):
        rows = np.s_[b : b + 1, t : t + 1, h * G : h * G + G]  # [1, 1, G]
        i = np.arange(max((t + 1 - cmp_size) // cmp_stride + 1, 0))
        j = (chosen[b, t, h][chosen[b, t, h] >= 0, None] * block_size + np.arange(block_size)).ravel()
        j, w = j[j <= t], np.arange(max(t - window + 1, 0), t + 1)
        # no summary at first; the selected branch comes last, so that its lse stays
        branches = (g_cmp, k_cmp, v_cmp, i), (g_win, k_win, v_win, w), (g_slc, k, v, j)
        for gate, keys, values, seen in branches[len(i) == 0 :]:
            keys, values = keys[b : b + 1, seen, h : h + 1], values[b : b + 1, seen, h : h + 1]
            o_branch, lse[rows] = attend(q[rows], keys, values, np.ones((1, len(seen)), bool), scale)
            o[rows] += gate[rows][..., None] * o_branch
    return o, lse


def cost(
    *, form, B, T, H, K, V, HKV=None, block_size=64, top_n=16, window=512, cmp_size=64, cmp_stride=64,
    itemsize=2, **_sizes,
):  # fmt: skip
    """FLOPs, bytes and state bytes of a form, as integers; the summaries are means.

    Args:
        form: "quadratic" or "gathered".
        B, T, H, K, V, HKV: sizes.
        block_size, top_n, window, cmp_size, cmp_stride: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v and gates read, o and lse written once, summaries and the selection's weights
        written and read, and for `quadratic` scores and weights too, for `gathered` keys and values of every
        token's sets instead of once; state_bytes: all keys, values and summaries.
    """
    HKV, rows, NK = HKV or H, B * T * H, -(-T // block_size)
    NC = max((T - cmp_size) // cmp_stride + 1, 0)
    steps = block_size // cmp_stride * (cmp_size // cmp_stride)
    # means; weights of spans, their sums over a group, the map, signs turned for the sort
    flops = B * NC * HKV * (K + V) * (cmp_size + 1) + rows * NC * (2 * K + 7) + 2 * rows
    flops += B * T * HKV * NK * (steps + 1)
    seen, visits = rows * (2 * T + NC), 3 * rows
    if form == "gathered":
        blocks = [(min(top_n, t // block_size + 1) - 1) * block_size + t % block_size + 1 for t in range(T)]
        spans = [max((t + 1 - cmp_size) // cmp_stride + 1, 0) for t in range(T)]
        seen = B * H * (sum(blocks) + sum(spans) + sum(min(t + 1, window) for t in range(T)))
        visits = B * H * sum(2 + (n > 0) for n in spans)
    # scale, maximum, difference, exp, sum, division a pair; lse of a branch; gates
    flops += seen * (2 * K + 2 * V + 6) + 2 * visits
    flops += visits * 2 * V if form == "gathered" else rows * 5 * V
    items = rows * (K + V + 4) + B * (T + 2 * NC) * HKV * (K + V) + 2 * B * T * HKV * (NC * H // HKV + NK)
    items += 4 * seen if form == "quadratic" else seen // H * HKV * (K + V)
    return {
        "flops": flops,
        "bytes": items * itemsize,
        "state_bytes": B * (T + NC) * HKV * (K + V) * itemsize,
    }
