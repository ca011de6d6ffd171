r"""RWKV-6, Finch: Eagle with a decay that the token chooses, and the same bonus for the token being read.

The decay is a vector a token, :math:`w_t = e^{g_t}`, and acts after the token is read: token t sees the
memory before its own decay. Three forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, g, u, scale=None, initial_state=None):
    r"""Finch's time mixing token by token: read the past and the bonus, then decay and write.

    .. math:: o_t = s\,\bigl(S_{t-1} + \operatorname{Diag}(u)\, k_t v_t^\top\bigr)^\top q_t, \qquad
        S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top

    Args:
        q: receptance, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel.
        u: bonus of the current token, [H, K].
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B T H (7 K V + K + V) FLOPs: outer product, bonus, add, decay, add, and 2 to read, an entry of S;
    exp K, scale V.
    Source: Peng et al. 2024, arXiv:2404.05892. Differs: the paper writes r for q and w for e^g.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        kv = np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        # o_t = s (S_{t-1} + Diag(u) k_t v_t^T)^T q_t: the state does not hold token t yet
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S + u[:, :, None] * kv)
        # S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T
        S = np.exp(g[:, t])[..., None] * S + kv
    return o, S


def parallel(q, k, v, *, g, u, scale=None, initial_state=None):
    r"""Finch's time mixing for all tokens at once: each channel of a score has its own decay.

    .. math:: A_{tj} = \sum_c q_{tc}\, D_{tjc}\, k_{jc}, \qquad
        D_{tjc} = e^{G_{t-1,c} - G_{jc}} \;(j < t), \quad u_c \;(j = t), \quad 0 \;(j > t), \qquad
        o_t = s\,\bigl(A V + (e^{G_{t-1}} \odot q_t)\, S_0\bigr)

    with :math:`G_t = \sum_{r \le t} g_r`, 0 before the first token. No exponent is above 0, so no decay is
    too strong.

    Args:
        q: receptance, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel.
        u: bonus of the current token, [H, K].
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (T^2 (5 K + 2 V) + T (4 K V + 6 K + 2 V) + 2 K V + K) FLOPs, quadratic in T.
    Source: the recurrence of Peng et al. 2024, arXiv:2404.05892, unrolled.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    G = np.cumsum(g, axis=1)  # [B, T, H, K]
    # what has decayed before t is read: G one token late
    read = np.concatenate((np.zeros_like(G[:, :1]), G[:, :-1]), axis=1)
    t = np.arange(T)
    lag = (t[:, None] - t)[:, :, None, None]
    # exp of a difference <= 0: cannot overflow
    # [B, T, T, H, K]
    D = np.exp(np.where(lag > 0, read[:, :, None] - G[:, None], -np.inf))
    A = np.einsum("bthk,btjhk,bjhk->bhtj", q, np.where(lag == 0, u, D), k)
    # [T, K] @ [K, V] -> [T, V]
    past = np.einsum("bthk,bhkv->bthv", q * np.exp(read), S)
    o = scale * (np.einsum("bhtj,bjhv->bthv", A, v) + past)
    # S_T = Diag(e^(G_T)) S_0 + sum_t Diag(e^(G_T - G_t)) k_t v_t^T
    kept = k * np.exp(G[:, -1:] - G)
    S = np.exp(G[:, -1])[..., None] * S + np.einsum("bthk,bthv->bhkv", kept, v)
    return o, S


def chunkwise(q, k, v, *, g, u, scale=None, initial_state=None, chunk_size=16):
    r"""Finch's time mixing a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    .. math:: o_i = s\,\bigl(A V + (e^{G_{i-1}} \odot q_i)\, S\bigr), \qquad
        S \leftarrow \operatorname{Diag}(e^{G_{n-1}})\, S + (e^{G_{n-1} - G} \odot K)^\top V

    for a chunk of n tokens i = 0..n-1, with A as in the parallel form and G summed from the chunk's start.
    The difference of two G is taken before the exponential, at the price of a [C, C, K] table.

    Args:
        q: receptance, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel.
        u: bonus of the current token, [H, K].
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.
        chunk_size: C, tokens in a chunk; the last one may be short.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (T C (5 K + 2 V) + T (4 K V + 6 K + 2 V) + NC (2 K V + K)) FLOPs where C divides T, linear in T.
    Source: the recurrence of Peng et al. 2024, arXiv:2404.05892, cut into chunks.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = q[:, part], k[:, part], v[:, part]  # [B, C, H, K or V]
        i = np.arange(qc.shape[1])
        lag = (i[:, None] - i)[:, :, None, None]
        # 1 local decay: between two tokens (bonus on the diagonal), from the chunk's start, to its end
        G = np.cumsum(g[:, part], axis=1)  # [B, C, H, K]
        read = np.concatenate((np.zeros_like(G[:, :1]), G[:, :-1]), axis=1)
        # exp of a difference <= 0: cannot overflow
        # [B, C, C, H, K]
        D = np.exp(np.where(lag > 0, read[:, :, None] - G[:, None], -np.inf))
        xi = np.exp(read)
        zeta = np.exp(G[:, -1:] - G)
        # 2 intra-chunk: scores, channel by channel
        A = np.einsum("bihk,bijhk,bjhk->bhij", qc, np.where(lag == 0, u, D), kc)
        # 3 chunk state: what this chunk writes, [K, C] @ [C, V] -> [K, V]
        U = np.einsum("bihk,bihv->bhkv", kc * zeta, vc)
        # 4 inter-chunk: what earlier chunks left, [C, K] @ [K, V] -> [C, V]
        past = np.einsum("bihk,bhkv->bihv", qc * xi, S)
        S = np.exp(G[:, -1])[..., None] * S + U
        # 5 output
        o[:, part] = scale * (np.einsum("bhij,bjhv->bihv", A, vc) + past)
    return o, S


def step(q, k, v, *, g, u, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: receptance, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        g: log decay, [B, H, K], nats, <= 0.
        u: bonus of the current token, [H, K].
        state: S_{t-1}, [B, H, K, V].
        scale: s; default 1.

    Returns:
        o, [B, H, V], and S_t, [B, H, K, V].

    Cost: B H (7 K V + K + V) FLOPs.
    Source: Peng et al. 2024, arXiv:2404.05892.
    """
    scale = 1.0 if scale is None else scale
    kv = np.einsum("bhk,bhv->bhkv", k, v)
    o = scale * np.einsum("bhk,bhkv->bhv", q, state + u[:, :, None] * kv)
    return o, np.exp(g)[..., None] * state + kv


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; the decay tables are
    data, and so is the half of them that a mask throws away. Bytes: q, k, v read once, o written once, g and
    u read and S_T written once in float32; nothing is spilled, since the state, or a tile of scores, stays
    on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * K * V
    size = {"recurrent": 1, "parallel": T, "chunkwise": chunk_size}[form]
    if form == "recurrent":
        flops = B * T * H * (7 * K * V + K + V)
    else:
        chunks = [min(size, T - start) for start in range(0, T, size)]
        # decays 2 n^2 K, scores 3 n^2 K, values 2 n^2 V
        pairs = sum(n * n for n in chunks) * (5 * K + 2 * V)
        # read 2 and write 2; cumsum, two decays of 2, a difference; sum, scale o; decay and sum S
        flops = B * H * (pairs + T * (4 * K * V + 6 * K + 2 * V) + len(chunks) * (2 * K * V + K))
    return {
        "flops": flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V) + 4 * (B * T + 1) * H * K + state_bytes,
        "state_bytes": state_bytes,
    }
