r"""cosFormer: nonnegative scores, reweighted by the cosine of a distance so that near tokens count for more.

The cosine of a difference is a sum of two products, so it costs twice the features and no pairs of tokens.
The state turns as it ages: it holds positions as seen from its last token, and needs no count of the tokens
before it. Three forms compute the same output and the same final state.
"""

import numpy as np


def features(x, angle):
    r"""The two halves of a score's cosine; products of features are relu(q) . relu(k) cos(a - b).

    .. math:: \phi_a(x) = [x' \cos a;\; x' \sin a], \qquad x' = \max(x, 0)

    Args:
        x: queries or keys, [B, T, H, K].
        angle: a of every token, [T], radians.

    Returns:
        [B, T, H, 2 K].

    Cost: 3 K FLOPs a vector.
    Source: Qin et al. 2022, arXiv:2202.08791.
    """
    x, angle = np.maximum(x, 0), angle[:, None, None]
    return np.concatenate((x * np.cos(angle), x * np.sin(angle)), axis=-1)


def turn(x, angle):
    r"""A state seen from a later token: every position in it falls by the same angle.

    .. math:: [C;\; D] \mapsto [C \cos a + D \sin a;\; D \cos a - C \sin a]

    Args:
        x: S, [B, H, 2 K, V], or z, [B, H, 2 K].
        angle: a, radians.

    Returns:
        The same shape.

    Cost: 3 FLOPs an entry.
    """
    C, D = np.split(x, 2, axis=2)
    return np.concatenate(
        (C * np.cos(angle) + D * np.sin(angle), D * np.cos(angle) - C * np.sin(angle)), axis=2
    )


def recurrent(q, k, v, *, max_length, offset=0, initial_state=None):
    r"""cosFormer token by token: turn both sums by one position, add the token at angle 0, read.

    .. math:: S_t = R(\theta)\, S_{t-1} + \begin{bmatrix} k'_t \\ 0 \end{bmatrix} v_t^\top, \quad
        z_t = R(\theta)\, z_{t-1} + \begin{bmatrix} k'_t \\ 0 \end{bmatrix}, \quad
        o_t = \frac{[q'_t;\, 0]^\top S_t}{[q'_t;\, 0] \cdot z_t}, \quad \theta = \frac{\pi}{2 M}

    with R the `turn` and x' = max(x, 0): :math:`o_t` averages :math:`v_j` with weights
    :math:`q'_t \cdot k'_j \cos \theta (t - j)`. Where their sum vanishes (at most 1e-30 in size), o is 0.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        max_length: the paper's M, tokens that a text may have; so far away a weight is 0, beyond it negative.
        offset: tokens before initial_state; they count against max_length alone.
        initial_state: S_0, [B, H, 2 K, V], z_0, [B, H, 2 K], as seen from their last token; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, z_T as a tuple.

    Raises:
        ValueError: the text is longer than max_length.

    Cost: B T H (10 K V + 11 K + V + 1) FLOPs: turn 6, write 2 and read 2 a pair of entries of S.
    Source: Qin et al. 2022, arXiv:2202.08791. Differs: positions count from the last token, not from the
    first; the released code bounds the denominator by 1e-6 from below.
    """
    B, T, H, K = q.shape
    if offset + T > max_length:
        raise ValueError(f"the text has {offset + T} tokens, expected at most max_length = {max_length}")
    theta = np.pi / (2 * max_length)
    q, k = np.maximum(q, 0), np.maximum(k, 0)
    zeros = np.zeros((B, H, 2 * K, v.shape[-1])), np.zeros((B, H, 2 * K))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # every token before is one position further away
        S, z = turn(S, theta), turn(z, theta)
        # the token itself: cosine 1, sine 0
        S[:, :, :K] += np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        z[:, :, :K] += k[:, t]
        num = np.einsum("bhk,bhkv->bhv", q[:, t], S[:, :, :K])
        den = np.einsum("bhk,bhk->bh", q[:, t], z[:, :, :K])[..., None]
        o[:, t] = num / np.where(np.abs(den) > 1e-30, den, np.inf)
    return o, (S, z)


def parallel(q, k, v, *, max_length, offset=0, initial_state=None):
    r"""cosFormer for all tokens at once: nonnegative scores times the cosine of a distance.

    .. math:: A_{tj} = q'_t \cdot k'_j \cos \theta(t - j)\,[t \ge j], \qquad
        O = \frac{A V + \phi(Q)\, S_0}{A \mathbf 1 + \phi(Q)\, z_0}

    with the queries' features at angles theta, 2 theta, ..., T theta: S_0 is seen from the token before them.

    Args, returns and raises: as `recurrent`.

    Cost: B H (T^2 (2 K + 2 V + 2) + T (8 K V + 2 V + 14 K + 2) + 8 K V + 8 K) FLOPs, quadratic in T.
    Source: Qin et al. 2022, arXiv:2202.08791.
    """
    B, T, H, K = q.shape
    if offset + T > max_length:
        raise ValueError(f"the text has {offset + T} tokens, expected at most max_length = {max_length}")
    theta = np.pi / (2 * max_length)
    zeros = np.zeros((B, H, 2 * K, v.shape[-1])), np.zeros((B, H, 2 * K))
    S, z = zeros if initial_state is None else initial_state
    t = np.arange(T)
    D = np.tri(T) * np.cos(theta * (t[:, None] - t))
    # [T, K] @ [K, T] -> [T, T]
    A = D * np.einsum("bthk,bjhk->bhtj", np.maximum(q, 0), np.maximum(k, 0))
    # positions as seen from the token before the first, and from the last
    past, left = features(q, theta * (t + 1)), features(k, theta * (t + 1 - T))  # [B, T, H, 2 K]
    num = np.einsum("bhtj,bjhv->bthv", A, v) + np.einsum("bthm,bhmv->bthv", past, S)
    den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bthm,bhm->bth", past, z))[..., None]
    o = num / np.where(np.abs(den) > 1e-30, den, np.inf)
    # S_T = R(T theta) S_0 + sum_t phi(k_t) v_t^T
    S = turn(S, T * theta) + np.einsum("bthm,bthv->bhmv", left, v)
    return o, (S, turn(z, T * theta) + np.sum(left, axis=1))


