r"""Attention with bounded-memory control: every slot is a running average of all tokens, softly chosen.

How much of a token goes to a slot is a softmax over the text so far, and what a query reads is a softmax over
the slots. The average needs the sum of its weights; its logarithm z is carried, so no weight overflows. Two
forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, s, scale=None, initial_state=None):
    r"""ABC token by token: move every slot's average towards the token, then attend to the slots.

    .. math:: z_t = \ln\bigl(e^{z_{t-1}} + e^{s_t}\bigr), \qquad
        w_t = e^{s_t - z_t}, \qquad
        \tilde K_t = \tilde K_{t-1} \operatorname{Diag}(1 - w_t) + k_t w_t^\top, \qquad
        \tilde V_t = \operatorname{Diag}(1 - w_t)\, \tilde V_{t-1} + w_t v_t^\top
    .. math:: o_t = \tilde V_t^\top \operatorname{softmax}(s\, \tilde K_t^\top q_t)

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        s: control, [B, T, H, M]: logarithms of the weights with which a token enters the slots' averages.
        scale: of the scores; default K ** -0.5.
        initial_state: (K~_0, V~_0, z_0, c_0), [B, H, K, M], [B, H, M, V], [B, H, M] and [B, H]: the averages,
            the log of the sum of their weights, and of how many tokens; default zeros, an empty memory.

    Returns:
        o, [B, T, H, V], and (K~_T, V~_T, z_T, c_T).

    Cost: B T H (M (5 K + 5 V + 11) + 1) FLOPs: decay 1, outer product 1, add 1, read 2 an entry of each
    average; of a slot 5 for its weight, scale and 5 for the softmax; a count.
    Source: Peng et al. 2022, arXiv:2110.02488. Differs: the scores are scaled.
    """
    B, T, H, K = q.shape
    V, M = v.shape[-1], s.shape[-1]
    scale = K**-0.5 if scale is None else scale
    Sk, Sv, z, c = initial_state or [np.zeros((B, H, *n)) for n in ((K, M), (M, V), (M,), ())]
    z = np.where(c[..., None] > 0, z, -np.inf)  # an empty memory has no weight
    o = np.zeros_like(v)
    for t in range(T):
        # w_t: the token's share of all weights so far; exp of numbers <= 0
        past, z = z, np.logaddexp(z, s[:, t])
        keep, w = np.exp(past - z), np.exp(s[:, t] - z)  # [B, H, M]
        Sk = keep[..., None, :] * Sk + np.einsum("bhk,bhm->bhkm", k[:, t], w)
        Sv = keep[..., None] * Sv + np.einsum("bhm,bhv->bhmv", w, v[:, t])
        # softmax over M slots, not over t tokens
        x = scale * np.einsum("bhk,bhkm->bhm", q[:, t], Sk)
        p = np.exp(x - x.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
        o[:, t] = np.einsum("bhm,bhmv->bhv", p, Sv)
        c = c + 1
    return o, (Sk, Sv, z, c)


def parallel(q, k, v, *, s, scale=None, initial_state=None):
    r"""ABC for all tokens at once: the slots' weights are one softmax over the text, cut off at every token.

    .. math:: P_{tjm} = e^{s_{jm} - z_{tm}}\,[t \ge j], \qquad
        x_{tm} = s \sum_j (q_t^\top k_j)\, P_{tjm}, \qquad
        o_t = \sum_j \Bigl(\sum_m \operatorname{softmax}(x_t)_m P_{tjm}\Bigr) v_j, \qquad
        z_t = \ln \sum_{j \le t} e^{s_j}

    A carried state counts as one more token, with control z_0, keys K~_0 and values V~_0.

    Args and returns: as `recurrent`.

    Cost: B H (T^2 (2 K + 2 V + 6 M) + ...) FLOPs, quadratic in T; `cost` has the rest.
    Source: Peng et al. 2022, arXiv:2110.02488. Differs: as `recurrent`; takes and returns a state.
    """
    B, T, H, K = q.shape
    V, M = v.shape[-1], s.shape[-1]
    scale = K**-0.5 if scale is None else scale
    Sk, Sv, z, c = initial_state or [np.zeros((B, H, *n)) for n in ((K, M), (M, V), (M,), ())]
    z = np.where(c[..., None] > 0, z, -np.inf)[:, None]  # [B, 1, H, M]
    zt = np.logaddexp(z, np.logaddexp.accumulate(s, axis=1))  # [B, T, H, M]
    t = np.arange(T)
    seen = (t[:, None] >= t)[:, :, None, None]
    # exp of numbers <= 0: no weight is larger than the sum that it is in
    P = np.exp(np.where(seen, s[:, None] - zt[:, :, None], -np.inf))  # [B, T, T, H, M]
    past = np.exp(z - zt)
    # first pass: scores of the slots; [T, T] @ [T] -> [T], slot by slot
    x = np.einsum("btjh,btjhm->bthm", np.einsum("bthk,bjhk->btjh", q, k), P)
    x = scale * (x + past * np.einsum("bthk,bhkm->bthm", q, Sk))
    p = np.exp(x - x.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    # second pass: values of the slots, [T, T] @ [T, V] -> [T, V]
    o = np.einsum("btjh,bjhv->bthv", np.einsum("bthm,btjhm->btjh", p, P), v)
    o = o + np.einsum("bthm,bhmv->bthv", p * past, Sv)
    # the last token's row of P is what is left of every token
    w, keep = P[:, -1], past[:, -1]
    Sk = keep[..., None, :] * Sk + np.einsum("bthk,bthm->bhkm", k, w)
    Sv = keep[..., None] * Sv + np.einsum("bthm,bthv->bhmv", w, v)
    return o, (Sk, Sv, zt[:, -1], c + T)


def step(q, k, v, *, s, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        s: control, [B, H, M].
        state: (K~, V~, z, c) of the tokens before.
        scale: of the scores; default K ** -0.5.

    Returns:
        o, [B, H, V], and (K~, V~, z, c) after the token.

    Cost: B H (M (5 K + 5 V + 11) + 1) FLOPs.
    Source: Peng et al. 2022, arXiv:2110.02488.
    """
    tokens = (x[:, None] for x in (q, k, v))
    o, state = recurrent(*tokens, s=s[:, None], scale=scale, initial_state=state)
    return o[:, 0], state


def cost(*, form, B, T, H, K, V, M, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data; the table P is data,
    and so is the half of it that a mask throws away. Bytes: q, k, v, s read once, o written once, the state
    written once in float32; nothing is spilled, since the averages, or a tile of scores, stay on chip.

    Args:
        form: "recurrent" or "parallel".
        B, T, H, K, V, M: sizes.
        itemsize: bytes of an entry of q, k, v, s, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * (M * (K + V + 1) + 1)
    if form == "recurrent":
        flops = T * (M * (5 * K + 5 * V + 11) + 1)
    else:
        # q k and its sum with P; P: difference, exp; p P, and its sum with v
        pairs = T * T * (2 * K + 2 * V + 6 * M)
        flops = pairs + T * (4 * M * (K + V) + 13 * M + V) + M * (2 * K + 2 * V) + 1
    return {
        "flops": B * H * flops,
        "bytes": itemsize * B * T * H * (2 * K + 2 * V + M) + state_bytes,
        "state_bytes": state_bytes,
    }
