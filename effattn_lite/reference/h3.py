r"""H3: two state space models and two products, so that a model without attention can look something up.

The first is a shift register: it keeps the last M keys, and a learned weighting of them, :math:`\bar k_t`,
can put this token's value beside an earlier token's key. The second keeps their products:

.. math:: \bar k_t = \sum_{i < M} w_i \odot k_{t-i}, \qquad
    o_t = \Bigl(\sum_{j \le t} \kappa_{t-j}\, \bar k_j v_j^\top\Bigr)^\top q_t, \qquad
    \kappa_l = \operatorname{Re} \sum_m C_m \bar A_m^l \bar B_m

1. :math:`\kappa` is the impulse response of a diagonal state space model, M exponentials a head: its state
   holds M matrices, which all receive :math:`\bar k_t v_t^\top` and fade at rates of their own.
2. So H3 is linear attention whose decay is a sum of M decays, learned but the same at every token.
3. The rates are discretised by the bilinear rule:
   :math:`\bar A = (1 + \tfrac\Delta2 A) / (1 - \tfrac\Delta2 A)`,
   :math:`\bar B = \Delta / (1 - \tfrac\Delta2 A)`; the input map B is folded into C.
"""

import numpy as np


def recurrent(q, k, v, *, shift, dt, A, C, D=None, scale=None, initial_state=None):
    r"""H3 token by token: shift the register, weigh it, write its product with the value, read.

    .. math:: S_t^{(m)} = \bar A_m S_{t-1}^{(m)} + \bar B_m \bar k_t v_t^\top, \qquad
        o_t = s \Bigl(\operatorname{Re} \sum_m C_m S_t^{(m)} + D\, \bar k_t v_t^\top\Bigr)^\top q_t

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        shift: weights w of the last M keys, the token's own first, [H, K, M].
        dt: step size of a head, [H], > 0.
        A: rates of its M modes, [H, M], real part < 0, real or complex.
        C: weights of the modes, [H, M].
        D: weight of the token's own product, [H]; default 0.
        scale: s; default 1.
        initial_state: (last M keys, the newest first, [B, H, K, M]; modes [B, H, M, K, V]); default zeros.

    Returns:
        o, [B, T, H, V], and the state after token T.

    Cost: B T H (K V (5 M + 5) + 2 K M + V) FLOPs: weighting 2 K M; product 1, decay M, input M, sum M, read 2
    M, skip 2, product with q 2 an entry of a matrix; scale V. A complex number is one entry.
    Source: Fu et al. 2023, arXiv:2212.14052, and the released code. Differs: the code writes N for M; the
    skip of the shift is in its first weight.
    """
    B, T, H, K = q.shape
    scale, D = 1.0 if scale is None else scale, np.zeros(H) if D is None else D
    decay, write = discretise(dt, A)  # [H, M]
    shape = (B, H, A.shape[1], K, v.shape[-1])
    empty = np.zeros((B, H, K, A.shape[1])), np.zeros(shape, np.result_type(A, C))
    R, S = empty if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # the register moves on by one, the oldest key leaves
        R = np.concatenate((k[:, t, ..., None], R[..., :-1]), axis=-1)
        key = np.einsum("hkm,bhkm->bhk", shift, R)
        # S_t = A-bar S_{t-1} + B-bar k-bar v^T, for every mode
        kv = np.einsum("bhk,bhv->bhkv", key, v[:, t])
        S = decay[..., None, None] * S + write[..., None, None] * kv[:, :, None]
        # o_t = s (Re sum_m C_m S_t + D k-bar v^T)^T q_t
        seen = np.einsum("hm,bhmkv->bhkv", C, S).real + D[:, None, None] * kv
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], seen)
    return o, (R, S)


