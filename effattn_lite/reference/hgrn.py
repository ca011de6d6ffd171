r"""HGRN: every channel is a leaky sum with a leak that the text sets; a gated recurrence without a matrix.

The state is one number a channel. Its decay :math:`e^{g_t}` comes from the token alone, not from the state,
so all steps are linear and any two of them are one: that makes a scan. Three forms compute the same output
and the same final state.
"""

import numpy as np


def recurrent(x, *, g, initial_state=None):
    r"""HGRN token by token: decay each channel, add its input.

    .. math:: h_t = e^{g_t} \odot h_{t-1} + x_t

    Args:
        x: inputs, [B, T, D]; the method writes what it does not keep, x = (1 - e^g) c.
        g: log decay, [B, T, D], nats a token, <= 0; 0 keeps the channel.
        initial_state: h_0, [B, D]; default zeros.

    Returns:
        o, which is h itself, [B, T, D], and h_T, [B, D].

    Cost: 3 B T D FLOPs: exp, decay, add.
    Source: Qin et al. 2023, arXiv:2311.04823. Differs: real, where the paper's channels turn by a fixed
    angle a token as well; the factor 1 - e^g is the caller's.
    """
    B, T, D = x.shape
    h = np.zeros((B, D)) if initial_state is None else initial_state
    o = np.zeros_like(x)
    for t in range(T):
        # h_t = e^(g_t) h_{t-1} + x_t
        h = np.exp(g[:, t]) * h + x[:, t]
        o[:, t] = h
    return o, h


def parallel(x, *, g, initial_state=None):
    r"""HGRN for all tokens at once: each channel has its own triangle of decays.

    .. math:: h_t = \sum_{j \le t} e^{G_t - G_j} \odot x_j + e^{G_t} \odot h_0, \qquad
        G_t = \sum_{r \le t} g_r

    Args:
        x: inputs, [B, T, D].
        g: log decay, [B, T, D], nats a token, <= 0.
        initial_state: h_0, [B, D]; default zeros.

    Returns:
        o, [B, T, D], and h_T, [B, D].

    Cost: B D (4 T^2 + 4 T) FLOPs, quadratic in T, and a table of B T^2 D numbers.
    Source: Qin et al. 2023, arXiv:2311.04823. Differs: takes and returns a state.
    """
    B, T, D = x.shape
    h = np.zeros((B, D)) if initial_state is None else initial_state
    G = np.cumsum(g, axis=1)  # [B, T, D]
    t = np.arange(T)
    seen = (t[:, None] >= t)[:, :, None]
    # e^(G_t - G_j) on and below the diagonal, 0 above; exp of a difference <= 0: cannot overflow
    decay = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf))  # [B, T, T, D]
    # [T, T] @ [T] -> [T], channel by channel
    o = np.einsum("btjd,bjd->btd", decay, x) + np.exp(G) * h[:, None]
    return o, o[:, -1].copy() if T else h


def scan(x, *, g, initial_state=None):
    r"""HGRN in log2 T steps: after step i every token knows the sum over its last 2^i tokens.

    Two stretches of text, each summed up by its decay a and its end h, join into one:

    .. math:: (a, h) \bullet (a', h') = (a' a,\; a' h + h')

    Args:
        x: inputs, [B, T, D].
        g: log decay, [B, T, D], nats a token, <= 0.
        initial_state: h_0, [B, D]; default zeros.

    Returns:
        o, [B, T, D], and h_T, [B, D].

    Cost: B D (T + 2 + 3 sum_i (T - 2^i)) FLOPs over the log2 T steps i: more work, fewer steps.
    Source: Hillis and Steele 1986, Data parallel algorithms, for the steps; the recurrence is that of Qin et
    al. 2023, arXiv:2311.04823.
    """
    B, T, D = x.shape
    h0 = np.zeros((B, D)) if initial_state is None else initial_state
    a, h = np.exp(g), x.copy()
    # the state before the text enters with the first token
    h[:, :1] = h[:, :1] + a[:, :1] * h0[:, None]
    reach = 1
    while reach < T:
        near, far = slice(reach, None), slice(None, -reach)
        joined = a[:, near] * h[:, far] + h[:, near]
        a = np.concatenate((a[:, :reach], a[:, near] * a[:, far]), axis=1)
        h = np.concatenate((h[:, :reach], joined), axis=1)
        reach *= 2
    return h, h[:, -1].copy() if T else h0


def step(x, *, g, state):
    r"""One token: the recurrence's body.

    Args:
        x: input, [B, D].
        g: log decay, [B, D], nats, <= 0.
        state: h_{t-1}, [B, D].

    Returns:
        o, [B, D], and h_t, [B, D], which are equal.

    Cost: 3 B D FLOPs.
    Source: Qin et al. 2023, arXiv:2311.04823.
    """
    h = np.exp(g) * state + x
    return h, h


def cost(*, form, B, T, D, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: x and g read
    once, o written once, h_T written once in float32; nothing is spilled, since a channel's numbers stay on
    chip in every form.

    Args:
        form: "recurrent", "parallel" or "scan".
        B, T, D: sizes.
        itemsize: bytes of an entry of x, g, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    reaches = [2**i for i in range(max(T - 1, 0).bit_length())]
    flops = {
        "recurrent": 3 * T,
        # a difference, an exp, a multiply-add a pair; cumsum, exp, decay and sum a token
        "parallel": 4 * T * T + 4 * T,
        "scan": T + 2 + 3 * sum(T - reach for reach in reaches),
    }[form]
    state_bytes = 4 * B * D
    return {
        "flops": B * D * flops,
        "bytes": 3 * itemsize * B * T * D + state_bytes,
        "state_bytes": state_bytes,
    }