def chunkwise(q, k, v, *, max_length, offset=0, initial_state=None, chunk_size=16):
    r"""cosFormer a chunk at a time: features inside a chunk, a turn of the state from chunk to chunk.

    .. math:: O = \frac{A V + \phi(Q)\, S}{A \mathbf 1 + \phi(Q)\, z}, \qquad
        S \leftarrow R(n \theta)\,\bigl(S + \phi(K)^\top V\bigr), \qquad
        z \leftarrow R(n \theta)\,\bigl(z + \phi(K)^\top \mathbf 1\bigr)

    for a chunk of n tokens at angles theta, 2 theta, ..., n theta, with :math:`A = \phi(Q)\, \phi(K)^\top`
    masked; the last chunk may be short.

    Args, returns and raises: as `recurrent`, and chunk_size: C, tokens in a chunk.

    Cost: B H (T C (4 K + 2 V + 1) + T (8 K V + 2 V + 12 K + 2) + 8 NC (K V + K)) FLOPs where C divides T,
    linear in T.
    Source: the sums of Qin et al. 2022, arXiv:2202.08791, cut into chunks.
    """
    B, T, H, K = q.shape
    if offset + T > max_length:
        raise ValueError(f"the text has {offset + T} tokens, expected at most max_length = {max_length}")
    theta = np.pi / (2 * max_length)
    zeros = np.zeros((B, H, 2 * K, v.shape[-1])), np.zeros((B, H, 2 * K))
    S, z = zeros if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        vc = v[:, part]
        n = vc.shape[1]
        # 1 local positions, as seen from the token before the chunk
        angle = theta * np.arange(1, n + 1)
        qc, kc = features(q[:, part], angle), features(k[:, part], angle)  # [B, C, H, 2 K]
        # 2 intra-chunk: masked scores, [C, 2 K] @ [2 K, C] -> [C, C]; cos(a - b) = cos a cos b + sin a sin b
        A = np.where(np.tri(n, dtype=bool), np.einsum("bihm,bjhm->bhij", qc, kc), 0)
        # 3 chunk state: what this chunk writes, [2 K, C] @ [C, V] -> [2 K, V]
        U = np.einsum("bihm,bihv->bhmv", kc, vc)
        # 4 inter-chunk: what earlier chunks left, [C, 2 K] @ [2 K, V] -> [C, V]
        num = np.einsum("bhij,bjhv->bihv", A, vc) + np.einsum("bihm,bhmv->bihv", qc, S)
        den = (np.sum(A, axis=-1).swapaxes(1, 2) + np.einsum("bihm,bhm->bih", qc, z))[..., None]
        # the next chunk sees them from this one's last token
        S, z = turn(S + U, n * theta), turn(z + np.sum(kc, axis=1), n * theta)
        # 5 output
        o[:, part] = num / np.where(np.abs(den) > 1e-30, den, np.inf)
    return o, (S, z)


def step(q, k, v, *, max_length, state, offset=0):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        max_length: as `recurrent`.
        state: S_{t-1}, [B, H, 2 K, V], and z_{t-1}, [B, H, 2 K].
        offset: tokens before this one.

    Returns:
        o, [B, H, V], and S_t, z_t as a tuple.

    Raises:
        ValueError: the text is longer than max_length.

    Cost: B H (10 K V + 11 K + V + 1) FLOPs.
    Source: Qin et al. 2022, arXiv:2202.08791.
    """
    o, state = recurrent(
        q[:, None], k[:, None], v[:, None], max_length=max_length, offset=offset, initial_state=state
    )
    return o[:, 0], state


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; cosines of positions
    cost nothing. Bytes: q, k, v read once, o written once, S_T and z_T written once in float32; nothing is
    spilled, since features, the state, or a tile of scores, stay on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    F = 2 * K
    state_bytes = 4 * B * H * F * (V + 1)
    if form == "recurrent":
        # turn 3 F, write 2 K, read 2 K; z likewise, its outer product excepted; relu 2 K; quotient
        flops = T * (3 * F * (V + 1) + K * (4 * V + 3) + 2 * K + V + 1)
    elif form == "parallel":
        # scores, cosine, values, row sums; read and write, two passes over V; relu 2 K, features 6 K, den, z
        flops = T * T * (2 * K + 2 * V + 2) + T * (4 * F * V + 2 * V + 8 * K + 3 * F + 2) + 4 * F * (V + 1)
    else:
        flops = T * (4 * F * V + 2 * V + 6 * K + 3 * F + 2)
        for n in (min(chunk_size, T - start) for start in range(0, T, chunk_size)):
            # scores, values, row sums; sum and turn of S and z
            flops += n * n * (2 * F + 2 * V + 1) + 4 * F * (V + 1)
    return {
        "flops": B * H * flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V) + state_bytes,
        "state_bytes": state_bytes,
    }
