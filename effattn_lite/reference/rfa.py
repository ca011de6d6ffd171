r"""Random Feature Attention: sines and cosines whose products average to a Gaussian of the distance.

Between unit vectors that Gaussian is a constant times :math:`e^{\sigma^2 q \cdot k}`, and the constant
cancels in the quotient: softmax attention over directions. A product of few features may be negative, so
that a denominator may come near 0. Three forms compute the same output and the same final state.
"""

import numpy as np


def draw_omega(rng, M, K, *, sigma=1.0):
    r"""M Gaussian frequencies; the larger their spread sigma, the more the direction of a key counts.

    Args:
        rng: a `numpy.random.Generator`.
        M: frequencies; features are twice as many.
        K: key dimension.
        sigma: standard deviation; 1 / sigma^2 plays the temperature of a softmax over unit vectors.

    Returns:
        omega, [M, K].

    Source: Peng et al. 2021, arXiv:2103.02143.
    """
    return rng.normal(scale=sigma, size=(M, K))


def features(x, omega):
    r"""Random Fourier features of a direction; their products average to a Gaussian of the distance.

    .. math:: \phi(x) = \frac{1}{\sqrt M}
        \bigl[\sin \omega_m \cdot \hat x,\; \cos \omega_m \cdot \hat x\bigr],
        \qquad \hat x = \frac{x}{\sqrt{\lVert x \rVert^2 + 10^{-6}}}, \qquad
        E[\phi(x) \cdot \phi(y)] = e^{-\sigma^2 \lVert \hat x - \hat y \rVert^2 / 2}

    Args:
        x: queries or keys, [..., H, K].
        omega: frequencies, [M, K] or, different in every head, [H, M, K].

    Returns:
        [..., H, 2 M], sines first.

    Cost: 2 M K + 4 M + 3 K + 2 FLOPs a vector.
    Source: Peng et al. 2021, arXiv:2103.02143. Differs: the released code divides by the length + 1e-3 and
    multiplies features by 0.1 whatever M is.
    """
    H, K = x.shape[-2:]
    M = omega.shape[-2]
    x = x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    omega = np.broadcast_to(omega, (H, M, K))
    score = np.einsum("...hk,hmk->...hm", x, omega)
    return np.concatenate((np.sin(score), np.cos(score)), axis=-1) / np.sqrt(M)


def recurrent(q, k, v, *, omega, floor=0.0, initial_state=None):
    r"""Random feature attention token by token: add the token to two sums, read their quotient.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    With a floor, the denominator is max(z . phi(q), floor). Without, weights always add up to 1, but they are
    large where the denominator is near 0; where it vanishes (at most 1e-30 in size), o is 0.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        omega: frequencies, [M, K] or, different in every head, [H, M, K].
        floor: smallest denominator; 0: none.
        initial_state: S_0, [B, H, 2 M, V], and z_0, [B, H, 2 M]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, z_T as a tuple.

    Cost: B T H (8 M V + 6 M + V + 1) FLOPs and those of the features.
    Source: Peng et al. 2021, arXiv:2103.02143. The released code has a floor of 1, with 0.64 for the
    product of equal features, which is 1 here.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, omega), features(k, omega)  # [B, T, H, 2 M]
    zeros = np.zeros((B, H, 2 * M, V)), np.zeros((B, H, 2 * M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t)
        S, z = S + np.einsum("bhm,bhv->bhmv", phi_k[:, t], v[:, t]), z + phi_k[:, t]
        # o_t: the token just written is read too
        num = np.einsum("bhm,bhmv->bhv", phi_q[:, t], S)
        den = np.einsum("bhm,bhm->bh", phi_q[:, t], z)[..., None]
        o[:, t] = num / (np.maximum(den, floor) if floor else np.where(np.abs(den) > 1e-30, den, np.inf))
    return o, (S, z)


def parallel(q, k, v, *, omega, floor=0.0, initial_state=None):
    r"""Random feature attention for all tokens at once: masked products of features, and their row sums.

    .. math:: A_{tj} = \phi(q_t) \cdot \phi(k_j)\,[t \ge j], \qquad
        O = \frac{A V + \phi(Q)\, S_0}{A \mathbf 1 + \phi(Q)\, z_0}

    Args and returns: as `recurrent`.

    Cost: B H (T^2 (4 M + 2 V + 1) + T (8 M V + 2 V + 6 M + 2) + 2 M V + 2 M) FLOPs and those of the
    features, quadratic in T.
    Source: Peng et al. 2021, arXiv:2103.02143.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, omega), features(k, omega)  # [B, T, H, 2 M]
    zeros = np.zeros((B, H, 2 * M, V)), np.zeros((B, H, 2 * M))
    S, z = zeros if initial_state is None else initial_state
    seen = np.tri(T, dtype=bool)
    A = np.where(seen, np.einsum("bthm,bjhm->bhtj", phi_q, phi_k), 0)  # [T, 2 M] @ [2 M, T] -> [T, T]
    # [T, T] @ [T, V] + [T, 2 M] @ [2 M, V] -> [T, V]
    num = np.einsum("bhtj,bjhv->bthv", A, v) + np.einsum("bthm,bhmv->bthv", phi_q, S)
    den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bthm,bhm->bth", phi_q, z))[..., None]
    o = num / (np.maximum(den, floor) if floor else np.where(np.abs(den) > 1e-30, den, np.inf))
    # S_T = S_0 + sum_t phi(k_t) v_t^T
    return o, (S + np.einsum("bthm,bthv->bhmv", phi_k, v), z + np.sum(phi_k, axis=1))


