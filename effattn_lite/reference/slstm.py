r"""sLSTM: an LSTM whose input gate is an exponential, with a normaliser beside the cell.

A gate of e^10 revises what a thousand gates of e^0 stored; the normaliser divides the loudness out again,
and a running maximum m keeps all exponentials within range. Every gate also sees the last output, through one
matrix a head: that is what lets it count, and why no form but the sequential one exists.
"""

import numpy as np


def recurrent(z, *, i, f, o, r_z, r_i, r_f, r_o, initial_state=None):
    r"""sLSTM token by token: mix the last output into all gates, fade, write, normalise.

    .. math:: \hat x_t = x_t + R_x^\top h_{t-1} \;\text{ for } x = z, i, f, o, \qquad
        m_t = \max(\log\sigma(\hat f_t) + m_{t-1},\; \hat i_t)

    .. math:: c_t = f'_t\, c_{t-1} + i'_t \tanh \hat z_t, \qquad n_t = f'_t\, n_{t-1} + i'_t, \qquad
        h_t = \sigma(\hat o_t) \odot c_t / n_t

    with :math:`i'_t = e^{\hat i_t - m_t}` and :math:`f'_t = e^{\log\sigma(\hat f_t) + m_{t-1} - m_t}`.

    Args:
        z: cell input before its tanh and without its recurrent part, [B, T, H, V].
        i: input gate before its exponential, likewise, [B, T, H, V].
        f: forget gate before its sigmoid, [B, T, H, V].
        o: output gate before its sigmoid, [B, T, H, V].
        r_z, r_i, r_f, r_o: recurrent weights of a head, [H, V, V], from the last output to each of the four.
        initial_state: (c, n, h, m), each [B, H, V]; default zeros, an empty past.

    Returns:
        h, [B, T, H, V], and (c_T, n_T, h_T, m_T), each [B, H, V].

    Cost: B T H (8 V^2 + 23 V) FLOPs.
    Source: Beck et al. 2024, arXiv:2405.04517, with the forget gate a sigmoid, as in the released code; the
    paper allows an exponential too. Differs: a bias is part of what is passed in.
    """
    c, n, h, m = np.zeros((4, *z[:, 0].shape)) if initial_state is None else initial_state
    m = np.where(n > 0, m, -np.inf)  # an empty past has no exponent
    y = np.zeros_like(z)
    for t in range(z.shape[1]):
        # all four see the last output: [V] @ [V, V] -> [V]
        zt = z[:, t] + np.einsum("bhv,hvw->bhw", h, r_z)
        it = i[:, t] + np.einsum("bhv,hvw->bhw", h, r_i)
        ft = f[:, t] + np.einsum("bhv,hvw->bhw", h, r_f)
        ot = o[:, t] + np.einsum("bhv,hvw->bhw", h, r_o)
        # log sigmoid(f) + m, and the larger of old and new exponent
        faded = m - np.logaddexp(0, -ft)
        m = np.maximum(faded, it)
        # exp of numbers <= 0, one of them 0: the normaliser is at least 1
        past, own = np.exp(faded - m), np.exp(it - m)
        c, n = past * c + own * np.tanh(zt), past * n + own
        h = c / (n * (1 + np.exp(-ot)))
        y[:, t] = h
    return y, (c, n, h, m)


def step(z, *, i, f, o, r_z, r_i, r_f, r_o, state):
    r"""One token: the recurrence's body.

    Args:
        z, i, f, o: cell input and gates before their activations, [B, H, V].
        r_z, r_i, r_f, r_o: recurrent weights, [H, V, V].
        state: (c, n, h, m), each [B, H, V].

    Returns:
        h, [B, H, V], and (c, n, h, m) after the token, each [B, H, V].

    Cost: B H (8 V^2 + 23 V) FLOPs.
    Source: Beck et al. 2024, arXiv:2405.04517.
    """
    gates = dict(i=i[:, None], f=f[:, None], o=o[:, None])
    weights = dict(r_z=r_z, r_i=r_i, r_f=r_f, r_o=r_o)
    y, state = recurrent(z[:, None], **gates, **weights, initial_state=state)
    return y[:, 0], state


def cost(*, form, B, T, H, V, itemsize=2):
    """FLOPs, bytes and state bytes.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: z, i, f, o
    read once, h written once, the recurrent weights read once, since they stay on chip, and the state written
    once in float32.

    Args:
        form: "recurrent".
        B, T, H, V: sizes.
        itemsize: bytes of an entry of z, i, f, o, the weights and h.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    per_token = {"recurrent": H * (8 * V * V + 23 * V)}[form]
    state_bytes = 4 * 4 * B * H * V
    return {
        "flops": B * T * per_token,
        "bytes": itemsize * (5 * B * T * H * V + 4 * H * V * V) + state_bytes,
        "state_bytes": state_bytes,
    }
