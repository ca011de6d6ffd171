r"""Gated slot attention: M slots of memory, written by a gate a slot, read by a softmax over the slots.

Keys and values have a memory each. A query finds its slots by their keys, and mixes their values: attention
with M tokens however long the text, and two linear attentions with a softmax between them. Three forms
compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, s, g, scale=None, initial_state=None):
    r"""Gated slot attention token by token: fade and write both memories, then attend to the slots.

    .. math:: \tilde K_t = \tilde K_{t-1} \operatorname{Diag}(e^{g_t}) + k_t s_t^\top, \qquad
        \tilde V_t = \operatorname{Diag}(e^{g_t})\, \tilde V_{t-1} + s_t v_t^\top, \qquad
        o_t = \tilde V_t^\top \operatorname{softmax}(s\, \tilde K_t^\top q_t)

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        s: what a token writes to each slot, [B, T, H, M]; 1 - e^g in the paper.
        g: log decay of each slot, [B, T, H, M], nats a token, <= 0; 0 keeps the slot.
        scale: of the scores; default K ** -0.5.
        initial_state: (K~_0, V~_0), [B, H, K, M] and [B, H, M, V]; default zeros.

    Returns:
        o, [B, T, H, V], and (K~_T, V~_T).

    Cost: B T H M (5 K + 5 V + 7) FLOPs: decay 1, outer product 1, add 1, read 2 an entry of each memory; of a
    slot exp, scale and 5 for the softmax.
    Source: Zhang et al. 2024, arXiv:2409.07146. Differs: s is free, and the scores are scaled.
    """
    B, T, H, K = q.shape
    V, M = v.shape[-1], s.shape[-1]
    scale = K**-0.5 if scale is None else scale
    Sk, Sv = initial_state or (np.zeros((B, H, K, M)), np.zeros((B, H, M, V)))
    o = np.zeros_like(v)
    for t in range(T):
        # both memories fade along the slots
        a = np.exp(g[:, t])  # [B, H, M]
        Sk = a[..., None, :] * Sk + np.einsum("bhk,bhm->bhkm", k[:, t], s[:, t])
        Sv = a[..., None] * Sv + np.einsum("bhm,bhv->bhmv", s[:, t], v[:, t])
        # softmax over M slots, not over t tokens
        x = scale * np.einsum("bhk,bhkm->bhm", q[:, t], Sk)
        p = np.exp(x - x.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
        o[:, t] = np.einsum("bhm,bhmv->bhv", p, Sv)
    return o, (Sk, Sv)


def parallel(q, k, v, *, s, g, scale=None, initial_state=None):
    r"""Gated slot attention for all tokens at once: what token j has left in slot m when token t reads it.

    .. math:: P_{tjm} = s_{jm}\, e^{G_{tm} - G_{jm}}\,[t \ge j], \qquad
        x_{tm} = s \sum_j (q_t^\top k_j)\, P_{tjm}, \qquad
        o_t = \sum_j \Bigl(\sum_m \operatorname{softmax}(x_t)_m P_{tjm}\Bigr) v_j, \qquad
        G_t = \sum_{r \le t} g_r

    Args and returns: as `recurrent`.

    Cost: B H (T^2 (2 K + 2 V + 7 M) + T (4 M (K + V) + 14 M + V) + M (2 K + 2 V + 1)) FLOPs, quadratic in T.
    Source: Zhang et al. 2024, arXiv:2409.07146. Differs: as `recurrent`; takes and returns a state.
    """
    B, T, H, K = q.shape
    V, M = v.shape[-1], s.shape[-1]
    scale = K**-0.5 if scale is None else scale
    Sk, Sv = initial_state or (np.zeros((B, H, K, M)), np.zeros((B, H, M, V)))
    G = np.cumsum(g, axis=1)  # [B, T, H, M]
    t = np.arange(T)
    seen = (t[:, None] >= t)[:, :, None, None]
    # exp of a difference <= 0: cannot overflow
    P = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf)) * s[:, None]  # [B, T, T, H, M]
    since, left = np.exp(G), np.exp(G[:, -1:] - G)
    # first pass: scores of the slots; [T, T] @ [T] -> [T], slot by slot
    x = np.einsum("btjh,btjhm->bthm", np.einsum("bthk,bjhk->btjh", q, k), P)
    x = scale * (x + since * np.einsum("bthk,bhkm->bthm", q, Sk))
    p = np.exp(x - x.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    # second pass: values of the slots, [T, T] @ [T, V] -> [T, V]
    o = np.einsum("btjh,bjhv->bthv", np.einsum("bthm,btjhm->btjh", p, P), v)
    o = o + np.einsum("bthm,bhmv->bthv", p * since, Sv)
    kept, w = np.exp(G[:, -1]), s * left
    Sk = kept[..., None, :] * Sk + np.einsum("bthk,bthm->bhkm", k, w)
    Sv = kept[..., None] * Sv + np.einsum("bthm,bthv->bhmv", w, v)
    return o, (Sk, Sv)


def chunkwise(q, k, v, *, s, g, scale=None, initial_state=None, chunk_size=16):
    r"""Gated slot attention a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    Both passes of a chunk need the same table P, summed from the chunk's start, and the memories that the
    chunks before have left. The last chunk may be short.

    Args and returns: as `recurrent`; chunk_size: C, tokens in a chunk.

    Cost: that of `parallel` with T C for T^2, and NC times what does not grow with T: linear in T.
    Source: Zhang et al. 2024, arXiv:2409.07146. Differs: as `recurrent`; decays are exponentials of
    differences, which cannot overflow.
    """
    B, T, H, K = q.shape
    V, M = v.shape[-1], s.shape[-1]
    scale = K**-0.5 if scale is None else scale
    Sk, Sv = initial_state or (np.zeros((B, H, K, M)), np.zeros((B, H, M, V)))
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc, sc = (y[:, part] for y in (q, k, v, s))  # [B, C, H, K, V or M]
        i = np.arange(qc.shape[1])
        seen = (i[:, None] >= i)[:, :, None, None]
        # 1 local decay: between two tokens, from the chunk's start, to the chunk's end
        G = np.cumsum(g[:, part], axis=1)
        P = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf)) * sc[:, None]  # [B, C, C, H, M]
        since, left, kept = np.exp(G), np.exp(G[:, -1:] - G), np.exp(G[:, -1])
        # 2 intra-chunk and 4 inter-chunk of the first pass: scores of the slots
        x = np.einsum("bijh,bijhm->bihm", np.einsum("bihk,bjhk->bijh", qc, kc), P)
        x = scale * (x + since * np.einsum("bihk,bhkm->bihm", qc, Sk))
        p = np.exp(x - x.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
        # 2, 4 and 5 output of the second pass: values of the slots
        oc = np.einsum("bijh,bjhv->bihv", np.einsum("bihm,bijhm->bijh", p, P), vc)
        o[:, part] = oc + np.einsum("bihm,bhmv->bihv", p * since, Sv)
        # 3 chunk states: what this chunk writes, [K, C] @ [C, M] and [M, C] @ [C, V]
        w = sc * left
        Sk = kept[..., None, :] * Sk + np.einsum("bihk,bihm->bhkm", kc, w)
        Sv = kept[..., None] * Sv + np.einsum("bihm,bihv->bhmv", w, vc)
    return o, (Sk, Sv)


def step(q, k, v, *, s, g, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        s: what the token writes to each slot, [B, H, M].
        g: log decay of each slot, [B, H, M].
        state: (K~_{t-1}, V~_{t-1}).
        scale: of the scores; default K ** -0.5.

    Returns:
        o, [B, H, V], and (K~_t, V~_t).

    Cost: B H M (5 K + 5 V + 7) FLOPs.
    Source: Zhang et al. 2024, arXiv:2409.07146.
    """
    tokens = (x[:, None] for x in (q, k, v))
    o, state = recurrent(*tokens, s=s[:, None], g=g[:, None], scale=scale, initial_state=state)
    return o[:, 0], state


def cost(*, form, B, T, H, K, V, M, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; the table P is data,
    and so is the half of it that a mask throws away. Bytes: q, k, v, s read once, o written once, g read and
    both memories written once in float32; nothing is spilled, since the memories, or a tile of scores, stay
    on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V, M: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, s, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * M * (K + V)
    size = {"recurrent": 1, "parallel": T, "chunkwise": chunk_size}[form]
    if form == "recurrent":
        flops = B * T * H * M * (5 * K + 5 * V + 7)
    else:
        chunks = [min(size, T - start) for start in range(0, T, size)]
        # q k and its sum with P; P: difference, exp, times s; p P, and its sum with v
        pairs = sum(n * n for n in chunks) * (2 * K + 2 * V + 7 * M)
        flops = pairs + T * (4 * M * (K + V) + 14 * M + V) + len(chunks) * M * (2 * K + 2 * V + 1)
        flops *= B * H
    return {
        "flops": flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V + M) + 4 * B * T * H * M + state_bytes,
        "state_bytes": state_bytes,
    }
