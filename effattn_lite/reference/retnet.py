r"""RetNet: a sum of outer products in which every head forgets at its own fixed rate.

Head h keeps :math:`\gamma_h = 1 - 2^{-5-h}` of its state a token: the first head 31/32, the next 63/64, ...
The rates are chosen, not learned. Three forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, scale=None, initial_state=None):
    r"""Retention token by token: decay the state, write the token, read.

    .. math:: S_t = \gamma_h S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t,
        \qquad \gamma_h = 1 - 2^{-5-h}

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B T H (5 K V + V) FLOPs: decay 1, outer product 1, add 1, read 2 an entry of the state, scale V.
    Source: Sun et al. 2023, arXiv:2307.08621, eq. (6). Differs: the rotation of q and k is the layer's, and
    s stands at the read-out instead of in k.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    gamma = 1 - 2.0 ** (-5 - np.arange(H))[:, None, None]  # [H, 1, 1]
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = gamma S_{t-1} + k_t v_t^T
        S = gamma * S + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def parallel(q, k, v, *, scale=None, initial_state=None):
    r"""Retention for all tokens at once: scores times a fixed decay mask, no softmax.

    .. math:: O = s\,(Q K^\top \odot D)\, V + s\,(\xi \odot Q)\, S_0, \qquad
        D_{tj} = \gamma^{t-j}\,[t \ge j], \quad \xi_t = \gamma^{t} \quad (t = 1..T)

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (2 T^2 (K + V) + T^2 + 4 T K V + 4 T V + 2 K V) FLOPs, quadratic in T.
    Source: Sun et al. 2023, arXiv:2307.08621, eq. (5). Differs: takes and returns a state.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    gamma = 1 - 2.0 ** (-5 - np.arange(H))[:, None, None]  # [H, 1, 1]
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    t = np.arange(T)
    # D_tj = gamma^(t-j) on and below the diagonal, 0 above
    lag = t[:, None] - t
    D = np.where(lag >= 0, gamma ** np.abs(lag), 0)  # [H, T, T]
    A = D * np.einsum("bthk,bjhk->bhtj", q, k)  # [T, K] @ [K, T] -> [T, T]
    past = np.einsum("bthk,bhkv->bthv", q, S)  # [T, K] @ [K, V] -> [T, V]
    o = scale * (np.einsum("bhtj,bjhv->bthv", A, v) + past * (gamma ** (t + 1)[:, None]).swapaxes(0, 1))
    # S_T = gamma^T S_0 + sum_t gamma^(T-1-t) k_t v_t^T, with t counted from 0
    kept = (gamma ** (T - 1 - t)[:, None]).swapaxes(0, 1)  # [T, H, 1]
    S = gamma**T * S + np.einsum("bthk,bthv->bhkv", k, v * kept)
    return o, S


def chunkwise(q, k, v, *, scale=None, initial_state=None, chunk_size=16):
    r"""Retention a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    .. math:: O = s\,(Q K^\top \odot D)\, V + s\,\xi \odot (Q\,S), \qquad
        S \leftarrow \gamma^{n} S + K^\top (\zeta \odot V), \qquad
        \xi_i = \gamma^{i+1}, \quad \zeta_i = \gamma^{n-1-i}

    for a chunk of n tokens i = 0..n-1; the last chunk may be short.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.
        chunk_size: C, tokens in a chunk.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (2 T C (K + V) + T C + 4 T K V + 4 T V + 2 NC K V) FLOPs where C divides T, linear in T.
    Source: Sun et al. 2023, arXiv:2307.08621, eq. (7).
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    gamma = 1 - 2.0 ** (-5 - np.arange(H))[:, None, None]  # [H, 1, 1]
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = q[:, part], k[:, part], v[:, part]  # [B, C, H, K or V]
        i = np.arange(qc.shape[1])
        # 1 local decay: between two tokens, from the chunk's start, to the chunk's end
        lag = i[:, None] - i
        D = np.where(lag >= 0, gamma ** np.abs(lag), 0)  # [H, C, C]
        xi = (gamma ** (i + 1)[:, None]).swapaxes(0, 1)  # [C, H, 1]
        zeta = (gamma ** (i[-1] - i)[:, None]).swapaxes(0, 1)  # [C, H, 1]
        # 2 intra-chunk: masked scores, [C, K] @ [K, C] -> [C, C]
        A = D * np.einsum("bihk,bjhk->bhij", qc, kc)
        # 3 chunk state: what this chunk writes, [K, C] @ [C, V] -> [K, V]
        U = np.einsum("bihk,bihv->bhkv", kc, vc * zeta)
        # 4 inter-chunk: what earlier chunks left, [C, K] @ [K, V] -> [C, V]
        past = np.einsum("bihk,bhkv->bihv", qc, S) * xi
        S = gamma ** len(i) * S + U
        # 5 output
        o[:, part] = scale * (np.einsum("bhij,bjhv->bihv", A, vc) + past)
    return o, S


def step(q, k, v, *, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        state: S_{t-1}, [B, H, K, V].
        scale: s; default K ** -0.5.

    Returns:
        o, [B, H, V], and S_t, [B, H, K, V].

    Cost: B H (5 K V + V) FLOPs.
    Source: Sun et al. 2023, arXiv:2307.08621, eq. (6).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gamma = 1 - 2.0 ** (-5 - np.arange(q.shape[1]))[:, None, None]  # [H, 1, 1]
    S = gamma * state + np.einsum("bhk,bhv->bhkv", k, v)
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; decay tables cost
    nothing. Bytes: q, k, v read once, o written once, S_T written once in float32; nothing is spilled, since
    the state, or a tile of scores, stays on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * K * V
    size = {"recurrent": 1, "parallel": T, "chunkwise": chunk_size}[form]
    if form == "recurrent":
        flops = B * T * H * (5 * K * V + V)
    else:
        chunks = [min(size, T - start) for start in range(0, T, size)]
        # scores 2 n^2 K, mask n^2, values 2 n^2 V; read 2 and write 2; four passes over V; decay and sum S
        flops = B * H * sum(n * n * (2 * K + 2 * V + 1) + n * (4 * K * V + 4 * V) + 2 * K * V for n in chunks)
    return {
        "flops": flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V) + state_bytes,
        "state_bytes": state_bytes,
    }
