r"""Mamba-2: a state space model whose transition is one number a head and token, so attention with a mask.

In the letters of this book q is C, k is B, v is :math:`\Delta x` and :math:`g = \Delta A`. Many value heads
may share one query and key: value head h uses head h // (HV / H). Three forms compute the same output and the
same final state.
"""

import numpy as np


def recurrent(q, k, v, *, g, scale=None, initial_state=None):
    r"""The state space model token by token: decay the state by the token's own number, write, read.

    .. math:: S_t = e^{g_t} S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, the paper's C, [B, T, H, K].
        k: keys, the paper's B, [B, T, H, K].
        v: values, the paper's input times its step, [B, T, HV, V].
        g: log decay, step times A, [B, T, HV], nats a token, <= 0; 0 keeps everything.
        scale: s; default 1.
        initial_state: S_0, [B, HV, K, V]; default zeros.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: B T HV (5 K V + V + 1) FLOPs: decay 1, outer product 1, add 1, read 2 an entry of S; scale V, exp 1.
    Source: Dao and Gu 2024, arXiv:2405.21060. Differs: the paper writes C, B, X for q, k, v, N for
    K and P for V; the discretisation, the skip D x and the gate are the layer's.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = 1.0 if scale is None else scale
    # the value heads of a group share q and k
    q, k = (np.repeat(x, HV // H, axis=2) for x in (q, k))  # [B, T, HV, K]
    S = np.zeros((B, HV, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = e^g_t S_{t-1} + k_t v_t^T
        S = np.exp(g[:, t])[:, :, None, None] * S + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def parallel(q, k, v, *, g, scale=None, initial_state=None):
    r"""The same map as masked attention: scores times a mask whose entries are products of decays.

    .. math:: O = s\,(Q K^\top \odot L)\, V + s\,e^{G} \odot (Q\, S_0), \qquad
        L_{tj} = \prod_{r=j+1}^{t} e^{g_r} = e^{G_t - G_j}\,[t \ge j], \qquad G_t = \sum_{r \le t} g_r

    The difference is taken before the exponential, so no exponent is above 0 and no decay is too strong.

    Args:
        q: queries, the paper's C, [B, T, H, K].
        k: keys, the paper's B, [B, T, H, K].
        v: values, the paper's input times its step, [B, T, HV, V].
        g: log decay, step times A, [B, T, HV], nats a token, <= 0; 0 keeps everything.
        scale: s; default 1.
        initial_state: S_0, [B, HV, K, V]; default zeros.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: 2 B H T^2 K + B HV (T^2 (2 V + 3) + T (4 K V + 4 V + 4) + 2 K V + 1) FLOPs, quadratic in T: the
    scores are computed once a group.
    Source: Dao and Gu 2024, arXiv:2405.21060. Differs: takes and returns a state.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, HV, K, V)) if initial_state is None else initial_state
    G = np.cumsum(g, axis=1)  # [B, T, HV]
    t = np.arange(T)
    seen = (t[:, None] >= t)[:, :, None]
    # L_tj = e^(G_t - G_j) on and below the diagonal, 0 above; exp of a difference <= 0: cannot overflow
    L = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf))  # [B, T, T, HV]
    A = np.einsum("bthk,bjhk->btjh", q, k)  # [T, K] @ [K, T] -> [T, T]
    A = np.repeat(A, HV // H, axis=3) * L
    q, k = (np.repeat(x, HV // H, axis=2) for x in (q, k))  # [B, T, HV, K]
    # [T, K] @ [K, V] -> [T, V]
    past = np.einsum("bthk,bhkv->bthv", q, S) * np.exp(G)[..., None]
    o = scale * (np.einsum("btjh,bjhv->bthv", A, v) + past)
    # S_T = e^(G_T) S_0 + sum_t e^(G_T - G_t) k_t v_t^T
    kept = v * np.exp(G[:, -1:] - G)[..., None]
    S = np.exp(G[:, -1])[:, :, None, None] * S + np.einsum("bthk,bthv->bhkv", k, kept)
    return o, S


def chunkwise(q, k, v, *, g, scale=None, initial_state=None, chunk_size=16):
    r"""Mamba-2 a chunk at a time: masked attention inside a chunk, state space model from chunk to chunk.

    .. math:: O = s\,(Q K^\top \odot L)\, V + s\,e^{G} \odot (Q\,S), \qquad
        S \leftarrow e^{G_{n-1}} S + K^\top (e^{G_{n-1} - G} \odot V), \qquad
        L_{ij} = e^{G_i - G_j}\,[i \ge j]

    for a chunk of n tokens i = 0..n-1, with G summed from the chunk's start; the last chunk may be short.

    Args:
        q: queries, the paper's C, [B, T, H, K].
        k: keys, the paper's B, [B, T, H, K].
        v: values, the paper's input times its step, [B, T, HV, V].
        g: log decay, step times A, [B, T, HV], nats a token, <= 0; 0 keeps everything.
        scale: s; default 1.
        initial_state: S_0, [B, HV, K, V]; default zeros.
        chunk_size: C, tokens in a chunk.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: 2 B H T C K + B HV (T C (2 V + 3) + T (4 K V + 4 V + 4) + NC (2 K V + 1)) FLOPs where C divides T,
    linear in T.
    Source: Dao and Gu 2024, arXiv:2405.21060, listing 1. Differs: chunk states are passed on one by one, not
    through a second mask over the chunks, and the last chunk may be short.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, HV, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = q[:, part], k[:, part], v[:, part]  # [B, C, H, K], [B, C, HV, V]
        i = np.arange(qc.shape[1])
        seen = (i[:, None] >= i)[:, :, None]
        # 1 local decay: between two tokens, from the chunk's start, to the chunk's end
        G = np.cumsum(g[:, part], axis=1)  # [B, C, HV]
        # exp of a difference <= 0: cannot overflow
        L = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf))  # [B, C, C, HV]
        xi = np.exp(G)[..., None]
        zeta = np.exp(G[:, -1:] - G)[..., None]
        # 2 intra-chunk: scores once a group, [C, K] @ [K, C] -> [C, C], then a mask a value head
        A = np.repeat(np.einsum("bihk,bjhk->bijh", qc, kc), HV // H, axis=3) * L
        qc, kc = (np.repeat(x, HV // H, axis=2) for x in (qc, kc))  # [B, C, HV, K]
        # 3 chunk state: what this chunk writes, [K, C] @ [C, V] -> [K, V]
        U = np.einsum("bihk,bihv->bhkv", kc, vc * zeta)
        # 4 inter-chunk: what earlier chunks left, [C, K] @ [K, V] -> [C, V]
        past = np.einsum("bihk,bhkv->bihv", qc, S) * xi
        S = np.exp(G[:, -1])[:, :, None, None] * S + U
        # 5 output
        o[:, part] = scale * (np.einsum("bijh,bjhv->bihv", A, vc) + past)
    return o, S


def step(q, k, v, *, g, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, the paper's C, [B, H, K].
        k: key, the paper's B, [B, H, K].
        v: value, the paper's input times its step, [B, HV, V].
        g: log decay, step times A, [B, HV], nats, <= 0.
        state: S_{t-1}, [B, HV, K, V].
        scale: s; default 1.

    Returns:
        o, [B, HV, V], and S_t, [B, HV, K, V].

    Cost: B HV (5 K V + V + 1) FLOPs.
    Source: Dao and Gu 2024, arXiv:2405.21060.
    """
    scale = 1.0 if scale is None else scale
    # [B, HV, K]
    q, k = (np.repeat(x, v.shape[1] // x.shape[1], axis=1) for x in (q, k))
    S = np.exp(g)[:, :, None, None] * state + np.einsum("bhk,bhv->bhkv", k, v)
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, K, V, HV=None, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; the masks are data,
    and so is the half of them that is thrown away. Bytes: q, k, v read once, o written once, g read and S_T
    written once in float32; nothing is spilled, since the state, or a tile of scores, stays on chip in every
    form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        HV: value heads; default H.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    HV = HV or H
    state_bytes = 4 * B * HV * K * V
    size = {"recurrent": 1, "parallel": T, "chunkwise": chunk_size}[form]
    if form == "recurrent":
        flops = B * T * HV * (5 * K * V + V + 1)
    else:
        chunks = [min(size, T - start) for start in range(0, T, size)]
        # scores 2 n^2 K a group; mask 3 n^2 and values 2 n^2 V a value head
        pairs = sum(n * n for n in chunks) * (2 * H * K + HV * (2 * V + 3))
        # read 2 and write 2; four passes over V; cumsum, two decays, a difference; decay and sum S
        flops = B * (pairs + HV * (T * (4 * K * V + 4 * V + 4) + len(chunks) * (2 * K * V + 1)))
    return {
        "flops": flops,
        "bytes": itemsize * B * T * (2 * H * K + 2 * HV * V) + 4 * B * T * HV + state_bytes,
        "state_bytes": state_bytes,
    }
