r"""RWKV-4: attention without queries; every channel averages its past with weights e^key that fade.

A channel's weights need no product of vectors, so its memory is two numbers: a weighted sum and the sum of
the weights. Both are kept times :math:`e^{-m}`, with m the largest exponent so far: no key can overflow. Two
forms compute the same output and the same final state.
"""

import numpy as np


def recurrent(k, v, *, g, u, initial_state=None):
    r"""RWKV-4 token by token: read the past with a bonus for the token itself, then fade and write.

    .. math:: o_t = \frac{A_{t-1} + e^{u + k_t} v_t}{B_{t-1} + e^{u + k_t}}, \qquad
        A_t = e^{g} A_{t-1} + e^{k_t} v_t, \qquad B_t = e^{g} B_{t-1} + e^{k_t}

    with :math:`A = a\,e^{m}` and :math:`B = b\,e^{m}`: a, b and m are what is stored, and
    :math:`m_t = \max(m_{t-1} + g,\; k_t)`.

    Args:
        k: keys, [B, T, D]: logarithms of weights.
        v: values, [B, T, D].
        g: log decay, [D], nats a token, <= 0.
        u: bonus of the current token, [D], added to its key.
        initial_state: (a, b, m), each [B, D]; default zeros, an empty past.

    Returns:
        o, [B, T, D], and (a_T, b_T, m_T), each [B, D].

    Cost: 23 B T D FLOPs: 12 to read, 11 to write.
    Source: Peng et al. 2023, arXiv:2305.13048. Differs: the paper writes -w for g.
    """
    B, T, D = k.shape
    a, b, m = np.zeros((3, B, D)) if initial_state is None else initial_state
    m = np.where(b > 0, m, -np.inf)  # an empty past has no largest exponent
    o = np.zeros_like(v)
    for t in range(T):
        kt, vt = k[:, t], v[:, t]
        # read: relative to the largest exponent, past or own; exp of numbers <= 0
        here = u + kt
        top = np.maximum(m, here)
        past, own = np.exp(m - top), np.exp(here - top)
        o[:, t] = (past * a + own * vt) / (past * b + own)
        # write: a bonus is for the reader alone
        faded = m + g
        top = np.maximum(faded, kt)
        past, own = np.exp(faded - top), np.exp(kt - top)
        a, b, m = past * a + own * vt, past * b + own, top
    return o, (a, b, m)


def parallel(k, v, *, g, u, initial_state=None):
    r"""RWKV-4 for all tokens at once: a softmax over the past, channel by channel.

    .. math:: o_t = \sum_{j \le t} \operatorname{softmax}_j(E_{tj})\, v_j, \qquad
        E_{tj} = k_j + g\,(t - 1 - j) \;\; (j < t), \qquad E_{tt} = k_t + u

    A carried state counts as one more token, with weight b, value a / b and exponent m + g (t - 1).

    Args:
        k: keys, [B, T, D].
        v: values, [B, T, D].
        g: log decay, [D], nats a token, <= 0.
        u: bonus of the current token, [D].
        initial_state: (a, b, m), each [B, D]; default zeros.

    Returns:
        o, [B, T, D], and (a_T, b_T, m_T), each [B, D].

    Cost: B D (7 T^2 + 16 T + 8) FLOPs, quadratic in T, and a table of B T^2 D numbers.
    Source: Peng et al. 2023, arXiv:2305.13048. Differs: takes and returns a state.
    """
    B, T, D = k.shape
    a, b, m = np.zeros((3, B, D)) if initial_state is None else initial_state
    m = np.where(b > 0, m, -np.inf)  # an empty past has no largest exponent
    a, b, m = a[:, None], b[:, None], m[:, None]  # [B, 1, D]
    t = np.arange(T)[:, None]
    lag = (t - t.T)[..., None]  # [T, T, 1]
    # E_tj, and that of the carried state
    bias = np.where(lag > 0, g * (lag - 1), np.where(lag == 0, u, -np.inf))  # [T, T, D]
    E, carried = k[:, None] + bias, m + g * t  # [B, T, T, D], [B, T, D]
    top = np.maximum(np.max(E, axis=2), carried)
    weight, past = np.exp(E - top[:, :, None]), np.exp(carried - top)
    # [T, T] @ [T] -> [T], channel by channel
    o = np.einsum("btjd,bjd->btd", weight, v) + past * a
    o = o / (np.sum(weight, axis=2) + past * b)
    # the state after the last token: no bonus, and every exponent relative to that token
    E, carried = k + g * (T - 1 - t), m + g * T  # [B, T, D], [B, 1, D]
    top = np.maximum(np.max(E, axis=1, keepdims=True, initial=-np.inf), carried)
    weight, past = np.exp(E - top), np.exp(carried - top)
    a = past * a + np.sum(weight * v, axis=1, keepdims=True)
    b = past * b + np.sum(weight, axis=1, keepdims=True)
    return o, (a[:, 0], b[:, 0], top[:, 0])


def step(k, v, *, g, u, state):
    r"""One token: the recurrence's body.

    Args:
        k: key, [B, D].
        v: value, [B, D].
        g: log decay, [D], nats, <= 0.
        u: bonus of the current token, [D].
        state: (a, b, m), each [B, D].

    Returns:
        o, [B, D], and (a, b, m) after the token, each [B, D].

    Cost: 23 B D FLOPs.
    Source: Peng et al. 2023, arXiv:2305.13048.
    """
    o, state = recurrent(k[:, None], v[:, None], g=g, u=u, initial_state=state)
    return o[:, 0], state


def cost(*, form, B, T, D, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: k and v read
    once, o written once, g and u read and the state written once in float32; nothing is spilled, since a
    channel's numbers stay on chip in both forms.

    Args:
        form: "recurrent" or "parallel".
        B, T, D: sizes.
        itemsize: bytes of an entry of k, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    # a pair: bias, maximum, difference, exp, multiply-add, sum
    flops = {"recurrent": 23 * T, "parallel": 7 * T * T + 16 * T + 8}[form]
    state_bytes = 3 * 4 * B * D
    return {
        "flops": B * D * flops,
        "bytes": 3 * itemsize * B * T * D + 2 * 4 * D + state_bytes,
        "state_bytes": state_bytes,
    }
