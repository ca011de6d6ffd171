r"""Hedgehog: learned features that are a softmax themselves, so that weights can be spiky.

A small map of each query and key, one for each head, is trained until its products mimic the weights of a
softmax attention. Three forms compute the same output and the same final state.
"""

import numpy as np


def features(x, w, b=None):
    r"""A softmax over a linear map of x and its negative: positive, and all but one of them may be near 0.

    .. math:: \phi(x) = \operatorname{softmax}\bigl([u;\, -u]\bigr), \qquad u = W x + b

    Args:
        x: queries or keys, [..., H, K].
        w: W of every head, [H, M, K].
        b: b of every head, [H, M]; None: none.

    Returns:
        [..., H, 2 M], positive, adding up to 1.

    Cost: 2 M K + 12 M FLOPs a vector, M less without b.
    Source: Zhang et al. 2024, arXiv:2402.04347. Differs: one softmax over both halves; LoLCATs takes one over
    each, fla one over both of 2 u. It divides the features [exp(u); exp(-u)] by their sum, which cancels for
    queries and bounds what a key can write.
    """
    u = np.einsum("...hk,hmk->...hm", x, w)
    u = u if b is None else u + b
    u = np.concatenate((u, -u), axis=-1)
    # exp of a difference <= 0: cannot overflow
    e = np.exp(u - np.max(u, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def recurrent(q, k, v, *, wq, wk, bq=None, bk=None, initial_state=None):
    r"""Hedgehog token by token: add the features of the token to two sums, read their quotient.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    Queries and keys have maps of their own. Where the denominator vanishes (at most 1e-30), nothing seen
    answers the query: o is 0 there.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        wq: map of the queries, [H, M, K].
        wk: map of the keys, [H, M, K].
        bq: its bias, [H, M]; None: none.
        bk: its bias, [H, M]; None: none.
        initial_state: S_0, [B, H, 2 M, V], and z_0, [B, H, 2 M]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, z_T as a tuple.

    Cost: B T H (8 M V + 6 M + V) FLOPs and those of the features.
    Source: Zhang et al. 2024, arXiv:2402.04347.
    """
    B, T, H, _ = q.shape
    M, V = wq.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, wq, bq), features(k, wk, bk)  # [B, T, H, 2 M]
    zeros = np.zeros((B, H, 2 * M, V)), np.zeros((B, H, 2 * M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t)
        S, z = S + np.einsum("bhm,bhv->bhmv", phi_k[:, t], v[:, t]), z + phi_k[:, t]
        # o_t: the token just written is read too
        num = np.einsum("bhm,bhmv->bhv", phi_q[:, t], S)
        den = np.einsum("bhm,bhm->bh", phi_q[:, t], z)[..., None]
        o[:, t] = num / np.where(den > 1e-30, den, np.inf)
    return o, (S, z)


def parallel(q, k, v, *, wq, wk, bq=None, bk=None, initial_state=None):
    r"""Hedgehog for all tokens at once: masked products of features, and their sums along a row.

    .. math:: A_{tj} = \phi(q_t) \cdot \phi(k_j)\,[t \ge j], \qquad
        O = \frac{A V + \phi(Q)\, S_0}{A \mathbf 1 + \phi(Q)\, z_0}

    Args and returns: as `recurrent`.

    Cost: B H (T^2 (4 M + 2 V + 1) + T (8 M V + 2 V + 6 M + 1) + 2 M V + 2 M) FLOPs and those of the
    features, quadratic in T.
    Source: Zhang et al. 2024, arXiv:2402.04347.
    """
    B, T, H, _ = q.shape
    M, V = wq.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, wq, bq), features(k, wk, bk)  # [B, T, H, 2 M]
    zeros = np.zeros((B, H, 2 * M, V)), np.zeros((B, H, 2 * M))
    S, z = zeros if initial_state is None else initial_state
    seen = np.tri(T, dtype=bool)
    A = np.where(seen, np.einsum("bthm,bjhm->bhtj", phi_q, phi_k), 0)  # [T, 2 M] @ [2 M, T] -> [T, T]
    # [T, T] @ [T, V] + [T, 2 M] @ [2 M, V] -> [T, V]
    num = np.einsum("bhtj,bjhv->bthv", A, v) + np.einsum("bthm,bhmv->bthv", phi_q, S)
    den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bthm,bhm->bth", phi_q, z))[..., None]
    o = num / np.where(den > 1e-30, den, np.inf)
    # S_T = S_0 + sum_t phi(k_t) v_t^T
    return o, (S + np.einsum("bthm,bthv->bhmv", phi_k, v), z + np.sum(phi_k, axis=1))


def chunkwise(q, k, v, *, wq, wk, bq=None, bk=None, initial_state=None, chunk_size=16):
    r"""Hedgehog a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    .. math:: O = \frac{A V + \phi(Q)\, S}{A \mathbf 1 + \phi(Q)\, z}, \qquad
        S \leftarrow S + \phi(K)^\top V, \qquad z \leftarrow z + \phi(K)^\top \mathbf 1

    for a chunk of n tokens, with A its masked scores; the last chunk may be short.

    Args and returns: as `recurrent`, and chunk_size: C, tokens in a chunk.

    Cost: B H (T C (4 M + 2 V + 1) + T (8 M V + 2 V + 6 M + 1) + NC (2 M V + 2 M)) FLOPs and those of
    the features where C divides T, linear in T.
    Source: the sums of Zhang et al. 2024, arXiv:2402.04347, cut into chunks.
    """
    B, T, H, _ = q.shape
    M, V = wq.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, wq, bq), features(k, wk, bk)  # [B, T, H, 2 M]
    zeros = np.zeros((B, H, 2 * M, V)), np.zeros((B, H, 2 * M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = phi_q[:, part], phi_k[:, part], v[:, part]  # [B, C, H, 2 M or V]
        # 1 no decay: a token sees those before it and itself
        seen = np.tri(qc.shape[1], dtype=bool)
        # 2 intra-chunk: masked scores, [C, 2 M] @ [2 M, C] -> [C, C]
        A = np.where(seen, np.einsum("bihm,bjhm->bhij", qc, kc), 0)
        # 3 chunk state: what this chunk writes, [2 M, C] @ [C, V] -> [2 M, V]
        U = np.einsum("bihm,bihv->bhmv", kc, vc)
        # 4 inter-chunk: what earlier chunks left, [C, 2 M] @ [2 M, V] -> [C, V]
        num = np.einsum("bhij,bjhv->bihv", A, vc) + np.einsum("bihm,bhmv->bihv", qc, S)
        den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bihm,bhm->bih", qc, z))[..., None]
        S, z = S + U, z + np.sum(kc, axis=1)
        # 5 output
        o[:, part] = num / np.where(den > 1e-30, den, np.inf)
    return o, (S, z)


def step(q, k, v, *, wq, wk, state, bq=None, bk=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        wq, wk, bq, bk: as `recurrent`.
        state: S_{t-1}, [B, H, 2 M, V], and z_{t-1}, [B, H, 2 M].

    Returns:
        o, [B, H, V], and S_t, z_t as a tuple.

    Cost: B H (8 M V + 6 M + V) FLOPs and those of the features.
    Source: Zhang et al. 2024, arXiv:2402.04347.
    """
    phi_q, phi_k = features(q, wq, bq), features(k, wk, bk)  # [B, H, 2 M]
    S, z = state[0] + np.einsum("bhm,bhv->bhmv", phi_k, v), state[1] + phi_k
    num = np.einsum("bhm,bhmv->bhv", phi_q, S)
    den = np.einsum("bhm,bhm->bh", phi_q, z)[..., None]
    return num / np.where(den > 1e-30, den, np.inf), (S, z)


def cost(*, form, B, T, H, K, V, M, bias=True, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v and
    maps read once, o written once, S_T and z_T written once in float32; nothing is spilled, since
    features, the state, or a tile of scores, stay on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        M: rows of W, half the features.
        bias: whether bq and bk are given.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, o and maps.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    F = 2 * M
    state_bytes = 4 * B * H * F * (V + 1)
    # map 2 M K, bias M, negative M, softmax 5 of 2 M
    flops = 2 * T * (2 * M * K + (11 + bias) * M)
    if form == "recurrent":
        # write 2, read 2; z 1, den 2; quotient
        flops += T * (4 * F * V + 3 * F + V)
    else:
        size = {"parallel": T, "chunkwise": chunk_size}[form]
        for n in (min(size, T - start) for start in range(0, T, size)):
            # scores, values, row sums; read and write; two passes over V; sums S and z
            flops += n * n * (2 * F + 2 * V + 1) + n * (4 * F * V + 2 * V + 3 * F + 1) + F * V + F
    return {
        "flops": B * H * flops,
        "bytes": itemsize * (B * T * H * (2 * K + 2 * V) + 2 * H * M * (K + bias)) + state_bytes,
        "state_bytes": state_bytes,
    }
