r"""Gated Random Feature Attention: the past is forgotten at a pace that the text sets.

A gate :math:`e^{g_t}` of every token says what is kept of both sums; what it leaves over,
:math:`1 - e^{g_t}`, is the weight of the token itself. Three forms compute the same output and the same
final state.
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


def recurrent(q, k, v, *, omega, g, floor=0.0, initial_state=None):
    r"""Gated random feature attention token by token: fade both sums, add the token, read their quotient.

    .. math:: S_t = e^{g_t} S_{t-1} + (1 - e^{g_t})\, \phi(k_t) v_t^\top, \quad
        z_t = e^{g_t} z_{t-1} + (1 - e^{g_t})\, \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    With a floor, the denominator is max(z . phi(q), floor). Without, weights always add up to 1, but they are
    large where the denominator is near 0; where it vanishes (at most 1e-30 in size), o is 0.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        omega: frequencies, [M, K] or, different in every head, [H, M, K].
        g: log of the gate, [B, T, H], nats, <= 0; 0 keeps everything and writes nothing.
        floor: smallest denominator; 0: none. The weights written add up to less than 1.
        initial_state: S_0, [B, H, 2 M, V], and z_0, [B, H, 2 M]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, z_T as a tuple.

    Cost: B T H (10 M V + 12 M + V + 4) FLOPs and those of the features.
    Source: Peng et al. 2021, arXiv:2103.02143. Differs: the paper writes g for e^g. The released code has a
    floor of 1, with 0.64 for the product of equal features, which is 1 here: it never divides.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    # 1 - e^g, without cancellation near g = 0
    phi_q, phi_k = features(q, omega), features(k, omega) * -np.expm1(g)[..., None]  # [B, T, H, 2 M]
    zeros = np.zeros((B, H, 2 * M, V)), np.zeros((B, H, 2 * M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = e^g_t S_{t-1} + (1 - e^g_t) phi(k_t) v_t^T, z_t likewise
        keep = np.exp(g[:, t])[..., None]  # [B, H, 1]
        S = keep[..., None] * S + np.einsum("bhm,bhv->bhmv", phi_k[:, t], v[:, t])
        z = keep * z + phi_k[:, t]
        # o_t: the token just written is read too
        num = np.einsum("bhm,bhmv->bhv", phi_q[:, t], S)
        den = np.einsum("bhm,bhm->bh", phi_q[:, t], z)[..., None]
        o[:, t] = num / (np.maximum(den, floor) if floor else np.where(np.abs(den) > 1e-30, den, np.inf))
    return o, (S, z)


def parallel(q, k, v, *, omega, g, floor=0.0, initial_state=None):
    r"""Gated random feature attention for all tokens at once: products of features times what is kept.

    .. math:: A_{tj} = e^{G_t - G_j} (1 - e^{g_j})\, \phi(q_t) \cdot \phi(k_j)\,[t \ge j], \quad
        O = \frac{A V + e^{G} \odot \phi(Q)\, S_0}{A \mathbf 1 + e^{G} \odot \phi(Q)\, z_0}, \quad
        G_t = \sum_{r \le t} g_r

    Args and returns: as `recurrent`.

    Cost: B H (T^2 (4 M + 2 V + 4) + T (8 M V + 2 V + 12 M + 8) + 4 M V + 4 M + 1) FLOPs and those of the
    features, quadratic in T.
    Source: Peng et al. 2021, arXiv:2103.02143, unrolled.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, omega), features(k, omega) * -np.expm1(g)[..., None]  # [B, T, H, 2 M]
    zeros = np.zeros((B, H, 2 * M, V)), np.zeros((B, H, 2 * M))
    S, z = zeros if initial_state is None else initial_state
    seen = np.tri(T, dtype=bool)[:, :, None]
    G = np.cumsum(g, axis=1)  # [B, T, H]
    # exp of a difference <= 0: cannot overflow
    D = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf))  # [B, T, T, H]
    A = np.einsum("bthm,bjhm->btjh", phi_q, phi_k) * D
    past = phi_q * np.exp(G)[..., None]
    num = np.einsum("btjh,bjhv->bthv", A, v) + np.einsum("bthm,bhmv->bthv", past, S)
    den = (np.sum(A, axis=2) + np.einsum("bthm,bhm->bth", past, z))[..., None]
    o = num / (np.maximum(den, floor) if floor else np.where(np.abs(den) > 1e-30, den, np.inf))
    # S_T = e^(G_T) S_0 + sum_t e^(G_T - G_t) (1 - e^g_t) phi(k_t) v_t^T
    keep, left = np.exp(G[:, -1])[..., None], phi_k * np.exp(G[:, -1:] - G)[..., None]
    S = keep[..., None] * S + np.einsum("bthm,bthv->bhmv", left, v)
    return o, (S, keep * z + np.sum(left, axis=1))


def chunkwise(q, k, v, *, omega, g, floor=0.0, initial_state=None, chunk_size=16):
    r"""Gated random feature attention a chunk at a time: parallel inside, recurrent from chunk to chunk.

    .. math:: O = \frac{A V + e^{G} \odot \phi(Q)\, S}{A \mathbf 1 + e^{G} \odot \phi(Q)\, z}, \quad
        S \leftarrow e^{G_{n-1}} S + \Phi^\top V, \quad z \leftarrow e^{G_{n-1}} z + \Phi^\top \mathbf 1,
        \Phi_i = e^{G_{n-1} - G_i} (1 - e^{g_i})\, \phi(k_i)

    for a chunk of n tokens i = 0..n-1, with A and G as in `parallel`; the last chunk may be short.

    Args and returns: as `recurrent`, and chunk_size: C, tokens in a chunk.

    Cost: B H (T C (4 M + 2 V + 4) + T (8 M V + 2 V + 12 M + 8) + NC (4 M V + 4 M + 1)) FLOPs and those of
    the features where C divides T, linear in T.
    Source: the sums of Peng et al. 2021, arXiv:2103.02143, cut into chunks.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, omega), features(k, omega) * -np.expm1(g)[..., None]  # [B, T, H, 2 M]
    zeros = np.zeros((B, H, 2 * M, V)), np.zeros((B, H, 2 * M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = phi_q[:, part], phi_k[:, part], v[:, part]  # [B, C, H, 2 M or V]
        seen = np.tri(qc.shape[1], dtype=bool)[:, :, None]
        # 1 local decay: between two tokens, from the chunk's start, to the chunk's end
        G = np.cumsum(g[:, part], axis=1)  # [B, C, H]
        # exp of a difference <= 0: cannot overflow
        D = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf))  # [B, C, C, H]
        past, left = qc * np.exp(G)[..., None], kc * np.exp(G[:, -1:] - G)[..., None]
        # 2 intra-chunk: masked scores, [C, 2 M] @ [2 M, C] -> [C, C]
        A = np.einsum("bihm,bjhm->bijh", qc, kc) * D
        # 3 chunk state: what this chunk writes, [2 M, C] @ [C, V] -> [2 M, V]
        U = np.einsum("bihm,bihv->bhmv", left, vc)
        # 4 inter-chunk: what earlier chunks left, [C, 2 M] @ [2 M, V] -> [C, V]
        num = np.einsum("bijh,bjhv->bihv", A, vc) + np.einsum("bihm,bhmv->bihv", past, S)
        den = (np.sum(A, axis=2) + np.einsum("bihm,bhm->bih", past, z))[..., None]
        keep = np.exp(G[:, -1])[..., None]
        S, z = keep[..., None] * S + U, keep * z + np.sum(left, axis=1)
        # 5 output
        o[:, part] = num / (np.maximum(den, floor) if floor else np.where(np.abs(den) > 1e-30, den, np.inf))
    return o, (S, z)


def step(q, k, v, *, omega, g, state, floor=0.0):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        omega: frequencies, [M, K] or [H, M, K].
        g: log of the gate, [B, H], nats, <= 0.
        state: S_{t-1}, [B, H, 2 M, V], and z_{t-1}, [B, H, 2 M].
        floor: as `recurrent`.

    Returns:
        o, [B, H, V], and S_t, z_t as a tuple.

    Cost: B H (10 M V + 12 M + V + 4) FLOPs and those of the features.
    Source: Peng et al. 2021, arXiv:2103.02143.
    """
    phi_q, phi_k = features(q, omega), features(k, omega) * -np.expm1(g)[..., None]  # [B, H, 2 M]
    keep = np.exp(g)[..., None]
    S = keep[..., None] * state[0] + np.einsum("bhm,bhv->bhmv", phi_k, v)
    z = keep * state[1] + phi_k
    num = np.einsum("bhm,bhmv->bhv", phi_q, S)
    den = np.einsum("bhm,bhm->bh", phi_q, z)[..., None]
    return num / (np.maximum(den, floor) if floor else np.where(np.abs(den) > 1e-30, den, np.inf)), (S, z)


def cost(*, form, B, T, H, K, V, M, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; decay tables are
    data, and so is the half of them that a mask throws away. Bytes: q, k, v and omega read once, o written
    once, g read and S_T and z_T written once in float32; nothing is spilled, since features, the state, or a
    tile of scores, stay on chip in every form.

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
    # unit length 3 K + 2, products 2 M K, sine and cosine 2 M, share 2 M; share written F + 2
    flops = T * (2 * (2 * M * K + 4 * M + 3 * K + 2) + F + 2)
    if form == "recurrent":
        # decay 1, write 2, read 2; z 2, den 2; gate 1, quotient
        flops += T * (5 * F * V + 4 * F + V + 2)
    else:
        size = {"parallel": T, "chunkwise": chunk_size}[form]
        for n in (min(size, T - start) for start in range(0, T, size)):
            # scores, values, decays 2, their product, row sums
            flops += n * n * (2 * F + 2 * V + 4)
            # read and write; two passes over V; two decays, den 2, sum of z; decay and sum of S and z
            flops += n * (4 * F * V + 2 * V + 5 * F + 6) + 2 * F * V + 2 * F + 1
    return {
        "flops": B * H * flops,
        "bytes": itemsize * (B * T * H * (2 * K + 2 * V) + H * M * K) + 4 * B * T * H + state_bytes,
        "state_bytes": state_bytes,
    }
