r"""Gated linear attention: every key channel of every token says how much of its memory is kept.

The decay is a vector a token, :math:`\alpha_t = e^{g_t}`, computed from the input: the memory forgets when
the text says so. Three forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, g, scale=None, initial_state=None):
    r"""Gated linear attention token by token: decay each row of the state, write the token, read.

    .. math:: S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel.
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B T H (5 K V + K + V) FLOPs: decay 1, outer product 1, add 1, read 2 an entry of S; exp K, scale V.
    Source: Yang et al. 2024, arXiv:2312.06635. Differs: the paper writes alpha for e^g, and its
    state is read by row vectors; s is that of the authors' code.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T: the decay is of the key axis
        S = np.exp(g[:, t])[..., None] * S + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def parallel(q, k, v, *, g, scale=None, initial_state=None):
    r"""Gated linear attention for all tokens at once: each channel of a score has its own decay.

    .. math:: A_{tj} = \sum_c q_{tc}\, D_{tjc}\, k_{jc}, \qquad
        D_{tjc} = e^{G_{tc} - G_{jc}}\,[t \ge j], \qquad
        G_t = \sum_{r \le t} g_r, \qquad O = s\,\bigl(A V + (e^{G} \odot Q)\, S_0\bigr)

    The difference is taken before the exponential, so no exponent is above 0 and no decay is too strong.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel.
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (T^2 (5 K + 2 V) + T (4 K V + 6 K + 2 V) + 2 K V + K) FLOPs, quadratic in T.
    Source: Yang et al. 2024, arXiv:2312.06635. Differs: takes and returns a state.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    G = np.cumsum(g, axis=1)  # [B, T, H, K]
    t = np.arange(T)
    seen = (t[:, None] >= t)[:, :, None, None]
    # D_tjc = e^(G_t - G_j) on and below the diagonal, 0 above; exp of a difference <= 0: cannot overflow
    D = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf))  # [B, T, T, H, K]
    A = np.einsum("bthk,btjhk,bjhk->bhtj", q, D, k)
    past = np.einsum("bthk,bhkv->bthv", q * np.exp(G), S)  # [T, K] @ [K, V] -> [T, V]
    o = scale * (np.einsum("bhtj,bjhv->bthv", A, v) + past)
    # S_T = Diag(e^(G_T)) S_0 + sum_t Diag(e^(G_T - G_t)) k_t v_t^T
    kept = k * np.exp(G[:, -1:] - G)
    S = np.exp(G[:, -1])[..., None] * S + np.einsum("bthk,bthv->bhkv", kept, v)
    return o, S


def chunkwise(q, k, v, *, g, scale=None, initial_state=None, chunk_size=16):
    r"""Gated linear attention a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    .. math:: O = s\,\bigl(A V + (e^{G} \odot Q)\, S\bigr), \qquad
        S \leftarrow \operatorname{Diag}(e^{G_{n-1}})\, S + (e^{G_{n-1} - G} \odot K)^\top V, \qquad
        A_{ij} = \sum_c q_{ic}\, e^{G_{ic} - G_{jc}}\, k_{jc}\,[i \ge j]

    for a chunk of n tokens i = 0..n-1, with G summed from the chunk's start; the last chunk may be short.
    The tempting form of the scores, :math:`(q_i e^{G_i}) \cdot (k_j e^{-G_j})`, is one product, but
    its second factor overflows; here the difference is taken first, at the price of a [C, C, K] table.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel.
        scale: s; default K ** -0.5.
        initial_state: S_0, [B, H, K, V]; default zeros.
        chunk_size: C, tokens in a chunk.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (T C (5 K + 2 V) + T (4 K V + 6 K + 2 V) + NC (2 K V + K)) FLOPs where C divides T, linear in T.
    Source: Yang et al. 2024, arXiv:2312.06635. Differs: no second level of chunks; all scores
    are computed as the paper computes those on its diagonal tiles, in log space.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc = q[:, part], k[:, part], v[:, part]  # [B, C, H, K or V]
        i = np.arange(qc.shape[1])
        seen = (i[:, None] >= i)[:, :, None, None]
        # 1 local decay: between two tokens, from the chunk's start, to the chunk's end
        G = np.cumsum(g[:, part], axis=1)  # [B, C, H, K]
        # exp of a difference <= 0: cannot overflow
        # [B, C, C, H, K]
        D = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf))
        xi = np.exp(G)
        zeta = np.exp(G[:, -1:] - G)
        # 2 intra-chunk: scores, channel by channel
        A = np.einsum("bihk,bijhk,bjhk->bhij", qc, D, kc)
        # 3 chunk state: what this chunk writes, [K, C] @ [C, V] -> [K, V]
        U = np.einsum("bihk,bihv->bhkv", kc * zeta, vc)
        # 4 inter-chunk: what earlier chunks left, [C, K] @ [K, V] -> [C, V]
        past = np.einsum("bihk,bhkv->bihv", qc * xi, S)
        S = np.exp(G[:, -1])[..., None] * S + U
        # 5 output
        o[:, part] = scale * (np.einsum("bhij,bjhv->bihv", A, vc) + past)
    return o, S


def step(q, k, v, *, g, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        g: log decay, [B, H, K], nats, <= 0.
        state: S_{t-1}, [B, H, K, V].
        scale: s; default K ** -0.5.

    Returns:
        o, [B, H, V], and S_t, [B, H, K, V].

    Cost: B H (5 K V + K + V) FLOPs.
    Source: Yang et al. 2024, arXiv:2312.06635.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = np.exp(g)[..., None] * state + np.einsum("bhk,bhv->bhkv", k, v)
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; the decay tables are
    data, and so is the half of them that a mask throws away. Bytes: q, k, v read once, o written once, g read
    and S_T written once in float32; nothing is spilled, since the state, or a tile of scores, stays on chip
    in every form.

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
        flops = B * T * H * (5 * K * V + K + V)
    else:
        chunks = [min(size, T - start) for start in range(0, T, size)]
        # decays 2 n^2 K, scores 3 n^2 K, values 2 n^2 V
        pairs = sum(n * n for n in chunks) * (5 * K + 2 * V)
        # read 2 and write 2; cumsum, two decays of 2, a difference; sum, scale o; decay and sum S
        flops = B * H * (pairs + T * (4 * K * V + 6 * K + 2 * V) + len(chunks) * (2 * K * V + K))
    return {
        "flops": flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V) + 4 * B * T * H * K + state_bytes,
        "state_bytes": state_bytes,
    }
