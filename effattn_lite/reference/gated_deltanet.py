r"""Gated DeltaNet: every head first forgets a share of its state, then corrects what the key reads.

The gate :math:`\alpha_t = e^{g_t}` clears the memory as a whole, the delta rule changes one key's value. The
decay comes first: the key reads the state that has faded already, so with :math:`\beta = 1` and a key of
length 1 the new value is read back exactly, whatever the gate. Value heads share query and key heads. Three
forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, g, beta, scale=None, initial_state=None):
    r"""The gated delta rule token by token: decay, read the key's old value, write the difference, read.

    .. math:: \delta_t = \beta_t\,(v_t - \alpha_t S_{t-1}^\top k_t), \qquad
        S_t = \alpha_t S_{t-1} + k_t \delta_t^\top
        = \alpha_t (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top, \qquad
        o_t = s\, S_t^\top q_t, \qquad \alpha_t = e^{g_t}

    Args:
        q: queries, [B, T, H, K]; value head h reads query head h // (HV / H).
        k: keys, [B, T, H, K], shared as the queries; expected of length 1 over K (not normalised here).
        v: values, [B, T, HV, V], HV a multiple of H.
        g: log decay, [B, T, HV], nats a token, <= 0; 0 keeps everything.
        beta: write strength, [B, T, HV], in [0, 1], or in [0, 2] where reflections are wanted.
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, HV, K, V]; default zeros.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: B T HV (7 K V + 3 V + 1) FLOPs: decay 1, read the key 2, outer product 1, add 1, read the query 2 an
    entry of the state; difference, strength and scale V each; one exponential.
    Source: Yang et al. 2024, arXiv:2412.06464. Differs: the paper's state is the transpose,
    [V, K]; s and the shared heads are fla's. The survey, arXiv:2507.19595, section 2.3, prints
    alpha S + beta (v - S k) k^T: there the key reads the state before the decay. That is another recurrence;
    the two steps differ by beta (1 - alpha) k k^T S, in our layout.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q, k = np.repeat(q, HV // H, axis=2), np.repeat(k, HV // H, axis=2)  # [B, T, HV, K]
    S = np.zeros((B, HV, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # alpha_t S_{t-1}, and what it holds for this key
        S = np.exp(g[:, t, :, None, None]) * S
        old = np.einsum("bhk,bhkv->bhv", k[:, t], S)
        # S_t = alpha_t S_{t-1} + k_t (beta_t (v_t - old))^T
        S = S + np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def parallel(q, k, v, *, g, beta, scale=None, initial_state=None):
    r"""The gated delta rule for all tokens at once: one triangular system gives every difference written.

    .. math:: (I + A)\,\Delta = \operatorname{Diag}(\beta)\,(V - \xi \odot K S_0), \qquad
        A_{tj} = \beta_t\, D_{tj}\, k_t^\top k_j\,[t > j], \qquad
        O = s\,\bigl(\xi \odot Q S_0 + (Q K^\top \odot D)\, \Delta\bigr)

    with :math:`G_t = \sum_{i \le t} g_i`, :math:`D_{tj} = e^{G_t - G_j}\,[t \ge j]` and
    :math:`\xi_t = e^{G_t}`. No exponent is above 0, so no gate is too strong.

    Args:
        q: queries, [B, T, H, K]; value head h reads query head h // (HV / H).
        k: keys, [B, T, H, K], shared as the queries; expected of length 1 over K (not normalised here).
        v: values, [B, T, HV, V], HV a multiple of H.
        g: log decay, [B, T, HV], nats a token, <= 0.
        beta: write strength, [B, T, HV], in [0, 1], or in [0, 2].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, HV, K, V]; default zeros.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: B HV (2 T^3 / 3 + T^2 (4 K + 4 V + 6) + T (6 K V + 7 V + 2) + 2 K V) FLOPs, cubic in T, since
    `np.linalg.solve` factors a matrix that is triangular already; substitution alone would be quadratic.
    Source: the recurrence of Yang et al. 2024, arXiv:2412.06464, as one system.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q, k = np.repeat(q, HV // H, axis=2), np.repeat(k, HV // H, axis=2)  # [B, T, HV, K]
    S = np.zeros((B, HV, K, V)) if initial_state is None else initial_state
    b = beta.swapaxes(1, 2)[..., None]  # [B, HV, T, 1]
    G = np.cumsum(g, axis=1).swapaxes(1, 2)[..., None]  # [B, HV, T, 1]
    t = np.arange(T)
    # exp of a difference <= 0: cannot overflow; exp(-inf) = 0 above the diagonal
    # [B, HV, T, T]
    D = np.exp(np.where(t[:, None] >= t, G - G.swapaxes(2, 3), -np.inf))
    xi = np.exp(G)  # [B, HV, T, 1]
    # delta_t + sum_{j<t} beta_t D_tj (k_t . k_j) delta_j = beta_t (v_t - xi_t S_0^T k_t)
    # [B, HV, T, T]
    A = np.where(t[:, None] > t, b * D * np.einsum("bthk,bjhk->bhtj", k, k), 0)
    unread = v.swapaxes(1, 2) - xi * np.einsum("bthk,bhkv->bhtv", k, S)  # [B, HV, T, V]
    delta = np.linalg.solve(np.eye(T) + A, b * unread)  # [B, HV, T, V]
    # o_t = s (xi_t S_0^T q_t + sum_{j<=t} D_tj (q_t . k_j) delta_j)
    scores = D * np.einsum("bthk,bjhk->bhtj", q, k)
    past = xi * np.einsum("bthk,bhkv->bhtv", q, S)  # [T, K] @ [K, V] -> [T, V]
    o = scale * (past + np.einsum("bhtj,bhjv->bhtv", scores, delta)).swapaxes(1, 2)
    # S_T = xi_T S_0 + sum_j D_Tj k_j delta_j^T
    S = xi[:, :, -1:] * S + np.einsum("bthk,bhtv->bhkv", k, D[:, :, -1, :, None] * delta)
    return o, S


def chunkwise(q, k, v, *, g, beta, scale=None, initial_state=None, chunk_size=16):
    r"""The gated delta rule a chunk at a time: a small triangular inverse inside, the state between chunks.

    .. math:: M = (I + A)^{-1} \operatorname{Diag}(\beta), \quad W = M \operatorname{Diag}(\xi) K, \quad
        U = M V, \quad \Delta = U - W S, \qquad
        O = s\,\bigl(\xi \odot Q S + (Q K^\top \odot D)\,\Delta\bigr), \qquad
        S \leftarrow \xi_{n-1} S + K^\top \operatorname{Diag}(\zeta)\, \Delta

    for a chunk of n tokens i = 0..n-1, with :math:`G_i = \sum_{r \le i} g_r` from the chunk's start,
    :math:`D_{ij} = e^{G_i - G_j}\,[i \ge j]`, :math:`\xi_i = e^{G_i}`, :math:`\zeta_j = D_{n-1,j}` and
    :math:`A_{ij} = \beta_i D_{ij}\, k_i^\top k_j\,[i > j]`; the last chunk may be short.

    Args:
        q: queries, [B, T, H, K]; value head h reads query head h // (HV / H).
        k: keys, [B, T, H, K], shared as the queries; expected of length 1 over K (not normalised here).
        v: values, [B, T, HV, V], HV a multiple of H.
        g: log decay, [B, T, HV], nats a token, <= 0.
        beta: write strength, [B, T, HV], in [0, 1], or in [0, 2].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, HV, K, V]; default zeros.
        chunk_size: C, tokens in a chunk.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: B HV (T C (6 K + 4 V + 6) + T C^2 + T (6 K V + 5 V + 1) + 2 NC K V) FLOPs where C divides T.
    Source: Yang et al. 2024, arXiv:2412.06464. Differs: the paper writes quotients of decays,
    gamma_i / gamma_j, which are 0 / 0 where a gate is strong; here logarithms are subtracted first.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q, k = np.repeat(q, HV // H, axis=2), np.repeat(k, HV // H, axis=2)  # [B, T, HV, K]
    S = np.zeros((B, HV, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = q[:, part], k[:, part], v[:, part]  # [B, C, HV, K or V]
        b = beta[:, part].swapaxes(1, 2)[..., None]  # [B, HV, C, 1]
        i = np.arange(qc.shape[1])
        # 1 local decay: between two tokens (exp of a difference <= 0), and from the chunk's start
        G = np.cumsum(g[:, part], axis=1).swapaxes(1, 2)[..., None]  # [B, HV, C, 1]
        # [B, HV, C, C]
        D = np.exp(np.where(i[:, None] >= i, G - G.swapaxes(2, 3), -np.inf))
        xi = np.exp(G)  # [B, HV, C, 1]
        # 2 token i sees alpha_i S_{i-1} = xi_i S + sum_{j<i} D_ij k_j delta_j^T, put into delta_i:
        #   delta_i = beta_i (v_i - xi_i S^T k_i) - sum_{j<i} A_ij delta_j, so Delta = M (V - xi K S)
        # [B, HV, C, C]
        A = np.where(i[:, None] > i, b * D * np.einsum("bihk,bjhk->bhij", kc, kc), 0)
        # 3 M = (I + A)^-1 Diag(beta) by forward substitution: a row asks for the rows above it
        M = np.where(i[:, None] == i, b, 0)  # [B, HV, C, C]
        for r in i[1:]:
            M[:, :, r] -= np.einsum("bhj,bhjm->bhm", A[:, :, r, :r], M[:, :, :r])
        # 4 what would be written on an empty state, and how the state is read: [C, C] @ [C, V or K]
        U = np.einsum("bhij,bjhv->bhiv", M, vc)
        W = np.einsum("bhij,bjhk->bhik", M * xi.swapaxes(2, 3), kc)
        # 5 what is written: Delta = U - W S, [C, K] @ [K, V] -> [C, V]
        delta = U - np.einsum("bhik,bhkv->bhiv", W, S)
        # 6 output: what earlier chunks left, and what this chunk wrote up to i
        scores = D * np.einsum("bihk,bjhk->bhij", qc, kc)
        past = xi * np.einsum("bihk,bhkv->bhiv", qc, S)
        o[:, part] = scale * (past + np.einsum("bhij,bhjv->bhiv", scores, delta)).swapaxes(1, 2)
        # 7 state: zeta is the last row of D, [K, C] @ [C, V] -> [K, V]
        S = xi[:, :, -1:] * S + np.einsum("bihk,bhiv->bhkv", kc, D[:, :, -1, :, None] * delta)
    return o, S


def step(q, k, v, *, g, beta, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, HV, V].
        g: log decay, [B, HV], nats, <= 0.
        beta: write strength, [B, HV].
        state: S_{t-1}, [B, HV, K, V].
        scale: s; default K ** -0.5.

    Returns:
        o, [B, HV, V], and S_t, [B, HV, K, V].

    Cost: B HV (7 K V + 3 V + 1) FLOPs.
    Source: Yang et al. 2024, arXiv:2412.06464.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    share = v.shape[1] // q.shape[1]
    q, k = np.repeat(q, share, axis=1), np.repeat(k, share, axis=1)  # [B, HV, K]
    S = np.exp(g[:, :, None, None]) * state
    old = np.einsum("bhk,bhkv->bhv", k, S)
    S = S + np.einsum("bhk,bhv->bhkv", k, beta[:, :, None] * (v - old))
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, HV, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data, exponentials of the
    gates included; masks cost nothing. Every value head is counted alone, its products of keys too. Bytes:
    q, k, v, beta and g (float32) read once, o written once, S_T written once in float32; nothing is spilled,
    since the state, or a tile of scores, stays on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, HV, K, V: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, beta, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * HV * K * V
    if form == "recurrent":
        flops = T * (7 * K * V + 3 * V + 1)
    elif form == "parallel":
        # k k, q k 2 T^2 K, scores delta 2 T^2 V, six tables; three with S, seven passes over V; the solve
        flops = T * T * (4 * K + 2 * V + 6) + T * (6 * K * V + 7 * V + 2) + 2 * K * V
        flops += 2 * T**3 // 3 + 2 * T * T * V
    else:
        chunks = [min(chunk_size, T - start) for start in range(0, T, chunk_size)]
        # k k, q k and W 2 n^2 K, U and scores delta 2 n^2 V, six tables; substitution n^3 - n; as above
        flops = sum(
            n * n * (6 * K + 4 * V + 6) + n**3 + n * (6 * K * V + 5 * V + 1) + 2 * K * V for n in chunks
        )
    return {
        "flops": B * HV * flops,
        "bytes": B * T * (itemsize * (2 * H * K + 2 * HV * V + HV) + 4 * HV) + state_bytes,
        "state_bytes": state_bytes,
    }
