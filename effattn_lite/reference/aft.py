r"""AFT: attention without a product of queries and keys; every channel averages values by its own keys.

In the simple form a key alone sets a weight, the same for every later reader: two running sums a channel are
the whole memory. In the full form a learned bias for every pair of positions joins it: no state of fixed size
remains, and the cost is quadratic. Two forms of AFT-simple compute the same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, initial_state=None):
    r"""AFT-simple token by token: write, average, gate.

    .. math:: A_t = A_{t-1} + e^{k_t} v_t, \qquad B_t = B_{t-1} + e^{k_t}, \qquad
        o_t = \sigma(q_t) \odot A_t / B_t

    with :math:`A = a\,e^{m}` and :math:`B = b\,e^{m}`: a, b and m are what is stored, and
    :math:`m_t = \max(m_{t-1}, k_t)`.

    Args:
        q: queries, [B, T, D]: gates of the output.
        k: keys, [B, T, D]: logarithms of weights.
        v: values, [B, T, D].
        initial_state: (a, b, m), each [B, D]; default zeros, an empty past.

    Returns:
        o, [B, T, D], and (a_T, b_T, m_T), each [B, D].

    Cost: 15 B T D FLOPs: 10 to write, 5 to read.
    Source: Zhai et al. 2021, arXiv:2105.14103. Differs: causal, and a state is carried.
    """
    B, T, D = k.shape
    a, b, m = np.zeros((3, B, D)) if initial_state is None else initial_state
    m = np.where(b > 0, m, -np.inf)  # an empty past has no largest exponent
    o = np.zeros_like(v)
    for t in range(T):
        # write, relative to the largest key so far: exp of numbers <= 0
        top = np.maximum(m, k[:, t])
        past, own = np.exp(m - top), np.exp(k[:, t] - top)
        a, b, m = past * a + own * v[:, t], past * b + own, top
        # o_t = sigma(q_t) A_t / B_t
        o[:, t] = a / (b * (1 + np.exp(-q[:, t])))
    return o, (a, b, m)


def parallel(q, k, v, *, initial_state=None):
    r"""AFT-simple for all tokens at once: a softmax over the keys of the past, channel by channel.

    .. math:: o_t = \sigma(q_t) \odot \sum_{j \le t} \operatorname{softmax}_{j}(k_j)\, v_j

    A carried state counts as one more token, with weight b, value a / b and key m.

    Args and returns: as `recurrent`.

    Cost: B D (6 T^2 + 12 T) FLOPs, quadratic in T, and a table of B T^2 D numbers.
    Source: Zhai et al. 2021, arXiv:2105.14103. Differs: causal, and a state is carried.
    """
    B, T, D = k.shape
    a, b, m = np.zeros((3, B, D)) if initial_state is None else initial_state
    m = np.where(b > 0, m, -np.inf)[:, None]  # [B, 1, D]
    t = np.arange(T)
    E = np.where((t[:, None] >= t)[:, :, None], k[:, None], -np.inf)  # [B, T, T, D]
    top = np.maximum(np.max(E, axis=2), m)
    weight, past = np.exp(E - top[:, :, None]), np.exp(m - top)
    # [T, T] @ [T] -> [T], channel by channel
    A = np.einsum("btjd,bjd->btd", weight, v) + past * a[:, None]
    total = np.sum(weight, axis=2) + past * b[:, None]
    o = A / (total * (1 + np.exp(-q)))
    return o, (A[:, -1].copy(), total[:, -1].copy(), top[:, -1].copy())


def full(q, k, v, *, w):
    r"""AFT-full: a learned bias for every pair of positions joins the key.

    .. math:: o_t = \sigma(q_t) \odot
        \frac{\sum_{j \le t} e^{k_j + w_{tj}} \odot v_j}{\sum_{j \le t} e^{k_j + w_{tj}}}

    Args:
        q: queries, [B, T, D].
        k: keys, [B, T, D].
        v: values, [B, T, D].
        w: position biases, [P, P] with P >= T; of them the first T rows and columns count.

    Returns:
        o, [B, T, D], and lse, [B, T, D]: logarithms of the denominators.

    Cost: B D (7 T^2 + 7 T) FLOPs, and a table of B T^2 D numbers.
    Source: Zhai et al. 2021, arXiv:2105.14103. Differs: causal.
    """
    T = k.shape[1]
    t = np.arange(T)
    bias = np.where(t[:, None] >= t, w[:T, :T], -np.inf)[..., None]  # [T, T, 1]
    E = k[:, None] + bias  # [B, T, T, D]
    top = np.max(E, axis=2)
    weight = np.exp(E - top[:, :, None])
    total = np.sum(weight, axis=2)
    # [T, T] @ [T] -> [T], channel by channel
    o = np.einsum("btjd,bjd->btd", weight, v) / (total * (1 + np.exp(-q)))
    return o, top + np.log(total)


def step(q, k, v, *, state):
    r"""One token of AFT-simple: the recurrence's body.

    Args:
        q: query, [B, D].
        k: key, [B, D].
        v: value, [B, D].
        state: (a, b, m), each [B, D].

    Returns:
        o, [B, D], and (a, b, m) after the token, each [B, D].

    Cost: 15 B D FLOPs.
    Source: Zhai et al. 2021, arXiv:2105.14103.
    """
    o, state = recurrent(q[:, None], k[:, None], v[:, None], initial_state=state)
    return o[:, 0], state


def cost(*, form, B, T, D, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k and v
    read once, o written once, and in float32 the state, or w, once; nothing is spilled, since a channel's
    numbers stay on chip in every form.

    Args:
        form: "recurrent", "parallel" or "full".
        B, T, D: sizes.
        itemsize: bytes of an entry of q, k, v, o.

    Returns:
        dict of "flops", "bytes", "state_bytes"; what decoding keeps of the full form is all keys and values.
    """
    flops = {"recurrent": 15 * T, "parallel": 6 * T * T + 12 * T, "full": 7 * T * T + 7 * T}[form]
    tokens = itemsize * B * T * D
    state_bytes = 2 * tokens if form == "full" else 3 * 4 * B * D
    return {
        "flops": B * D * flops,
        "bytes": 4 * tokens + (4 * T * T if form == "full" else state_bytes),
        "state_bytes": state_bytes,
    }
