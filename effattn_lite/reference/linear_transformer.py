r"""Linear Transformer: replace the exponential of a score by a product of features, and the past is a sum.

With :math:`\kappa(q, k) = \phi(q) \cdot \phi(k)` the sums over the past factor out of the query: a state of
fixed size holds them. Three forms compute the same output and the same final state.
"""

import numpy as np


def features(x, feature_map="elu1"):
    r"""Features of every vector over the last axis; nonnegative ones make the weights of an average.

    .. math:: \phi(x) = \operatorname{elu}(x) + 1 = \begin{cases} x + 1 & x > 0 \\ e^x & x \le 0 \end{cases}

    Args:
        x: [..., K].
        feature_map: "elu1"; "relu", max(x, 0); "softmax", over K; None, x itself; or a function of x.

    Returns:
        [..., M]; M = K for the named maps.

    Cost: 3, 1, 5 or 0 FLOPs an entry, in that order.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236, for elu + 1.
    """
    if feature_map is None or callable(feature_map):
        return x if feature_map is None else feature_map(x)
    if feature_map == "softmax":
        e = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return e / np.sum(e, axis=-1, keepdims=True)
    # exp sees no positive number: cannot overflow
    return np.maximum(x, 0) if feature_map == "relu" else np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def recurrent(q, k, v, *, feature_map="elu1", normalize=True, scale=None, initial_state=None):
    r"""Linear attention token by token: add the token to two sums, read their quotient.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    Where the denominator vanishes (at most 1e-30 in size), nothing seen answers the query: o is 0 there.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        feature_map: as `features`.
        normalize: divide; without, o is s S^T phi(q), and z is carried all the same.
        scale: s; default K ** -0.5; cancels in the quotient.
        initial_state: S_0, [B, H, M, V], and z_0, [B, H, M]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, z_T as a tuple.

    Cost: B T H (4 M V + 3 M + V + 1) FLOPs and those of the features; 2 M + 1 less without the quotient.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236. Differs: the authors' code adds
    1e-6 to the denominator.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = features(q, feature_map), features(k, feature_map)  # [B, T, H, M]
    B, T, H, M = q.shape
    zeros = np.zeros((B, H, M, v.shape[-1])), np.zeros((B, H, M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t)
        S, z = S + np.einsum("bhm,bhv->bhmv", k[:, t], v[:, t]), z + k[:, t]
        num = np.einsum("bhm,bhmv->bhv", q[:, t], S)
        if normalize:
            den = np.einsum("bhm,bhm->bh", q[:, t], z)[..., None]
            o[:, t] = num / np.where(np.abs(den) > 1e-30, den, np.inf)
        else:
            o[:, t] = scale * num
    return o, (S, z)


def parallel(q, k, v, *, feature_map="elu1", normalize=True, scale=None, initial_state=None):
    r"""Linear attention for all tokens at once: masked scores, and their sums along a row.

    .. math:: A_{tj} = \phi(q_t) \cdot \phi(k_j)\,[t \ge j], \qquad
        O = \frac{A V + \phi(Q)\, S_0}{A \mathbf 1 + \phi(Q)\, z_0}

    Args and returns: as `recurrent`.

    Cost: B H (T^2 (2 M + 2 V + 1) + T (4 M V + 2 V + 3 M + 2) + M V + M) FLOPs and those of the features,
    quadratic in T; T^2 + 2 T M + 2 T less without the quotient.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = features(q, feature_map), features(k, feature_map)  # [B, T, H, M]
    B, T, H, M = q.shape
    zeros = np.zeros((B, H, M, v.shape[-1])), np.zeros((B, H, M))
    S, z = zeros if initial_state is None else initial_state
    seen = np.tri(T, dtype=bool)
    A = np.where(seen, np.einsum("bthm,bjhm->bhtj", q, k), 0)  # [T, M] @ [M, T] -> [T, T]
    # [T, T] @ [T, V] + [T, M] @ [M, V] -> [T, V]
    num = np.einsum("bhtj,bjhv->bthv", A, v) + np.einsum("bthm,bhmv->bthv", q, S)
    if normalize:
        den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bthm,bhm->bth", q, z))[..., None]
        o = num / np.where(np.abs(den) > 1e-30, den, np.inf)
    else:
        o = scale * num
    # S_T = S_0 + sum_t phi(k_t) v_t^T
    return o, (S + np.einsum("bthm,bthv->bhmv", k, v), z + np.sum(k, axis=1))