def chunkwise(q, k, v, *, omega, floor=0.0, initial_state=None, chunk_size=16):
    r"""Random feature attention a chunk at a time: parallel in a chunk, recurrent from chunk to chunk.

    .. math:: O = \frac{A V + \phi(Q)\, S}{A \mathbf 1 + \phi(Q)\, z}, \qquad
        S \leftarrow S + \phi(K)^\top V, \qquad z \leftarrow z + \phi(K)^\top \mathbf 1

    for a chunk of n tokens, with A its masked scores; the last chunk may be short.

    Args and returns: as `recurrent`, and chunk_size: C, tokens in a chunk.

    Cost: B H (T C (4 M + 2 V + 1) + T (8 M V + 2 V + 6 M + 2) + NC (2 M V + 2 M)) FLOPs and those of
    the features where C divides T, linear in T.
    Source: the sums of Peng et al. 2021, arXiv:2103.02143, cut into chunks.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, omega), features(k, omega)  # [B, T, H, 2 M]
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
        o[:, part] = num / (np.maximum(den, floor) if floor else np.where(np.abs(den) > 1e-30, den, np.inf))
    return o, (S, z)


def step(q, k, v, *, omega, state, floor=0.0):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        omega: frequencies, [M, K] or [H, M, K].
        floor: as `recurrent`.
        state: S_{t-1}, [B, H, 2 M, V], and z_{t-1}, [B, H, 2 M].

    Returns:
        o, [B, H, V], and S_t, z_t as a tuple.

    Cost: B H (8 M V + 6 M + V + 1) FLOPs and those of the features.
    Source: Peng et al. 2021, arXiv:2103.02143.
    """
    phi_q, phi_k = features(q, omega), features(k, omega)  # [B, H, 2 M]
    S, z = state[0] + np.einsum("bhm,bhv->bhmv", phi_k, v), state[1] + phi_k
    num = np.einsum("bhm,bhmv->bhv", phi_q, S)
    den = np.einsum("bhm,bhm->bh", phi_q, z)[..., None]
    return num / (np.maximum(den, floor) if floor else np.where(np.abs(den) > 1e-30, den, np.inf)), (S, z)


def cost(*, form, B, T, H, K, V, M, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v and
    omega read once, o written once, S_T and z_T written once in float32; nothing is spilled, since
    features, the state, or a tile of scores, stay on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        M: frequencies, half the features.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, o and omega.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    F = 2 * M
    state_bytes = 4 * B * H * F * (V + 1)
    # unit length 3 K + 2, products 2 M K, sine and cosine 2 M, share 2 M
    flops = 2 * T * (2 * M * K + 4 * M + 3 * K + 2)
    if form == "recurrent":
        # write 2, read 2; z 1, den 2; quotient
        flops += T * (4 * F * V + 3 * F + V + 1)
    else:
        size = {"parallel": T, "chunkwise": chunk_size}[form]
        for n in (min(size, T - start) for start in range(0, T, size)):
            # scores, values, row sums; read and write; two passes over V; sums S and z
            flops += n * n * (2 * F + 2 * V + 1) + n * (4 * F * V + 2 * V + 3 * F + 2) + F * V + F
    return {
        "flops": B * H * flops,
        "bytes": itemsize * (B * T * H * (2 * K + 2 * V) + H * M * K) + state_bytes,
        "state_bytes": state_bytes,
    }
