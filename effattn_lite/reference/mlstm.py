r"""mLSTM: a matrix memory whose input gate is an exponential, so that one token can outshout a thousand.

What is read is divided by what a second memory, the normaliser, has counted. Both are kept times
:math:`e^{-m}`, where m follows the largest gate: the stabiliser changes no output, it only keeps every number
in range. Three forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, i, f, scale=None, initial_state=None):
    r"""mLSTM token by token: move the stabiliser, decay and write memory and normaliser, read, divide.

    .. math:: m_t = \max(\log\sigma(f_t) + m_{t-1},\; i_t), \qquad
        \alpha_t = e^{\log\sigma(f_t) + m_{t-1} - m_t}, \quad \beta_t = e^{i_t - m_t}
    .. math:: C_t = \alpha_t C_{t-1} + \beta_t k_t v_t^\top, \quad n_t = \alpha_t n_{t-1} + \beta_t k_t, \quad
        o_t = \frac{s\, C_t^\top q_t}{\max(|s\, n_t^\top q_t|,\; e^{-m_t})}

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        i: input gate before its exponential, [B, T, H]; any number: a token is written with weight e^i.
        f: forget gate before its sigmoid, [B, T, H]; any number: a step keeps the share sigmoid(f).
        scale: s; default K ** -0.5.
        initial_state: (C_0, n_0, m_0), [B, H, K, V], [B, H, K] and [B, H]; default zeros.

    Returns:
        o, [B, T, H, V], and (C_T, n_T, m_T): the memory itself is e^m C, the normaliser e^m n.

    Cost: B T H (5 K V + 5 K + 2 V + 15) FLOPs: decay 1, outer product 1, add 1, read 2 an entry of C, as much
    an entry of n; scale and division V each, gates 15.
    Source: Beck et al. 2024, arXiv:2405.04517. Differs: s stands at the read-out, not in the keys, so that C
    and n hold keys as they are; the output gate is the layer's; the forget gate is the paper's sigmoid.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    C, n, m = initial_state or (np.zeros((B, H, K, V)), np.zeros((B, H, K)), np.zeros((B, H)))
    o = np.zeros_like(v)
    for t in range(T):
        # m_t: the largest of the old stabiliser, faded, and the new token's gate
        log_f = -np.logaddexp(0, -f[:, t])  # [B, H]
        m_new = np.maximum(log_f + m, i[:, t])
        alpha, beta, m = np.exp(log_f + m - m_new), np.exp(i[:, t] - m_new), m_new
        # C_t = alpha_t C_{t-1} + beta_t k_t v_t^T, and n_t alike with 1 for v
        bk = beta[..., None] * k[:, t]  # [B, H, K]
        C = alpha[..., None, None] * C + np.einsum("bhk,bhv->bhkv", bk, v[:, t])
        n = alpha[..., None] * n + bk
        # o_t = s C_t^T q_t / max(|s n_t^T q_t|, e^-m_t): a bound of 1 on what is not kept times e^-m
        num = scale * np.einsum("bhk,bhkv->bhv", q[:, t], C)
        den = scale * np.einsum("bhk,bhk->bh", q[:, t], n)
        o[:, t] = num / np.maximum(np.abs(den), np.exp(-m))[..., None]
    return o, (C, n, m)


