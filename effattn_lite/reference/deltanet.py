r"""DeltaNet: before it writes a value, a key reads what it holds, and writes the difference only.

A sum of outer products piles new values on old ones; the delta rule replaces them. With :math:`\beta = 1`
and a key of length 1, the old value is gone and the new one is read back exactly; with :math:`\beta = 0`
nothing happens; with :math:`\beta = 2` the state is reflected. Three forms compute the same output and the
same final state.
"""

import numpy as np


def recurrent(q, k, v, *, beta, scale=None, initial_state=None):
    r"""The delta rule token by token: read the key's old value, write the difference, read the query.

    .. math:: \delta_t = \beta_t\,(v_t - S_{t-1}^\top k_t), \qquad S_t = S_{t-1} + k_t \delta_t^\top
        = (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K]; expected of length 1 over K (not normalised here).
        v: values, [B, T, H, V].
        beta: write strength, [B, T, H], in [0, 1], or in [0, 2] where reflections are wanted.
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B T H (6 K V + 3 V) FLOPs: read the key 2, outer product 1, add 1, read the query 2 an entry of the
    state; difference, strength and scale V each.
    Source: Yang et al. 2024, arXiv:2406.06484; the rule is that of Schlag et al. 2021,
    arXiv:2102.11174. Differs: the papers' state is the transpose, [V, K]; s is fla's.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_{t-1}^T k_t: what the memory holds for this key
        old = np.einsum("bhk,bhkv->bhv", k[:, t], S)
        # S_t = S_{t-1} + k_t (beta_t (v_t - old))^T
        S = S + np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def parallel(q, k, v, *, beta, scale=None, initial_state=None):
    r"""The delta rule for all tokens at once: one triangular system gives every difference written.

    .. math:: (I + A)\,\Delta = \operatorname{Diag}(\beta)\,(V - K S_0), \qquad
        A_{tj} = \beta_t\, k_t^\top k_j\,[t > j], \qquad
        O = s\,\bigl(Q S_0 + (Q K^\top \odot [t \ge j])\, \Delta\bigr)

    Row t of :math:`\Delta` is :math:`\delta_t`: what the key has read, the state of before and the writes
    since, is taken off the value.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K]; expected of length 1 over K (not normalised here).
        v: values, [B, T, H, V].
        beta: write strength, [B, T, H], in [0, 1], or in [0, 2].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (2 T^3 / 3 + T^2 (4 K + 4 V + 2) + T (6 K V + 4 V) + K V) FLOPs, cubic in T, since
    `np.linalg.solve` factors a matrix that is triangular already; substitution alone would be quadratic.
    Source: the recurrence of Yang et al. 2024, arXiv:2406.06484, as one system.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    b = beta.swapaxes(1, 2)[..., None]  # [B, H, T, 1]
    t = np.arange(T)
    # delta_t + sum_{j<t} beta_t (k_t . k_j) delta_j = beta_t (v_t - S_0^T k_t)
    # [B, H, T, T]
    A = np.where(t[:, None] > t, b * np.einsum("bthk,bjhk->bhtj", k, k), 0)
    unread = v.swapaxes(1, 2) - np.einsum("bthk,bhkv->bhtv", k, S)  # [B, H, T, V]
    delta = np.linalg.solve(np.eye(T) + A, b * unread)  # [B, H, T, V]
    # o_t = s (S_0^T q_t + sum_{j<=t} (q_t . k_j) delta_j)
    scores = np.where(t[:, None] >= t, np.einsum("bthk,bjhk->bhtj", q, k), 0)
    past = np.einsum("bthk,bhkv->bthv", q, S)  # [T, K] @ [K, V] -> [T, V]
    o = scale * (past + np.einsum("bhtj,bhjv->bthv", scores, delta))
    # S_T = S_0 + K^T Delta
    S = S + np.einsum("bthk,bhtv->bhkv", k, delta)
    return o, S


