r"""Performer (FAVOR+): random positive features whose products average to the exponential of a score.

The average over Gaussian frequencies is exact, :math:`E[\phi(q) \cdot \phi(k)] = e^{q \cdot k / \sqrt K}`, so
softmax attention is what infinitely many features would compute. Every feature is positive, so that no
denominator crosses 0. Three forms compute the same output and the same final state.
"""

import numpy as np


def draw_omega(rng, M, K):
    r"""M Gaussian frequencies, orthogonal in blocks of K: each row alone is normal, together they spread.

    Directions are the rows of random orthogonal matrices; lengths are those of fresh Gaussian vectors.

    Args:
        rng: a `numpy.random.Generator`.
        M: features.
        K: key dimension.

    Returns:
        omega, [M, K].

    Source: Choromanski et al. 2021, arXiv:2009.14794.
    """
    blocks = []
    for _ in range(-(-M // K)):
        Q, R = np.linalg.qr(rng.normal(size=(K, K)))
        # signs of R's diagonal make Q uniform over all rotations and reflections
        blocks.append((Q * np.sign(np.diag(R))).T)
    lengths = np.linalg.norm(rng.normal(size=(M, K)), axis=-1, keepdims=True)
    return lengths * np.concatenate(blocks)[:M]


def features(x, omega):
    r"""Positive random features; their products average to :math:`e^{x \cdot y / \sqrt K}` over omega.

    .. math:: \phi(x)_m = \frac{1}{\sqrt M}
        \exp\Bigl(\omega_m \cdot \bar x - \tfrac12 \lVert \bar x \rVert^2\Bigr), \qquad \bar x = x / K^{1/4}

    Args:
        x: queries or keys, [..., H, K].
        omega: frequencies, [M, K] or, different in every head, [H, M, K].

    Returns:
        [..., H, M].

    Cost: 2 M K + 3 M + 3 K + 1 FLOPs a vector.
    Source: Choromanski et al. 2021, arXiv:2009.14794, lemma 1.
    """
    H, K = x.shape[-2:]
    M = omega.shape[-2]
    x = x / K**0.25
    omega = np.broadcast_to(omega, (H, M, K))
    score = np.einsum("...hk,hmk->...hm", x, omega)
    return np.exp(score - 0.5 * np.sum(x * x, axis=-1, keepdims=True)) / np.sqrt(M)


def recurrent(q, k, v, *, omega, initial_state=None):
    r"""FAVOR+ token by token: add the features of the token to two sums, read their quotient.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    Features are taken as they are: float64 holds them down to e^-745. The op subtracts a query's largest
    exponent, which cancels in the quotient. Where the denominator is 0 all the same, o is 0.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        omega: frequencies, [M, K] or, different in every head, [H, M, K].
        initial_state: S_0, [B, H, M, V], and z_0, [B, H, M]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, z_T as a tuple.

    Cost: B T H (4 M V + 3 M + V) FLOPs and those of the features.
    Source: Choromanski et al. 2021, arXiv:2009.14794. Differs: the released code adds a small number to every
    feature.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, omega), features(k, omega)  # [B, T, H, M]
    zeros = np.zeros((B, H, M, V)), np.zeros((B, H, M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t)
        S, z = S + np.einsum("bhm,bhv->bhmv", phi_k[:, t], v[:, t]), z + phi_k[:, t]
        # o_t: the token just written is read too
        num = np.einsum("bhm,bhmv->bhv", phi_q[:, t], S)
        den = np.einsum("bhm,bhm->bh", phi_q[:, t], z)[..., None]
        o[:, t] = num / np.where(den > 0, den, np.inf)
    return o, (S, z)


def parallel(q, k, v, *, omega, initial_state=None):
    r"""FAVOR+ for all tokens at once: masked products of features, and their sums along a row.

    .. math:: A_{tj} = \phi(q_t) \cdot \phi(k_j)\,[t \ge j], \qquad
        O = \frac{A V + \phi(Q)\, S_0}{A \mathbf 1 + \phi(Q)\, z_0}

    Args and returns: as `recurrent`.

    Cost: B H (T^2 (2 M + 2 V + 1) + T (4 M V + 2 V + 3 M + 1) + M V + M) FLOPs and those of the
    features, quadratic in T.
    Source: Choromanski et al. 2021, arXiv:2009.14794.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, omega), features(k, omega)  # [B, T, H, M]
    zeros = np.zeros((B, H, M, V)), np.zeros((B, H, M))
    S, z = zeros if initial_state is None else initial_state
    seen = np.tri(T, dtype=bool)
    A = np.where(seen, np.einsum("bthm,bjhm->bhtj", phi_q, phi_k), 0)  # [T, M] @ [M, T] -> [T, T]
    # [T, T] @ [T, V] + [T, M] @ [M, V] -> [T, V]
    num = np.einsum("bhtj,bjhv->bthv", A, v) + np.einsum("bthm,bhmv->bthv", phi_q, S)
    den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bthm,bhm->bth", phi_q, z))[..., None]
    o = num / np.where(den > 0, den, np.inf)
    # S_T = S_0 + sum_t phi(k_t) v_t^T
    return o, (S + np.einsum("bthm,bthv->bhmv", phi_k, v), z + np.sum(phi_k, axis=1))


def chunkwise(q, k, v, *, omega, initial_state=None, chunk_size=16):
    r"""FAVOR+ a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    .. math:: O = \frac{A V + \phi(Q)\, S}{A \mathbf 1 + \phi(Q)\, z}, \qquad
        S \leftarrow S + \phi(K)^\top V, \qquad z \leftarrow z + \phi(K)^\top \mathbf 1

    for a chunk of n tokens, with A its masked scores; the last chunk may be short.

    Args and returns: as `recurrent`, and chunk_size: C, tokens in a chunk.

    Cost: B H (T C (2 M + 2 V + 1) + T (4 M V + 2 V + 3 M + 1) + NC (M V + M)) FLOPs and those of
    the features where C divides T, linear in T.
    Source: the sums of Choromanski et al. 2021, arXiv:2009.14794, cut into chunks.
    """
    B, T, H, _ = q.shape
    M, V = omega.shape[-2], v.shape[-1]
    phi_q, phi_k = features(q, omega), features(k, omega)  # [B, T, H, M]
    zeros = np.zeros((B, H, M, V)), np.zeros((B, H, M))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = phi_q[:, part], phi_k[:, part], v[:, part]  # [B, C, H, M or V]
        # 1 no decay: a token sees those before it and itself
        seen = np.tri(qc.shape[1], dtype=bool)
        # 2 intra-chunk: masked scores, [C, M] @ [M, C] -> [C, C]
        A = np.where(seen, np.einsum("bihm,bjhm->bhij", qc, kc), 0)
        # 3 chunk state: what this chunk writes, [M, C] @ [C, V] -> [M, V]
        U = np.einsum("bihm,bihv->bhmv", kc, vc)
        # 4 inter-chunk: what earlier chunks left, [C, M] @ [M, V] -> [C, V]
        num = np.einsum("bhij,bjhv->bihv", A, vc) + np.einsum("bihm,bhmv->bihv", qc, S)
        den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bihm,bhm->bih", qc, z))[..., None]
        S, z = S + U, z + np.sum(kc, axis=1)
        # 5 output
        o[:, part] = num / np.where(den > 0, den, np.inf)
    return o, (S, z)


def step(q, k, v, *, omega, state):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        omega: frequencies, [M, K] or [H, M, K].
        state: S_{t-1}, [B, H, M, V], and z_{t-1}, [B, H, M].

    Returns:
        o, [B, H, V], and S_t, z_t as a tuple.

    Cost: B H (4 M V + 3 M + V) FLOPs and those of the features.
    Source: Choromanski et al. 2021, arXiv:2009.14794.
    """
    phi_q, phi_k = features(q, omega), features(k, omega)  # [B, H, M]
    S, z = state[0] + np.einsum("bhm,bhv->bhmv", phi_k, v), state[1] + phi_k
    num = np.einsum("bhm,bhmv->bhv", phi_q, S)
    den = np.einsum("bhm,bhm->bh", phi_q, z)[..., None]
    return num / np.where(den > 0, den, np.inf), (S, z)


def cost(*, form, B, T, H, K, V, M, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v and
    omega read once, o written once, S_T and z_T written once in float32; nothing is spilled, since
    features, the state, or a tile of scores, stay on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        M: features.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, o and omega.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    F = M
    state_bytes = 4 * B * H * F * (V + 1)
    # scale K, products 2 M K, length 2 K + 1, difference, exp and share 3 M
    flops = 2 * T * (2 * M * K + 3 * M + 3 * K + 1)
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
        "bytes": itemsize * (B * T * H * (2 * K + 2 * V) + M * K) + state_bytes,
        "state_bytes": state_bytes,
    }