def parallel(q, k, v, *, i, f, scale=None, initial_state=None):
    r"""mLSTM for all tokens at once: scores times a gate mask, each row divided by its own sum.

    .. math:: F_t = \sum_{r \le t} \log\sigma(f_r), \qquad
        m_t = \max\bigl(F_t + m_0,\; \max_{j \le t} (F_t - F_j + i_j)\bigr), \qquad
        A_{tj} = s\, q_t^\top k_j\, e^{F_t - F_j + i_j - m_t}\,[t \ge j]
    .. math:: o_t = \frac{\sum_j A_{tj} v_j + \xi_t\, C_0^\top q_t}
        {\max(|\sum_j A_{tj} + \xi_t\, n_0^\top q_t|,\; e^{-m_t})}, \qquad \xi_t = s\,e^{F_t + m_0 - m_t}

    Args and returns: as `recurrent`.

    Cost: quadratic in T, B H (T^2 (2 K + 2 V + 8) + ...) FLOPs; `cost` has the rest.
    Source: Beck et al. 2024, arXiv:2405.04517. Differs: takes and returns a state.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    C, n, m0 = initial_state or (np.zeros((B, H, K, V)), np.zeros((B, H, K)), np.zeros((B, H)))
    i = i.swapaxes(1, 2)  # [B, H, T]
    F = np.cumsum(-np.logaddexp(0, -f.swapaxes(1, 2)), axis=-1)  # [B, H, T]
    t = np.arange(T)
    # the log of every weight, token j seen from t, and its largest: no exponent below is above 0
    log_D = np.where(
        t[:, None] >= t, F[..., None] - F[..., None, :] + i[..., None, :], -np.inf
    )  # [B, H, T, T]
    m = np.maximum(F + m0[..., None], log_D.max(-1))  # [B, H, T]
    A = scale * np.einsum("bthk,bjhk->bhtj", q, k) * np.exp(log_D - m[..., None])
    xi = scale * np.exp(F + m0[..., None] - m)
    # [T, T] @ [T, V] and [T, K] @ [K, V] -> [T, V]
    num = np.einsum("bhtj,bjhv->bhtv", A, v) + xi[..., None] * np.einsum("bthk,bhkv->bhtv", q, C)
    den = A.sum(-1) + xi * np.einsum("bthk,bhk->bht", q, n)
    o = num / np.maximum(np.abs(den), np.exp(-m))[..., None]
    # what the last token's row says of every token is what the state keeps of it
    end = m[..., -1:]
    bk = np.exp(F[..., -1:] - F + i - end)[..., None] * k.swapaxes(1, 2)  # [B, H, T, K]
    kept = np.exp(F[..., -1:] + m0[..., None] - end)  # [B, H, 1]
    C = kept[..., None] * C + np.einsum("bhtk,bthv->bhkv", bk, v)
    return o.swapaxes(1, 2), (C, kept * n + bk.sum(2), m[..., -1])


def chunkwise(q, k, v, *, i, f, scale=None, initial_state=None, chunk_size=16):
    r"""mLSTM a chunk at a time: parallel inside, with the state of the chunks before as one more token.

    .. math:: b_t = \sum_{r \le t} \log\sigma(f_r), \qquad
        m_t = \max\bigl(b_t + m,\; \max_{j \le t} (b_t - b_j + i_j)\bigr), \qquad
        (C, n) \leftarrow e^{b_n + m - m_n} (C, n) + \sum_j e^{b_n - b_j + i_j - m_n} k_j (v_j^\top, 1)

    for a chunk of n tokens that begins with the stabiliser m; the last chunk may be short. Outputs are those
    of the parallel form, sums over the chunk alone.

    Args and returns: as `recurrent`; chunk_size: C, tokens in a chunk.

    Cost: linear in T, B T H (C (2 K + 2 V + 8) + 4 K V + ...) FLOPs; `cost` has the rest.
    Source: Beck et al. 2024, arXiv:2405.04517, as chunks: Beck et al. 2025, arXiv:2503.14376.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    C, n, m = initial_state or (np.zeros((B, H, K, V)), np.zeros((B, H, K)), np.zeros((B, H)))
    o = np.zeros_like(v)
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        qc, kc, vc, ic = (x[:, part].swapaxes(1, 2) for x in (q, k, v, i))  # [B, H, C, K or V], [B, H, C]
        b = np.cumsum(-np.logaddexp(0, -f[:, part].swapaxes(1, 2)), axis=-1)
        t = np.arange(b.shape[-1])
        # 1 local gates: between two tokens, from the chunk's start, to the chunk's end
        log_D = np.where(t[:, None] >= t, b[..., None] - b[..., None, :] + ic[..., None, :], -np.inf)
        mt = np.maximum(b + m[..., None], log_D.max(-1))  # [B, H, C]
        xi, end = scale * np.exp(b + m[..., None] - mt), mt[..., -1]
        bk = np.exp(b[..., -1:] - b + ic - end[..., None])[..., None] * kc
        kept = np.exp(b[..., -1] + m - end)  # [B, H]
        # 2 intra-chunk: masked scores, [C, K] @ [K, C] -> [C, C]
        A = scale * np.einsum("bhik,bhjk->bhij", qc, kc) * np.exp(log_D - mt[..., None])
        # 4 inter-chunk: what earlier chunks left, [C, K] @ [K, V] -> [C, V]
        num = np.einsum("bhij,bhjv->bhiv", A, vc) + xi[..., None] * np.einsum("bhik,bhkv->bhiv", qc, C)
        den = A.sum(-1) + xi * np.einsum("bhik,bhk->bhi", qc, n)
        # 3 chunk state: what this chunk writes, [K, C] @ [C, V] -> [K, V]
        C = kept[..., None, None] * C + np.einsum("bhik,bhiv->bhkv", bk, vc)
        n, m = kept[..., None] * n + bk.sum(2), end
        # 5 output
        o[:, part] = (num / np.maximum(np.abs(den), np.exp(-mt))[..., None]).swapaxes(1, 2)
    return o, (C, n, m)


def step(q, k, v, *, i, f, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        i: input gate before its exponential, [B, H].
        f: forget gate before its sigmoid, [B, H].
        state: (C, n, m) of the tokens before.
        scale: s; default K ** -0.5.

    Returns:
        o, [B, H, V], and (C, n, m) after the token.

    Cost: B H (5 K V + 5 K + 2 V + 15) FLOPs.
    Source: Beck et al. 2024, arXiv:2405.04517.
    """
    o, state = recurrent(
        *(x[:, None] for x in (q, k, v)), i=i[:, None], f=f[:, None], scale=scale, initial_state=state
    )
    return o[:, 0], state


def cost(*, form, B, T, H, K, V, chunk_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v, i, f
    read once, o written once, the state written once in float32; nothing is spilled, since the state, or a
    tile of scores, stays on chip in every form.

    Args:
        form: "recurrent", "parallel" or "chunkwise".
        B, T, H, K, V: sizes.
        chunk_size: C of the chunkwise form.
        itemsize: bytes of an entry of q, k, v, i, f, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * (K * V + K + 1)
    size = {"recurrent": 1, "parallel": T, "chunkwise": chunk_size}[form]
    if form == "recurrent":
        flops = B * T * H * (5 * K * V + 5 * K + 2 * V + 15)
    else:
        chunks = [min(size, T - start) for start in range(0, T, size)]
        # scores, scale, mask of six passes, values, row sums; read, write and their gates; the state's decay
        flops = (
            B
            * H
            * sum(
                n * n * (2 * K + 2 * V + 8) + n * (4 * K * V + 4 * K + 3 * V + 20) + 2 * K * V + 2 * K + 3
                for n in chunks
            )
        )
    return {
        "flops": flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V + 2) + state_bytes,
        "state_bytes": state_bytes,
    }