def chunkwise(q, k, v, *, beta, scale=None, initial_state=None, chunk_size=16):
    r"""The delta rule a chunk at a time: a small triangular inverse inside, the state from chunk to chunk.

    .. math:: M = (I + A)^{-1} \operatorname{Diag}(\beta), \quad W = M K, \quad U = M V, \quad
        \Delta = U - W S, \qquad
        O = s\,\bigl(Q S + (Q K^\top \odot [i \ge j])\,\Delta\bigr), \qquad S \leftarrow S + K^\top \Delta

    for a chunk of n tokens i = 0..n-1, with :math:`A_{ij} = \beta_i\, k_i^\top k_j\,[i > j]`; the last chunk
    may be short. M, W and U do not ask for the state, so a kernel makes those of all chunks at once.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K]; expected of length 1 over K (not normalised here).
        v: values, [B, T, H, V].
        beta: write strength, [B, T, H], in [0, 1], or in [0, 2].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.
        chunk_size: C, tokens in a chunk.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (T C (6 K + 4 V + 1) + T C^2 + T (6 K V + 3 V - 1) + NC K V) FLOPs where C divides T.
    Source: Yang et al. 2024, arXiv:2406.06484; its T is our M, since T counts tokens here.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = q[:, part], k[:, part], v[:, part]  # [B, C, H, K or V]
        b = beta[:, part].swapaxes(1, 2)[..., None]  # [B, H, C, 1]
        i = np.arange(qc.shape[1])
        # 1 the state before token i is S + sum_{j<i} k_j delta_j^T, put into delta_i:
        #   delta_i = beta_i (v_i - S^T k_i) - sum_{j<i} A_ij delta_j, so Delta = M (V - K S)
        # [B, H, C, C]
        A = np.where(i[:, None] > i, b * np.einsum("bihk,bjhk->bhij", kc, kc), 0)
        # 2 M = (I + A)^-1 Diag(beta) by forward substitution: a row asks for the rows above it
        M = np.where(i[:, None] == i, b, 0)  # [B, H, C, C]
        for r in i[1:]:
            M[:, :, r] -= np.einsum("bhj,bhjm->bhm", A[:, :, r, :r], M[:, :, :r])
        # 3 what would be written on an empty state, and how the state is read: [C, C] @ [C, V or K]
        U = np.einsum("bhij,bjhv->bhiv", M, vc)
        W = np.einsum("bhij,bjhk->bhik", M, kc)
        # 4 what is written: Delta = U - W S, [C, K] @ [K, V] -> [C, V]
        delta = U - np.einsum("bhik,bhkv->bhiv", W, S)
        # 5 output: what earlier chunks left, and what this chunk wrote up to i
        scores = np.where(i[:, None] >= i, np.einsum("bihk,bjhk->bhij", qc, kc), 0)
        past = np.einsum("bihk,bhkv->bihv", qc, S)
        o[:, part] = scale * (past + np.einsum("bhij,bhjv->bihv", scores, delta))
        # 6 state: [K, C] @ [C, V] -> [K, V]
        S = S + np.einsum("bihk,bhiv->bhkv", kc, delta)
    return o, S


def step(q, k, v, *, beta, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        beta: write strength, [B, H].
        state: S_{t-1}, [B, H, K, V].
        scale: s; default K ** -0.5.

    Returns:
        o, [B, H, V], and S_t, [B, H, K, V].

    Cost: B H (6 K V + 3 V) FLOPs.
    Source: Yang et al. 2024, arXiv:2406.06484.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    old = np.einsum("bhk,bhkv->bhv", k, state)
    S = state + np.einsum("bhk,bhv->bhkv", k, beta[:, :, None] * (v - old))
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; masks cost nothing.
    Bytes: q, k, v, beta read once, o written once, S_T written once in float32; nothing is spilled, since the
    state, or a tile of scores, stays on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, beta, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * K * V
    if form == "recurrent":
        flops = T * (6 * K * V + 3 * V)
    elif form == "parallel":
        # products k k, q k, scores delta; strength and I; three with the state, four passes over V; the solve
        flops = T * T * (4 * K + 2 * V + 2) + T * (6 * K * V + 4 * V) + K * V + 2 * T**3 // 3 + 2 * T * T * V
    else:
        chunks = [min(chunk_size, T - start) for start in range(0, T, chunk_size)]
        # k k, q k and W 2 n^2 K, U and scores delta 2 n^2 V, strength n^2; substitution n^3 - n; as above
        flops = sum(n * n * (6 * K + 4 * V + 1) + n**3 - n + n * (6 * K * V + 3 * V) + K * V for n in chunks)
    return {
        "flops": B * H * flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V + 1) + state_bytes,
        "state_bytes": state_bytes,
    }
