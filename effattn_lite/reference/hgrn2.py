r"""HGRN2: gated linear attention whose key is what the gate leaves over, :math:`k_t = 1 - e^{g_t}`.

A channel writes as much as it forgets, so every row of the state is a weighted mean of values and cannot
grow. Three forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, v, *, g, scale=None, initial_state=None):
    r"""HGRN2 token by token: each row of the state moves towards the value by one minus its gate.

    .. math:: S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + (1 - e^{g_t})\, v_t^\top, \qquad
        o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel and writes nothing.
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B T H (5 K V + 3 K + V) FLOPs: decay 1, outer product 1, add 1, read 2 an entry of S; exp and key
    3 K, scale V.
    Source: Qin et al. 2024, arXiv:2404.07904. Differs: the paper writes o for q, i for v and f for
    e^g; the lower bound of f by layer is the layer's.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    k = -np.expm1(g)  # 1 - e^g, without cancellation near g = 0
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = Diag(e^g_t) S_{t-1} + (1 - e^g_t) v_t^T: the decay is of the key axis
        S = np.exp(g[:, t])[..., None] * S + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def parallel(q, v, *, g, scale=None, initial_state=None):
    r"""HGRN2 for all tokens at once: each channel of a score has its own decay.

    .. math:: A_{tj} = \sum_c q_{tc}\, D_{tjc}\, (1 - e^{g_{jc}}), \qquad
        D_{tjc} = e^{G_{tc} - G_{jc}}\,[t \ge j], \qquad
        G_t = \sum_{r \le t} g_r, \qquad O = s\,\bigl(A V + (e^{G} \odot Q)\, S_0\bigr)

    The difference is taken before the exponential, so no exponent is above 0 and no decay is too strong.

    Args:
        q: queries, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel and writes nothing.
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (T^2 (5 K + 2 V) + T (4 K V + 8 K + 2 V) + 2 K V + K) FLOPs, quadratic in T.
    Source: the recurrence of Qin et al. 2024, arXiv:2404.07904, unrolled.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    k = -np.expm1(g)  # 1 - e^g, without cancellation near g = 0
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


def chunkwise(q, v, *, g, scale=None, initial_state=None, chunk_size=16):
    r"""HGRN2 a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    .. math:: O = s\,\bigl(A V + (e^{G} \odot Q)\, S\bigr), \qquad
        S \leftarrow \operatorname{Diag}(e^{G_{n-1}})\, S + (e^{G_{n-1} - G} \odot K)^\top V, \qquad
        A_{ij} = \sum_c q_{ic}\, e^{G_{ic} - G_{jc}}\, k_{jc}\,[i \ge j], \quad K = 1 - e^{g}

    for a chunk of n tokens i = 0..n-1, with G summed from the chunk's start; the last chunk may be short.

    Args:
        q: queries, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel and writes nothing.
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.
        chunk_size: C, tokens in a chunk.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (T C (5 K + 2 V) + T (4 K V + 8 K + 2 V) + NC (2 K V + K)) FLOPs where C divides T, linear in T.
    Source: the recurrence of Qin et al. 2024, arXiv:2404.07904, cut into chunks.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, gc, vc = q[:, part], g[:, part], v[:, part]  # [B, C, H, K or V]
        kc = -np.expm1(gc)  # 1 - e^g, without cancellation near g = 0
        i = np.arange(qc.shape[1])
        seen = (i[:, None] >= i)[:, :, None, None]
        # 1 local decay: between two tokens, from the chunk's start, to the chunk's end
        G = np.cumsum(gc, axis=1)  # [B, C, H, K]
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


def step(q, v, *, g, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        v: value, [B, H, V].
        g: log decay, [B, H, K], nats, <= 0.
        state: S_{t-1}, [B, H, K, V].
        scale: s; default 1.

    Returns:
        o, [B, H, V], and S_t, [B, H, K, V].

    Cost: B H (5 K V + 3 K + V) FLOPs.
    Source: Qin et al. 2024, arXiv:2404.07904.
    """
    scale = 1.0 if scale is None else scale
    S = np.exp(g)[..., None] * state + np.einsum("bhk,bhv->bhkv", -np.expm1(g), v)
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; the decay tables are
    data, and so is the half of them that a mask throws away. Bytes: q and v read once, o written once, g read
    and S_T written once in float32; nothing is spilled, since the keys, the state, or a tile of scores, stay
    on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * K * V
    size = {"recurrent": 1, "parallel": T, "chunkwise": chunk_size}[form]
    if form == "recurrent":
        flops = B * T * H * (5 * K * V + 3 * K + V)
    else:
        chunks = [min(size, T - start) for start in range(0, T, size)]
        # decays 2 n^2 K, scores 3 n^2 K, values 2 n^2 V
        pairs = sum(n * n for n in chunks) * (5 * K + 2 * V)
        # read 2 and write 2; key 2, cumsum, two decays of 2, a difference; sum, scale o; decay and sum S
        flops = B * H * (pairs + T * (4 * K * V + 8 * K + 2 * V) + len(chunks) * (2 * K * V + K))
    return {
        "flops": flops,
        "bytes": itemsize * B * T * H * (K + 2 * V) + 4 * B * T * H * K + state_bytes,
        "state_bytes": state_bytes,
    }
