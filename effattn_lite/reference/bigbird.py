r"""BigBird: blocks of tokens see their neighbours, the first and last block, and a few drawn at random.

Source: Zaheer et al. 2020, arXiv:2007.14062.
"""

import numpy as np


def select(T, H, *, block_size=64, random_blocks=3, seed=0):
    r"""Which blocks of keys a block of queries sees, as a picture of 0 and 1 for each head.

    .. math:: \mathcal I_h(i) = \{i - 1, i, i + 1\} \cup \{0, N_B - 1\} \cup \mathcal R_h(i), \qquad
        \mathcal I_h(0) = \mathcal I_h(N_B - 1) = \{0, \dots, N_B - 1\}

    Every other block gets a random number, and those of the r smallest are R(i).

    Args:
        T: tokens.
        H: heads; each draws for itself.
        block_size: tokens in a block; NB = ceil(T / block_size).
        random_blocks: r.
        seed: of `numpy.random.default_rng`.

    Returns:
        see, [H, NB, NB], bool; row i is the queries'.

    Source: Zaheer et al. 2020, arXiv:2007.14062: global blocks are some of the text's own (ITC).
    """
    NB = -(-T // block_size)
    i, j = np.arange(NB)[:, None], np.arange(NB)
    fixed = (abs(i - j) <= 1) | (i % (NB - 1 or 1) == 0) | (j % (NB - 1 or 1) == 0)
    # beyond all random numbers, which are below 1: what is seen anyway is drawn last
    order = np.where(fixed, 1, np.random.default_rng(seed).random((H, NB, NB))).argsort(-1, kind="stable")
    see = np.tile(fixed, (H, 1, 1))
    np.put_along_axis(see, order[..., :random_blocks], True, axis=-1)
    return see


def quadratic(q, k, v, *, block_size=64, random_blocks=3, seed=0, scale=None):
    r"""Full attention under a mask of blocks.

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j, \qquad
        \mathcal S(t) = \{j : \lfloor j / B_S \rfloor \in \mathcal I(\lfloor t / B_S \rfloor)\}

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        block_size, random_blocks, seed: as in `select`.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, T, H, V], and lse, [B, T, H], the log of the softmax's denominator.

    Cost: B H T^2 (2 K + 2 V + 5) FLOPs: the mask hides work, it saves none.
    Source: Zaheer et al. 2020, arXiv:2007.14062.
    """
    T, H, G = q.shape[1], q.shape[2], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat(G, axis=2), v.repeat(G, axis=2)  # one key head serves G query heads
    blocks, b = select(T, H, block_size=block_size, random_blocks=random_blocks, seed=seed), np.arange(T)
    see = blocks[:, b[:, None] // block_size, b // block_size]  # [H, T, T]
    # [B, T, H, K] x [B, T, H, K] -> [B, H, T, T]
    s = np.where(see, scale * np.einsum("bthk,bjhk->bhtj", q, k), -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - m)  # exp of a difference <= 0: cannot overflow
    l = p.sum(-1, keepdims=True)
    # [B, H, T, T] x [B, T, H, V] -> [B, H, T, V]
    o = np.einsum("bhtj,bjhv->bhtv", p, v) / l
    return o.swapaxes(1, 2), (m + np.log(l))[..., 0].swapaxes(1, 2)


def blockwise(q, k, v, *, block_size=64, random_blocks=3, seed=0, scale=None):
    """Block by block: fetch the keys of the chosen blocks and no others.

    Args and returns: as `quadratic`.

    Cost: B H T (5 + r) B_S (2 K + 2 V + 5) FLOPs, and 2 B_S T instead for each of the two global blocks.
    Source: Zaheer et al. 2020, arXiv:2007.14062.
    """
    (B, T, H, K), V, G = q.shape, v.shape[3], q.shape[2] // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    block = np.arange(T) // block_size
    o, lse = np.empty((B, T, H, V)), np.empty((B, T, H))
    sets = select(T, H, block_size=block_size, random_blocks=random_blocks, seed=seed)
    for h, head in enumerate(sets):
        for i, chosen in enumerate(head):
            t, j = block == i, chosen[block]
            # [B, rows, K] x [B, keys, K] -> [B, rows, keys]
            s = scale * np.einsum("btk,bjk->btj", q[:, t, h], k[:, j, h // G])
            m = s.max(-1, keepdims=True)
            p = np.exp(s - m)
            l = p.sum(-1, keepdims=True)
            # [B, rows, keys] x [B, keys, V] -> [B, rows, V]
            o[:, t, h] = np.einsum("btj,bjv->btv", p, v[:, j, h // G]) / l
            lse[:, t, h] = (m + np.log(l))[..., 0]
    return o, lse


def cost(
    *, form, B, T, H, K, V, HKV=None, block_size=64, random_blocks=3, seed=0, itemsize=2, **_sizes
):  # fmt: skip
    """FLOPs, bytes and state bytes of a form, as integers.

    Args:
        form: "quadratic" or "blockwise".
        B, T, H, K, V, HKV: sizes.
        block_size, random_blocks, seed: as in the forms.
        itemsize: bytes of one number.

    Returns:
        flops; bytes: q, k, v read and o, lse written once, and for `quadratic` scores and weights written and
        read, for `blockwise` the keys and values fetched for each block of queries; state_bytes: 0, since an
        old token sees new ones, and nothing decodes.
    """
    HKV, rows = HKV or H, B * T * H
    sizes = np.bincount(np.arange(T) // block_size)
    keys = select(T, H, block_size=block_size, random_blocks=random_blocks, seed=seed) @ sizes  # [H, NB]
    pairs = B * int((keys @ sizes).sum()) if form == "blockwise" else rows * T
    fetched = 4 * pairs if form == "quadratic" else B * int(keys.sum()) * (K + V)
    items = rows * (K + V + 1) + B * T * HKV * (K + V) + fetched
    return {
        # scale, maximum, difference, exp, sum; then the division and lse of each row
        "flops": pairs * (2 * K + 2 * V + 5) + rows * (V + 2),
        "bytes": items * itemsize,
        "state_bytes": 0,
    }