def chunkwise(q, k, v, *, feature_map="elu1", normalize=True, scale=None, initial_state=None, chunk_size=16):
    r"""Linear attention a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    .. math:: O = \frac{A V + \phi(Q)\, S}{A \mathbf 1 + \phi(Q)\, z}, \qquad
        S \leftarrow S + \phi(K)^\top V, \qquad z \leftarrow z + \phi(K)^\top \mathbf 1

    for a chunk of n tokens, with A its masked scores; the last chunk may be short.

    Args and returns: as `recurrent`, and chunk_size: C, tokens in a chunk.

    Cost: B H (T C (2 M + 2 V + 1) + T (4 M V + 2 V + 3 M + 2) + NC (M V + M)) FLOPs and those of the features
    where C divides T, linear in T; T C + 2 T M + 2 T less without the quotient.
    Source: the sums of Katharopoulos et al. 2020, arXiv:2006.16236, cut into chunks.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = features(q, feature_map), features(k, feature_map)  # [B, T, H, M]
    B, T, H, M = q.shape
    zeros = np.zeros((B, H, M, v.shape[-1])), np.zeros((B, H, M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = q[:, part], k[:, part], v[:, part]  # [B, C, H, M or V]
        # 1 no decay: a token sees those before it and itself
        seen = np.tri(qc.shape[1], dtype=bool)
        # 2 intra-chunk: masked scores, [C, M] @ [M, C] -> [C, C]
        A = np.where(seen, np.einsum("bihm,bjhm->bhij", qc, kc), 0)
        # 3 chunk state: what this chunk writes, [M, C] @ [C, V] -> [M, V]
        U = np.einsum("bihm,bihv->bhmv", kc, vc)
        # 4 inter-chunk: what earlier chunks left, [C, M] @ [M, V] -> [C, V]
        num = np.einsum("bhij,bjhv->bihv", A, vc) + np.einsum("bihm,bhmv->bihv", qc, S)
        # 5 output
        if normalize:
            den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bihm,bhm->bih", qc, z))[..., None]
            o[:, part] = num / np.where(np.abs(den) > 1e-30, den, np.inf)
        else:
            o[:, part] = scale * num
        S, z = S + U, z + np.sum(kc, axis=1)
    return o, (S, z)


def step(q, k, v, *, state, feature_map="elu1", normalize=True, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        state: S_{t-1}, [B, H, M, V], and z_{t-1}, [B, H, M].
        feature_map, normalize, scale: as `recurrent`.

    Returns:
        o, [B, H, V], and S_t, z_t as a tuple.

    Cost: B H (4 M V + 3 M + V + 1) FLOPs and those of the features.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = features(q, feature_map), features(k, feature_map)
    S, z = state[0] + np.einsum("bhm,bhv->bhmv", k, v), state[1] + k
    num = np.einsum("bhm,bhmv->bhv", q, S)
    if not normalize:
        return scale * num, (S, z)
    den = np.einsum("bhm,bhm->bh", q, z)[..., None]
    return num / np.where(np.abs(den) > 1e-30, den, np.inf), (S, z)


def cost(*, form, B, T, H, K, V, feature_map="elu1", normalize=True, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form, for a named feature map.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v read
    once, o written once, S_T and z_T written once in float32; nothing is spilled, since features, the state,
    or a tile of scores, stay on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        feature_map, normalize: as `recurrent`.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    M = K
    state_bytes = 4 * B * H * M * (V + 1)
    flops = 2 * T * K * {"elu1": 3, "relu": 1, "softmax": 5, None: 0}[feature_map]
    if form == "recurrent":
        # write 2, read 2; z 1, den 2; quotient
        flops += T * (4 * M * V + M + V) + normalize * T * (2 * M + 1)
    else:
        size = {"parallel": T, "chunkwise": chunk_size}[form]
        for n in (min(size, T - start) for start in range(0, T, size)):
            # scores, values; read and write; two passes over V; sums S and z
            flops += 2 * n * n * (M + V) + n * (4 * M * V + 2 * V + M) + M * V + M
            flops += normalize * (n * n + 2 * n * M + 2 * n)
    return {
        "flops": B * H * flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V) + state_bytes,
        "state_bytes": state_bytes,
    }
