r"""Fast weight programmers: keys become sparse, non-negative features, then write by the delta rule.

The feature map DPFP multiplies a key's positive and negative parts with shifted copies of themselves. A key
of K numbers gets 2 K nu features, of which few are not 0, so that more keys are nearly orthogonal than K axes
allow. Features are divided by their sum; where no product is left all are 0, and the key writes nothing.
"""

import numpy as np


def features(x, *, nu=3):
    r"""Deterministic parameter-free projection (DPFP-nu), divided by its sum.

    .. math:: r = [\mathrm{ReLU}(x);\, \mathrm{ReLU}(-x)], \qquad
        \phi(x)_{2K(j-1) + i} \propto r_i\, r_{(i+j) \bmod 2K}, \qquad j = 1 \ldots \nu

    Args:
        x: keys or queries, [..., K].
        nu: shifts, 1 to 2 K - 1.

    Returns:
        non-negative features of sum 1, or all 0, [..., 2 K nu].

    Cost: 3 K + 6 K nu FLOPs a vector.
    Source: Schlag et al. 2021, arXiv:2102.11174. Differs: where no product is left the paper divides 0 by 0.
    """
    r = np.concatenate((np.maximum(x, 0), np.maximum(-x, 0)), axis=-1)  # [..., 2 K]
    phi = np.concatenate([r * np.roll(r, -j, axis=-1) for j in range(1, nu + 1)], axis=-1)
    total = phi.sum(-1, keepdims=True)
    return phi / np.where(total > 0, total, 1)


def recurrent(q, k, v, *, beta, nu=3, scale=None, initial_state=None):
    r"""The delta rule on features, token by token: read the key's old value, write the difference, read.

    .. math:: \delta_t = \beta_t\,\bigl(v_t - S_{t-1}^\top \phi(k_t)\bigr), \qquad
        S_t = S_{t-1} + \phi(k_t)\, \delta_t^\top, \qquad o_t = s\, S_t^\top \phi(q_t)

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        beta: write strength, [B, T, H], in [0, 1].
        nu: shifts of the feature map.
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, M, V] with M = 2 K nu features; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, M, V].

    Cost: B T H (6 M V + 3 V + 6 K + 6 M) FLOPs: the delta rule on M rows, and two feature maps.
    Source: Schlag et al. 2021, arXiv:2102.11174. Differs: the paper's state is the transpose; s is the one of
    its released code.
    """
    B, T, H, K = q.shape
    M, V = 2 * K * nu, v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    q, k = features(q, nu=nu), features(k, nu=nu)  # [B, T, H, M]
    S = np.zeros((B, H, M, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_{t-1}^T phi(k_t): what the memory holds for this key
        old = np.einsum("bhm,bhmv->bhv", k[:, t], S)
        # S_t = S_{t-1} + phi(k_t) (beta_t (v_t - old))^T
        S = S + np.einsum("bhm,bhv->bhmv", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
        # o_t = s S_t^T phi(q_t)
        o[:, t] = scale * np.einsum("bhm,bhmv->bhv", q[:, t], S)
    return o, S


def chunkwise(q, k, v, *, beta, nu=3, scale=None, initial_state=None, chunk_size=16):
    r"""The same a chunk at a time: the delta rule does not ask where its keys come from.

    .. math:: (I + A)\,\Delta = \operatorname{Diag}(\beta)\,(V - \Phi_K S), \qquad
        O = s\,\bigl(\Phi_Q S + (\Phi_Q \Phi_K^\top \odot [i \ge j])\,\Delta\bigr), \qquad
        S \leftarrow S + \Phi_K^\top \Delta

    for a chunk of n tokens, with :math:`A_{ij} = \beta_i\, \phi(k_i)^\top \phi(k_j)\,[i > j]`; the last chunk
    may be short.

    Args and returns: as `recurrent`, and chunk_size, C, tokens in a chunk.

    Cost: B H (T C (4 M + 2 V + 2) + T (6 M V + 6 K + 6 M + 4 V) + NC M V) FLOPs and T (2 C^2 / 3 + 2 C V) of
    the solve, where C divides T.
    Source: Schlag et al. 2021, arXiv:2102.11174, in the chunks of Yang et al. 2024, arXiv:2406.06484.
    """
    B, T, H, K = q.shape
    M, V = 2 * K * nu, v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    q, k = features(q, nu=nu), features(k, nu=nu)  # [B, T, H, M]
    S = np.zeros((B, H, M, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc = q[:, part], k[:, part]  # [B, C, H, M]
        b = beta[:, part].swapaxes(1, 2)[..., None]  # [B, H, C, 1]
        i = np.arange(qc.shape[1])
        # 1 what is written: each token's difference knows those before it
        A = np.where(i[:, None] > i, b * np.einsum("bihm,bjhm->bhij", kc, kc), 0)  # [B, H, C, C]
        unread = v[:, part].swapaxes(1, 2) - np.einsum("bihm,bhmv->bhiv", kc, S)  # [B, H, C, V]
        delta = np.linalg.solve(np.eye(len(i)) + A, b * unread)
        # 2 output: what earlier chunks left, and what this chunk wrote up to i
        scores = np.where(i[:, None] >= i, np.einsum("bihm,bjhm->bhij", qc, kc), 0)
        past = np.einsum("bihm,bhmv->bihv", qc, S)
        o[:, part] = scale * (past + np.einsum("bhij,bhjv->bihv", scores, delta))
        # 3 state: [M, C] @ [C, V] -> [M, V]
        S = S + np.einsum("bihm,bhiv->bhmv", kc, delta)
    return o, S


def step(q, k, v, *, beta, state, nu=3, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        beta: write strength, [B, H].
        state: S_{t-1}, [B, H, M, V] with M = 2 K nu.
        nu: shifts of the feature map.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, H, V], and S_t, [B, H, M, V].

    Cost: B H (6 M V + 3 V + 6 K + 6 M) FLOPs.
    Source: Schlag et al. 2021, arXiv:2102.11174.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = features(q, nu=nu), features(k, nu=nu)
    old = np.einsum("bhm,bhmv->bhv", k, state)
    S = state + np.einsum("bhm,bhv->bhmv", k, beta[:, :, None] * (v - old))
    return scale * np.einsum("bhm,bhmv->bhv", q, S), S


def cost(*, form, B, T, H, K, V, nu=3, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; masks and shifts
    cost nothing. Bytes: q, k, v, beta read once, o written once, S_T written once in float32; features are
    made on chip, and nothing is spilled.

    Args:
        form: "recurrent" or "chunkwise".
        B, T, H, K, V: sizes.
        nu: shifts of the feature map.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, beta, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    M = 2 * K * nu
    state_bytes = 4 * B * H * M * V
    maps = T * (6 * K + 6 * M)
    if form == "recurrent":
        flops = T * (6 * M * V + 3 * V)
    else:
        chunks = [min(chunk_size, T - start) for start in range(0, T, chunk_size)]
        # k k and q k 2 n^2 M, scores delta 2 n^2 V, strength and I; three with the state; the solve
        flops = sum(
            n * n * (4 * M + 2 * V + 2) + n * (6 * M * V + 4 * V) + M * V + 2 * n**3 // 3 + 2 * n * n * V
            for n in chunks
        )
    return {
        "flops": B * H * (flops + maps),
        "bytes": itemsize * B * T * H * (2 * K + 2 * V + 1) + state_bytes,
        "state_bytes": state_bytes,
    }
