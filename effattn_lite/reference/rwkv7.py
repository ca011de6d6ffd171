r"""RWKV-7 "Goose": channels fade each at its own rate, and reading, erasing and writing have a vector each.

The delta rule reads, erases and writes with one key. Here a reads the old state, b says into which channels
the answer is written back, and k where the new value goes. In use :math:`a = -\kappa` and
:math:`b = \kappa \odot \eta` for a vector :math:`\kappa` of length 1 and rates :math:`\eta` in (0, 1): what
:math:`\kappa` finds is taken away, from each channel at a rate of its own. The transition is a diagonal
matrix plus one of rank 1. Three forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, g, a, b, scale=1.0, initial_state=None):
    r"""RWKV-7 token by token: read with a, fade, write the answer at b and the value at k, read with q.

    .. math:: y_t = S_{t-1}^\top a_t, \qquad
        S_t = \operatorname{Diag}(\alpha_t)\, S_{t-1} + b_t y_t^\top + k_t v_t^\top
        = \bigl(\operatorname{Diag}(\alpha_t) + b_t a_t^\top\bigr) S_{t-1} + k_t v_t^\top, \qquad
        o_t = s\, S_t^\top q_t, \qquad \alpha_t = e^{g_t}

    Here a reads the state before it fades; the key of KDA reads it after.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K], not normalised.
        v: values, [B, T, H, V].
        g: log decay of a key channel, [B, T, H, K], nats a token, <= 0; 0 keeps everything.
        a: what is read before the write, [B, T, H, K]; in use minus a vector of length 1.
        b: where the answer is written, [B, T, H, K]; in use -a times rates in (0, 1).
        scale: s.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B T H (9 K V + K + V) FLOPs: read a 2, decay 1, two outer products and their sums 4, read q 2 an
    entry of the state; K exponentials; the scale V.
    Source: Peng et al. 2025, arXiv:2503.14456. Differs: the paper's state is transposed, [V, K]; its r is q
    here, its w is exp(g).
    """
    B, T, H, K = q.shape
    S = np.zeros((B, H, K, v.shape[-1])) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # y_t = S_{t-1}^T a_t
        y = np.einsum("bhk,bhkv->bhv", a[:, t], S)
        # S_t = Diag(alpha_t) S_{t-1} + b_t y_t^T + k_t v_t^T
        S = np.exp(g[:, t, :, :, None]) * S
        S = S + np.einsum("bhk,bhv->bhkv", b[:, t], y) + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def parallel(q, k, v, *, g, a, b, scale=1.0, initial_state=None):
    r"""RWKV-7 for all tokens at once: one triangular system gives every answer that is written back.

    .. math:: (I - A^{ab})\, Y = \bar A S_0 + A^{ak} V, \qquad
        O = s\,\bigl(\bar Q S_0 + A^{qb} Y + A^{qk} V\bigr)

    A query of token t meets what token j <= t wrote after the decays of j+1..t. The vector a comes before its
    own decay and write, so it meets what the row above meets:

    .. math:: A^{qb}_{tj} = \sum_c q_{tc}\, D_{tjc}\, b_{jc}, \qquad
        A^{ab}_{tj} = \sum_c a_{tc}\, D_{t-1,jc}\, b_{jc}, \qquad D_{tjc} = e^{G_{tc} - G_{jc}}\,[t \ge j]

    likewise with k for b; :math:`\bar q_t = e^{G_t} \odot q_t`, :math:`\bar a_t = e^{G_{t-1}} \odot a_t` and
    :math:`G_{tc} = \sum_{i \le t} g_{ic}`. No exponent is above 0, so no gate is too strong.

    Args and returns: as `recurrent`.

    Cost: B H (2 T^3 / 3 + T^2 (12 K + 8 V + 1) + T (8 K V + 4 K + 4 V) + 3 K V) FLOPs, cubic in T, since
    `np.linalg.solve` factors a matrix that is triangular already; and tables of T^2 K decays.
    Source: the recurrence of Peng et al. 2025, arXiv:2503.14456, as one system.
    """
    B, T, H, K = q.shape
    S = np.zeros((B, H, K, v.shape[-1])) if initial_state is None else initial_state
    G = np.cumsum(g, axis=1)  # [B, T, H, K]
    t = np.arange(T)
    # exp of a difference <= 0: cannot overflow; exp(-inf) = 0 above the diagonal
    lower = (t[:, None] >= t)[:, :, None, None]  # [T, T, 1, 1]
    D = np.exp(np.where(lower, G[:, :, None] - G[:, None], -np.inf))  # [B, T, T, H, K]
    Db, Dk, xi = D * b[:, None], D * k[:, None], np.exp(G)
    # what a meets is what the row above meets: at the first token S_0 alone
    Eb, Ek = (np.concatenate((np.zeros_like(x[:, :1]), x[:, :-1]), axis=1) for x in (Db, Dk))
    before = np.concatenate((np.ones_like(xi[:, :1]), xi[:, :-1]), axis=1)
    Aab, Aak = (np.einsum("bthk,btjhk->bhtj", a, x) for x in (Eb, Ek))  # [B, H, T, T]
    Aqb, Aqk = (np.einsum("bthk,btjhk->bhtj", q, x) for x in (Db, Dk))
    # y_t - sum_{j<t} Aab_tj y_j = S_0^T (e^{G_{t-1}} a_t) + sum_{j<t} Aak_tj v_j
    found = np.einsum("bthk,bhkv->bhtv", before * a, S) + np.einsum("bhtj,bjhv->bhtv", Aak, v)
    y = np.linalg.solve(np.eye(T) - Aab, found)  # [B, H, T, V]
    # o_t = s (S_0^T (e^{G_t} q_t) + sum_{j<=t} Aqb_tj y_j + Aqk_tj v_j)
    past = np.einsum("bthk,bhkv->bthv", xi * q, S)  # [T, K] @ [K, V] -> [T, V]
    o = scale * (past + np.einsum("bhtj,bhjv->bthv", Aqb, y) + np.einsum("bhtj,bjhv->bthv", Aqk, v))
    # S_T = Diag(xi_T) S_0 + sum_j (D_Tj b_j) y_j^T + (D_Tj k_j) v_j^T
    S = xi[:, -1, :, :, None] * S + np.einsum("bjhk,bhjv->bhkv", Db[:, -1], y)
    return o, S + np.einsum("bjhk,bjhv->bhkv", Dk[:, -1], v)


def chunkwise(q, k, v, *, g, a, b, scale=1.0, initial_state=None, chunk_size=16):
    r"""RWKV-7 a chunk at a time: a small triangular inverse inside, the state from chunk to chunk.

    .. math:: M = (I - A^{ab})^{-1}, \quad W = M \bar A, \quad U = M A^{ak} V, \quad Y = U + W S, \qquad
        O = s\,\bigl(\bar Q S + A^{qb} Y + A^{qk} V\bigr), \qquad
        S \leftarrow \operatorname{Diag}(\xi_n) S + (\zeta \odot B)^\top Y + (\zeta \odot K)^\top V

    for a chunk of n tokens, with the tables A of `parallel` from the chunk's start, :math:`\xi_n = e^{G_n}`
    and :math:`\zeta_j = e^{G_n - G_j}`. M, W and U do not ask for the state; the last chunk may be short.

    Args and returns: as `recurrent`, and chunk_size: C, tokens in a chunk.

    Cost: B H (T C (14 K + 8 V) + T C^2 + T (8 K V + 4 K + 4 V - 1) + 3 NC K V) FLOPs where C divides T.
    Source: Peng et al. 2025, arXiv:2503.14456; the WY form of Yang et al. 2024, arXiv:2406.06484, with two
    writes a token. Differs: logarithms of decays are subtracted, never decays divided, at the price of a
    [C, C, K] table.
    """
    B, T, H, K = q.shape
    S = np.zeros((B, H, K, v.shape[-1])) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc, ac, bc = (x[:, part] for x in (q, k, v, a, b))  # [B, C, H, K or V]
        i = np.arange(qc.shape[1])
        # 1 local decay: between two tokens (exp of a difference <= 0), from the start; then as a meets them
        G = np.cumsum(g[:, part], axis=1)  # [B, C, H, K]
        lower = (i[:, None] >= i)[:, :, None, None]  # [C, C, 1, 1]
        D = np.exp(np.where(lower, G[:, :, None] - G[:, None], -np.inf))  # [B, C, C, H, K]
        Db, Dk, xi = D * bc[:, None], D * kc[:, None], np.exp(G)
        Eb, Ek = (np.concatenate((np.zeros_like(x[:, :1]), x[:, :-1]), axis=1) for x in (Db, Dk))
        before = np.concatenate((np.ones_like(xi[:, :1]), xi[:, :-1]), axis=1)
        # 2 readers a and q on writers b and k, [B, H, C, C]
        Aab, Aak = (np.einsum("bihk,bijhk->bhij", ac, x) for x in (Eb, Ek))
        Aqb, Aqk = (np.einsum("bihk,bijhk->bhij", qc, x) for x in (Db, Dk))
        # 3 M = (I - Aab)^-1 by forward substitution: a row asks for the rows above it
        M = np.where(i[:, None] == i, 1.0, np.zeros_like(Aab))
        for r in i[1:]:
            M[:, :, r] += np.einsum("bhj,bhjm->bhm", Aab[:, :, r, :r], M[:, :, :r])
        # 4 the answers on an empty state, and how the state is asked: [C, C] @ [C, V or K]
        U = np.einsum("bhij,bhjv->bhiv", M, np.einsum("bhij,bjhv->bhiv", Aak, vc))
        W = np.einsum("bhij,bjhk->bhik", M, before * ac)
        # 5 the answers: Y = U + W S, [C, K] @ [K, V] -> [C, V]
        y = U + np.einsum("bhik,bhkv->bhiv", W, S)
        # 6 output: what earlier chunks left, and what this chunk wrote up to i
        past = np.einsum("bihk,bhkv->bihv", xi * qc, S)
        new = np.einsum("bhij,bhjv->bihv", Aqb, y) + np.einsum("bhij,bjhv->bihv", Aqk, vc)
        o[:, part] = scale * (past + new)
        # 7 state: the last rows of Db and Dk are zeta b and zeta k, [K, C] @ [C, V] -> [K, V]
        S = xi[:, -1, :, :, None] * S + np.einsum("bjhk,bhjv->bhkv", Db[:, -1], y)
        S = S + np.einsum("bjhk,bjhv->bhkv", Dk[:, -1], vc)
    return o, S


def step(q, k, v, *, g, a, b, state, scale=1.0):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        g: log decay of a key channel, [B, H, K], nats, <= 0.
        a: what is read before the write, [B, H, K].
        b: where the answer is written, [B, H, K].
        state: S_{t-1}, [B, H, K, V].
        scale: s.

    Returns:
        o, [B, H, V], and S_t, [B, H, K, V].

    Cost: B H (9 K V + K + V) FLOPs.
    Source: Peng et al. 2025, arXiv:2503.14456.
    """
    y = np.einsum("bhk,bhkv->bhv", a, state)
    S = np.exp(g[..., None]) * state
    S = S + np.einsum("bhk,bhv->bhkv", b, y) + np.einsum("bhk,bhv->bhkv", k, v)
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data, exponentials of the
    gates included; masks cost nothing. Bytes: q, k, v, a, b and g (float32) read once, o written once, S_T
    written once in float32; nothing is spilled, since the state, or a tile of decayed vectors, stays on chip
    in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, a, b, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * K * V
    if form == "recurrent":
        flops = T * (9 * K * V + K + V)
    elif form == "parallel":
        # decays 2, times b and k 2, four tables 8 T^2 K; three mixtures 6 T^2 V; I; the solve
        flops = T * T * (12 * K + 6 * V + 1) + T * (8 * K * V + 4 * K + 4 * V) + 3 * K * V
        flops += 2 * T**3 // 3 + 2 * T * T * V
    else:
        chunks = [min(chunk_size, T - start) for start in range(0, T, chunk_size)]
        # as above, and W 2 n^2 K, M on what is found 2 n^2 V, substitution n^3 - n
        flops = sum(
            n * n * (14 * K + 8 * V) + n**3 + n * (8 * K * V + 4 * K + 4 * V - 1) + 3 * K * V for n in chunks
        )
    return {
        "flops": B * H * flops,
        "bytes": B * T * H * (itemsize * (4 * K + 2 * V) + 4 * K) + state_bytes,
        "state_bytes": state_bytes,
    }
