r"""RWKV-5, Eagle: one fixed decay a key channel, and a bonus for the token that is being read.

The decay is a vector of each head, :math:`w = e^{g}`, so scores inside a chunk are no longer one product:
every channel fades at its own rate. Three forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, g, u, scale=None, initial_state=None):
    r"""Eagle's time mixing token by token: read the past and the bonus, then decay and write.

    .. math:: o_t = s\,\bigl(S_{t-1} + \operatorname{Diag}(u)\, k_t v_t^\top\bigr)^\top q_t, \qquad
        S_t = \operatorname{Diag}(e^{g})\, S_{t-1} + k_t v_t^\top

    Args:
        q: receptance, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [H, K], nats a token, <= 0.
        u: bonus of the current token, [H, K].
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B T H (7 K V + V) FLOPs: outer product, bonus, add, decay, add, and 2 to read, an entry of S.
    Source: Peng et al. 2024, arXiv:2404.05892, section 4.1. Differs: the paper writes r for q and w for e^g.
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
        # S_t = Diag(e^g) S_{t-1} + k_t v_t^T
        S = np.exp(g)[:, :, None] * S + kv
    return o, S


def parallel(q, k, v, *, g, u, scale=None, initial_state=None):
    r"""Eagle's time mixing for all tokens at once: each channel of a score has its own decay.

    .. math:: A_{tj} = \sum_c q_{tc}\, D_{tjc}\, k_{jc}, \qquad
        D_{tjc} = e^{g_c (t-1-j)} \;(j < t), \quad u_c \;(j = t), \quad 0 \;(j > t), \qquad
        O = s\,\bigl(A V + (e^{g t} \odot Q)\, S_0\bigr)

    with t counted from 0. No exponent is above 0, so no decay is too strong.

    Args:
        q: receptance, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [H, K], nats a token, <= 0.
        u: bonus of the current token, [H, K].
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (3 T^2 K + 2 T^2 V + 4 T K V + 2 T K + 2 T V + 2 K V) FLOPs, quadratic in T.
    Source: the recurrence of Peng et al. 2024, arXiv:2404.05892, unrolled.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    t = np.arange(T)
    # D_tjc: token j has decayed t - 1 - j times when t reads the state before its own write
    lag = (t[:, None] - t - 1)[:, :, None, None]
    # [T, T, H, K]
    D = np.where(lag >= 0, np.exp(g * np.maximum(lag, 0)), 0) + np.where(lag == -1, u, 0)
    A = np.einsum("bthk,tjhk->btjhk", q, D)
    A = np.einsum("btjhk,bjhk->bhtj", A, k)
    # [T, K] @ [K, V] -> [T, V]
    past = np.einsum("bthk,bhkv->bthv", q * np.exp(g * t[:, None, None]), S)
    o = scale * (np.einsum("bhtj,bjhv->bthv", A, v) + past)
    # S_T = Diag(e^(g T)) S_0 + sum_t Diag(e^(g (T-1-t))) k_t v_t^T
    kept = k * np.exp(g * (T - 1 - t)[:, None, None])
    S = np.exp(g * T)[:, :, None] * S + np.einsum("bthk,bthv->bhkv", kept, v)
    return o, S


def chunkwise(q, k, v, *, g, u, scale=None, initial_state=None, chunk_size=16):
    r"""Eagle's time mixing a chunk at a time: parallel inside a chunk, recurrent from chunk to chunk.

    The tempting form of the scores, :math:`(q_i e^{g i}) \cdot (k_j e^{-g j})`, is one product, but
    its second factor overflows as soon as :math:`-g j > 709`. Here the difference :math:`i - 1 - j \ge 0` is
    taken first, at the price of a [C, C, K] table.

    Args:
        q: receptance, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [H, K], nats a token, <= 0.
        u: bonus of the current token, [H, K].
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.
        chunk_size: C, tokens in a chunk; the last one may be short.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (3 T C K + 2 T C V + 4 T K V + 2 T K + 2 T V + 2 NC K V) FLOPs where C divides T, linear in T.
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
        # 1 local decay: between two tokens (bonus on the diagonal), from the chunk's start, to its end
        lag = (i[:, None] - i - 1)[:, :, None, None]
        # [C, C, H, K]
        D = np.where(lag >= 0, np.exp(g * np.maximum(lag, 0)), 0) + np.where(lag == -1, u, 0)
        xi = np.exp(g * i[:, None, None])  # [C, H, K]
        zeta = np.exp(g * (i[-1] - i)[:, None, None])  # [C, H, K]
        # 2 intra-chunk: scores, channel by channel
        A = np.einsum("bihk,ijhk->bijhk", qc, D)
        A = np.einsum("bijhk,bjhk->bhij", A, kc)
        # 3 chunk state: what this chunk writes, [K, C] @ [C, V] -> [K, V]
        U = np.einsum("bihk,bihv->bhkv", kc * zeta, vc)
        # 4 inter-chunk: what earlier chunks left, [C, K] @ [K, V] -> [C, V]
        past = np.einsum("bihk,bhkv->bihv", qc * xi, S)
        S = np.exp(g * len(i))[:, :, None] * S + U
        # 5 output
        o[:, part] = scale * (np.einsum("bhij,bjhv->bihv", A, vc) + past)
    return o, S


def step(q, k, v, *, g, u, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: receptance, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        g: log decay, [H, K].
        u: bonus of the current token, [H, K].
        state: S_{t-1}, [B, H, K, V].
        scale: s; default 1.

    Returns:
        o, [B, H, V], and S_t, [B, H, K, V].

    Cost: B H (7 K V + V) FLOPs.
    Source: Peng et al. 2024, arXiv:2404.05892, section 4.1.
    """
    scale = 1.0 if scale is None else scale
    kv = np.einsum("bhk,bhv->bhkv", k, v)
    o = scale * np.einsum("bhk,bhkv->bhv", q, state + u[:, :, None] * kv)
    return o, np.exp(g)[:, :, None] * state + kv


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; decay tables cost
    nothing. Bytes: q, k, v read once, o written once, S_T written once in float32, and the constants g and u
    in float32; nothing is spilled, since the state, or a tile of scores, stays on chip in every form.

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
        flops = B * T * H * (7 * K * V + V)
    else:
        chunks = [min(size, T - start) for start in range(0, T, size)]
        # scores 3 n^2 K, values 2 n^2 V; read 2 and write 2; decay q and k; sum, scale o; decay and sum S
        flops = (
            B * H * sum(n * n * (3 * K + 2 * V) + n * (4 * K * V + 2 * K + 2 * V) + 2 * K * V for n in chunks)
        )
    return {
        "flops": flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V) + state_bytes + 8 * H * K,
        "state_bytes": state_bytes,
    }