def parallel(q, k, v, *, shift, dt, A, C, D=None, scale=None, initial_state=None):
    r"""H3 for all tokens at once: scores times a learned function of the distance, no softmax.

    .. math:: O = s\,(Q \bar K^\top \odot \kappa)\, V + \text{what the state adds}, \qquad
        \kappa_{tj} = \operatorname{Re} \sum_m C_m \bar A_m^{t-j} \bar B_m + D\,[t = j] \quad (t \ge j)

    Args and returns: as `recurrent`.

    Cost: B H (2 T K M + T^2 (2 K + 2 V + 1) + 5 T M K V + 2 T M V + 2 M K V + 2 T V) FLOPs, quadratic in T.
    Source: the sum of Fu et al. 2023, arXiv:2212.14052, written as attention; there it is a long convolution.
    """
    B, T, H, K = q.shape
    M = A.shape[1]
    scale, D = 1.0 if scale is None else scale, np.zeros(H) if D is None else D
    decay, write = discretise(dt, A)  # [H, M]
    empty = np.zeros((B, H, K, M)), np.zeros((B, H, M, K, v.shape[-1]), np.result_type(A, C))
    R, S = empty if initial_state is None else initial_state
    # all keys, the register's first: k_{t-i} is at M + t - i
    text = np.concatenate((np.moveaxis(R[..., ::-1], -1, 1), k), axis=1)  # [B, M + T, H, K]
    t = np.arange(T)
    window = np.moveaxis(text[:, M + t[:, None] - np.arange(M)], 2, -1)  # [B, T, H, K, M]
    key = np.einsum("hkm,bthkm->bthk", shift, window)
    # kappa of every distance, then of every pair
    powers = decay ** np.arange(T + 1)[:, None, None]  # [T + 1, H, M]
    kappa = (powers[:T] * write * C).sum(-1).real + np.where(t[:, None] == 0, D, 0)  # [T, H]
    lag = t[:, None] - t
    table = np.where((lag >= 0)[..., None], kappa[np.maximum(lag, 0)], 0)  # [T, T, H]
    scores = np.moveaxis(table, -1, 0) * np.einsum("bthk,bjhk->bhtj", q, key)  # [T, K] @ [K, T]
    own = np.einsum("bhtj,bjhv->bthv", scores, v)  # [T, T] @ [T, V]
    # the state before the text has decayed t times when token t = 1..T reads it
    modes = np.einsum("bthk,bhmkv->bthmv", q, S)
    past = np.einsum("thm,bthmv->bthv", powers[1:] * C, modes).real
    left = np.einsum("thm,bthk,bthv->bhmkv", powers[T - 1 :: -1] * write, key, v)
    S = (decay**T)[..., None, None] * S + left
    R = np.moveaxis(text[:, : -M - 1 : -1], 1, -1)
    return scale * (own + past), (R, S)


def step(q, k, v, *, shift, dt, A, C, state, D=None, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        shift, dt, A, C, D, scale: as `recurrent`.
        state: (last M keys, [B, H, K, M]; modes, [B, H, M, K, V]).

    Returns:
        o, [B, H, V], and the state after the token.

    Cost: B H (K V (5 M + 5) + 2 K M + V) FLOPs.
    Source: Fu et al. 2023, arXiv:2212.14052.
    """
    token = (x[:, None] for x in (q, k, v))
    o, state = recurrent(*token, shift=shift, dt=dt, A=A, C=C, D=D, scale=scale, initial_state=state)
    return o[:, 0], state


def discretise(dt, A):
    r"""The bilinear rule for a diagonal: (1 + dt A / 2) / (1 - dt A / 2) and dt / (1 - dt A / 2).

    Args:
        dt: step sizes, [H].
        A: rates, [H, M].

    Returns:
        A-bar and B-bar, [H, M] each.
    """
    half = dt[:, None] / 2 * A
    return (1 + half) / (1 - half), dt[:, None] / (1 - half)


def cost(*, form, B, T, H, K, V, M, itemsize=2):
    """FLOPs, bytes and state bytes of one form, the skip D included.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data, complex or real;
    what is prepared from the parameters alone costs nothing. Bytes: q, k, v read once, o written once, the
    parameters read and the state written once in float32; complex modes take twice as much.

    Args:
        form: "recurrent" or "parallel".
        B, T, H, K, V, M: sizes.
        itemsize: bytes of an entry of q, k, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * (K * M + M * K * V)
    if form == "recurrent":
        flops = T * (K * V * (5 * M + 5) + 2 * K * M + V)
    else:
        # keys; scores, table and values; read 2 and 2, write 3; decay and sum the modes; sum, scale o
        flops = 2 * T * K * M + T * T * (2 * K + 2 * V + 1) + 5 * T * M * K * V + 2 * T * M * V
        flops += 2 * M * K * V + 2 * T * V
    moved = itemsize * B * T * H * (2 * K + 2 * V) + 4 * H * (K * M + 2 * M + 2)
    return {"flops": B * H * flops, "bytes": moved + state_bytes, "state_bytes": state_bytes}
