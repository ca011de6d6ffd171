r"""Kimi Delta Attention: the gated delta rule with a decay of its own for every key channel.

Each channel of the memory fades at its own rate, as in GLA; then the key corrects its value, as in DeltaNet.
The decay comes first, and here the order matters twice, since :math:`\operatorname{Diag}(\alpha)` and
:math:`I - \beta k k^\top` do not commute. Three forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, g, beta, scale=None, initial_state=None):
    r"""KDA token by token: decay every channel, read the key's old value, write the difference, read.

    .. math:: \delta_t = \beta_t\,\bigl(v_t - (\operatorname{Diag}(\alpha_t) S_{t-1})^\top k_t\bigr), \qquad
        S_t = \operatorname{Diag}(\alpha_t) S_{t-1} + k_t \delta_t^\top
        = (I - \beta_t k_t k_t^\top) \operatorname{Diag}(\alpha_t)\, S_{t-1} + \beta_t k_t v_t^\top, \qquad
        o_t = s\, S_t^\top q_t, \qquad \alpha_t = e^{g_t}

    Args:
        q: queries, [B, T, H, K]; value head h reads query head h // (HV / H).
        k: keys, [B, T, H, K], shared as the queries; expected of length 1 over K (not normalised here).
        v: values, [B, T, HV, V], HV a multiple of H.
        g: log decay of a key channel, [B, T, HV, K], nats a token, <= 0; 0 keeps everything.
        beta: write strength, [B, T, HV], in [0, 1], or in [0, 2] where reflections are wanted.
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, HV, K, V]; default zeros.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: B T HV (7 K V + 3 V + K) FLOPs: decay 1, read the key 2, outer product 1, add 1, read the query 2 an
    entry of the state; difference, strength and scale V each; K exponentials.
    Source: Kimi Team 2025, arXiv:2510.26692. Differs: s and the shared heads are fla's.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q, k = np.repeat(q, HV // H, axis=2), np.repeat(k, HV // H, axis=2)  # [B, T, HV, K]
    S = np.zeros((B, HV, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # Diag(alpha_t) S_{t-1}, and what it holds for this key
        S = np.exp(g[:, t, :, :, None]) * S
        old = np.einsum("bhk,bhkv->bhv", k[:, t], S)
        # S_t = Diag(alpha_t) S_{t-1} + k_t (beta_t (v_t - old))^T
        S = S + np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def parallel(q, k, v, *, g, beta, scale=None, initial_state=None):
    r"""KDA for all tokens at once: one triangular system gives every difference written.

    .. math:: (I + A)\,\Delta = \operatorname{Diag}(\beta)\,\bigl(V - (\xi \odot K) S_0\bigr), \qquad
        A_{tj} = \beta_t \sum_c k_{tc}\, D_{tjc}\, k_{jc}\,[t > j], \qquad
        O = s\,\bigl((\xi \odot Q) S_0 + P \Delta\bigr), \quad P_{tj} = \sum_c q_{tc}\, D_{tjc}\, k_{jc}

    with :math:`D_{tjc} = e^{G_{tc} - G_{jc}}\,[t \ge j]`, :math:`\xi_{tc} = e^{G_{tc}}` and
    :math:`G_{tc} = \sum_{i \le t} g_{ic}`. No exponent is above 0, so no gate is too strong.

    Args:
        q: queries, [B, T, H, K]; value head h reads query head h // (HV / H).
        k: keys, [B, T, H, K], shared as the queries; expected of length 1 over K (not normalised here).
        v: values, [B, T, HV, V], HV a multiple of H.
        g: log decay of a key channel, [B, T, HV, K], nats a token, <= 0.
        beta: write strength, [B, T, HV], in [0, 1], or in [0, 2].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, HV, K, V]; default zeros.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: B HV (2 T^3 / 3 + T^2 (7 K + 4 V + 2) + T (6 K V + 4 K + 4 V) + 2 K V) FLOPs, cubic in T, since
    `np.linalg.solve` factors a matrix that is triangular already; and a table of T^2 K decays.
    Source: the recurrence of Kimi Team 2025, arXiv:2510.26692, as one system.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q, k = np.repeat(q, HV // H, axis=2), np.repeat(k, HV // H, axis=2)  # [B, T, HV, K]
    S = np.zeros((B, HV, K, V)) if initial_state is None else initial_state
    b = beta.swapaxes(1, 2)[..., None]  # [B, HV, T, 1]
    G = np.cumsum(g, axis=1)  # [B, T, HV, K]
    t = np.arange(T)
    # exp of a difference <= 0: cannot overflow; exp(-inf) = 0 above the diagonal
    lower = (t[:, None] >= t)[:, :, None, None]  # [T, T, 1, 1]
    # [B, T, T, HV, K]
    E = np.exp(np.where(lower, G[:, :, None] - G[:, None], -np.inf)) * k[:, None]
    xi = np.exp(G)  # [B, T, HV, K]
    # delta_t + sum_{j<t} beta_t (k_t . D_tj k_j) delta_j = beta_t (v_t - S_0^T (xi_t k_t))
    # [B, HV, T, T]
    A = np.where(t[:, None] > t, b * np.einsum("bthk,btjhk->bhtj", k, E), 0)
    unread = v.swapaxes(1, 2) - np.einsum("bthk,bhkv->bhtv", xi * k, S)  # [B, HV, T, V]
    delta = np.linalg.solve(np.eye(T) + A, b * unread)  # [B, HV, T, V]
    # o_t = s (S_0^T (xi_t q_t) + sum_{j<=t} (q_t . D_tj k_j) delta_j)
    scores = np.einsum("bthk,btjhk->bhtj", q, E)
    past = np.einsum("bthk,bhkv->bthv", xi * q, S)  # [T, K] @ [K, V] -> [T, V]
    o = scale * (past + np.einsum("bhtj,bhjv->bthv", scores, delta))
    # S_T = Diag(xi_T) S_0 + sum_j D_Tj k_j delta_j^T
    S = xi[:, -1, :, :, None] * S + np.einsum("bjhk,bhjv->bhkv", E[:, -1], delta)
    return o, S


def chunkwise(q, k, v, *, g, beta, scale=None, initial_state=None, chunk_size=16):
    r"""KDA a chunk at a time: a small triangular inverse inside, the state from chunk to chunk.

    .. math:: M = (I + A)^{-1} \operatorname{Diag}(\beta), \quad W = M\, (\xi \odot K), \quad U = M V, \quad
        \Delta = U - W S, \qquad O = s\,\bigl((\xi \odot Q) S + P \Delta\bigr), \qquad
        S \leftarrow \operatorname{Diag}(\xi_{n-1}) S + (\zeta \odot K)^\top \Delta

    for a chunk of n tokens i = 0..n-1, with :math:`G_i = \sum_{r \le i} g_r` from the chunk's start,
    :math:`D_{ijc} = e^{G_{ic} - G_{jc}}\,[i \ge j]`, :math:`\xi = e^{G}`, :math:`\zeta_j = D_{n-1,j}`,
    :math:`A_{ij} = \beta_i \sum_c k_{ic} D_{ijc} k_{jc}\,[i > j]` and
    :math:`P_{ij} = \sum_c q_{ic} D_{ijc} k_{jc}`; the last chunk may be short.

    Args:
        q: queries, [B, T, H, K]; value head h reads query head h // (HV / H).
        k: keys, [B, T, H, K], shared as the queries; expected of length 1 over K (not normalised here).
        v: values, [B, T, HV, V], HV a multiple of H.
        g: log decay of a key channel, [B, T, HV, K], nats a token, <= 0.
        beta: write strength, [B, T, HV], in [0, 1], or in [0, 2].
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, HV, K, V]; default zeros.
        chunk_size: C, tokens in a chunk.

    Returns:
        o, [B, T, HV, V], and S_T, [B, HV, K, V].

    Cost: B HV (T C (9 K + 4 V + 1) + T C^2 + T (6 K V + 4 K + 3 V - 1) + 2 NC K V) FLOPs where C divides T.
    Source: Kimi Team 2025, arXiv:2510.26692. Differs: the paper divides keys by their decays,
    k / xi, which overflows where a gate is strong; here logarithms are subtracted first, at the price of a
    [C, C, K] table.
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
        # 1 local decay: between two tokens (exp of a difference <= 0), times the key; from the chunk's start
        G = np.cumsum(g[:, part], axis=1)  # [B, C, HV, K]
        lower = (i[:, None] >= i)[:, :, None, None]  # [C, C, 1, 1]
        # [B, C, C, HV, K]
        E = np.exp(np.where(lower, G[:, :, None] - G[:, None], -np.inf)) * kc[:, None]
        xi = np.exp(G)  # [B, C, HV, K]
        # 2 token i sees Diag(alpha_i) S_{i-1} = Diag(xi_i) S + sum_{j<i} D_ij k_j delta_j^T, so
        #   delta_i = beta_i (v_i - S^T (xi_i k_i)) - sum_{j<i} A_ij delta_j, so Delta = M (V - (xi K) S)
        # [B, HV, C, C]
        A = np.where(i[:, None] > i, b * np.einsum("bihk,bijhk->bhij", kc, E), 0)
        # 3 M = (I + A)^-1 Diag(beta) by forward substitution: a row asks for the rows above it
        M = np.where(i[:, None] == i, b, 0)  # [B, HV, C, C]
        for r in i[1:]:
            M[:, :, r] -= np.einsum("bhj,bhjm->bhm", A[:, :, r, :r], M[:, :, :r])
        # 4 what would be written on an empty state, and how the state is read: [C, C] @ [C, V or K]
        U = np.einsum("bhij,bjhv->bhiv", M, vc)
        W = np.einsum("bhij,bjhk->bhik", M, xi * kc)
        # 5 what is written: Delta = U - W S, [C, K] @ [K, V] -> [C, V]
        delta = U - np.einsum("bhik,bhkv->bhiv", W, S)
        # 6 output: what earlier chunks left, and what this chunk wrote up to i
        scores = np.einsum("bihk,bijhk->bhij", qc, E)
        past = np.einsum("bihk,bhkv->bihv", xi * qc, S)
        o[:, part] = scale * (past + np.einsum("bhij,bhjv->bihv", scores, delta))
        # 7 state: the last row of E is zeta K, [K, C] @ [C, V] -> [K, V]
        S = xi[:, -1, :, :, None] * S + np.einsum("bjhk,bhjv->bhkv", E[:, -1], delta)
    return o, S


def step(q, k, v, *, g, beta, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, HV, V].
        g: log decay of a key channel, [B, HV, K], nats, <= 0.
        beta: write strength, [B, HV].
        state: S_{t-1}, [B, HV, K, V].
        scale: s; default K ** -0.5.

    Returns:
        o, [B, HV, V], and S_t, [B, HV, K, V].

    Cost: B HV (7 K V + 3 V + K) FLOPs.
    Source: Kimi Team 2025, arXiv:2510.26692.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    share = v.shape[1] // q.shape[1]
    q, k = np.repeat(q, share, axis=1), np.repeat(k, share, axis=1)  # [B, HV, K]
    S = np.exp(g[..., None]) * state
    old = np.einsum("bhk,bhkv->bhv", k, S)
    S = S + np.einsum("bhk,bhv->bhkv", k, beta[:, :, None] * (v - old))
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, HV, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data, exponentials of the
    gates included; masks cost nothing. Every value head is counted alone. Bytes: q, k, v, beta, g (float32)
    read once, o written once, S_T written once in float32; nothing is spilled, since the state, or a tile
    of decayed keys, stays on chip in every form.

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
        flops = T * (7 * K * V + 3 * V + K)
    elif form == "parallel":
        # decayed keys 3 T^2 K, k E, q E 2 T^2 K, scores delta 2 T^2 V, two tables; the solve
        flops = T * T * (7 * K + 2 * V + 2) + T * (6 * K * V + 4 * K + 4 * V) + 2 * K * V
        flops += 2 * T**3 // 3 + 2 * T * T * V
    else:
        chunks = [min(chunk_size, T - start) for start in range(0, T, chunk_size)]
        # decayed keys 3 n^2 K, k E, q E and W 2 n^2 K, U and scores delta 2 n^2 V; substitution n^3 - n
        flops = sum(
            n * n * (9 * K + 4 * V + 1) + n**3 + n * (6 * K * V + 4 * K + 3 * V - 1) + 2 * K * V
            for n in chunks
        )
    return {
        "flops": B * HV * flops,
        "bytes": B * T * (itemsize * (2 * H * K + 2 * HV * V + HV) + 4 * HV * K) + state_bytes,
        "state_bytes": state_bytes,
    }
