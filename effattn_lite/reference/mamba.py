r"""Mamba: a state space model a channel, whose step size, input map and output map follow from the token.

Every channel d keeps M numbers, each with a rate :math:`A_{dm} < 0` of its own. A large step :math:`\Delta_t`
forgets and writes, a step of 0 leaves the state as it was: the token itself says whether it is remembered.
With :math:`\Delta`, B and C constant it is a linear time-invariant model, and a convolution.

The rates are discretised exactly (zero-order hold), the input by Euler's rule: B enters as
:math:`\Delta_t B_t` and not as :math:`A^{-1}(e^{\Delta_t A} - 1)B_t`. Two forms compute the same output and
the same final state.
"""

import numpy as np


def recurrent(x, dt, A, B, C, *, D=None, scale=None, initial_state=None):
    r"""Selective scan token by token: fade, write, read.

    .. math:: h_t = e^{\Delta_t A} \odot h_{t-1} + (\Delta_t \odot x_t)\, B_t^\top, \qquad
        y_t = s\, h_t C_t + D \odot x_t

    Args:
        x: inputs, [B, T, D].
        dt: step sizes, [B, T, D], >= 0.
        A: rates of decay, [D, M], < 0, nats a unit of dt.
        B: what a token writes to the states of every channel, [B, T, M].
        C: what it reads from them, [B, T, M].
        D: weight of the input in the output, [D]; default 0.
        scale: s; default 1.
        initial_state: h_0, [B, D, M]; default zeros.

    Returns:
        y, [B, T, D], and h_T, [B, D, M].

    Cost: B T (7 D M + 4 D) FLOPs: exponent 1, exponential 1, fade 1, outer product 1, add 1, read 2 an entry
    of the state; dt x, scale and skip 4 a channel.
    Source: Gu and Dao 2023, arXiv:2312.00752; B by Euler's rule as in the released code. Differs: the paper
    writes N for M.
    """
    scale = 1.0 if scale is None else scale
    h = np.zeros((len(x), *A.shape)) if initial_state is None else initial_state
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        # h_t = e^(dt A) h_{t-1} + dt x B^T, [B, D, M]
        keep = np.exp(dt[:, t, :, None] * A)
        h = keep * h + np.einsum("bd,bm->bdm", dt[:, t] * x[:, t], B[:, t])
        # y_t = s h_t C_t: the token just written is read too
        y[:, t] = scale * np.einsum("bdm,bm->bd", h, C[:, t])
    return y if D is None else y + D * x, h


def scan(x, dt, A, B, C, *, D=None, scale=None, initial_state=None):
    r"""Selective scan for all tokens at once: pairs (factor, write) are joined, the distance doubles.

    .. math:: (a, b) \text{ after } (a', b') = (a\, a',\; a\, b' + b), \qquad
        a_t = e^{\Delta_t A}, \quad b_t = (\Delta_t \odot x_t)\, B_t^\top

    Joining is associative, so after the pass with lag 1, 2, 4, ... entry t covers the last 2, 4, 8, ...
    tokens. No quotient of decays is formed: a strong one underflows to 0, which is its answer.

    Args and returns: as `recurrent`.

    Cost: B (T (5 D M + 4 D) + 2 D M + 3 D M sum (T - lag)) FLOPs over the lags 1, 2, 4, ... < T: about
    3 log2(T) an entry and token; T states are held at once.
    Source: Hillis and Steele 1986, Data parallel algorithms, for the recurrence of Gu and Dao 2023,
    arXiv:2312.00752.
    """
    scale = 1.0 if scale is None else scale
    h = np.zeros((len(x), *A.shape)) if initial_state is None else initial_state
    a = np.exp(dt[..., None] * A)  # [B, T, D, M]
    b = np.einsum("btd,btm->btdm", dt * x, B)
    # the first token takes the state along
    b[:, 0] += a[:, 0] * h
    lag = 1
    while lag < x.shape[1]:
        # the right sides are old: a product is made before it is stored
        b[:, lag:] += a[:, lag:] * b[:, :-lag]
        a[:, lag:] = a[:, lag:] * a[:, :-lag]
        lag *= 2
    # b_t is h_t
    y = scale * np.einsum("btdm,btm->btd", b, C)
    return y if D is None else y + D * x, b[:, -1]


def step(x, dt, A, B, C, *, state, D=None, scale=None):
    r"""One token: the recurrence's body.

    Args:
        x: input, [B, D].
        dt: step size, [B, D], >= 0.
        A: rates of decay, [D, M], < 0.
        B, C: what the token writes and reads, [B, M].
        state: h_{t-1}, [B, D, M].
        D: weight of the input in the output, [D]; default 0.
        scale: s; default 1.

    Returns:
        y, [B, D], and h_t, [B, D, M].

    Cost: B (7 D M + 4 D) FLOPs.
    Source: Gu and Dao 2023, arXiv:2312.00752.
    """
    scale = 1.0 if scale is None else scale
    h = np.exp(dt[..., None] * A) * state + np.einsum("bd,bm->bdm", dt * x, B)
    y = scale * np.einsum("bdm,bm->bd", h, C)
    return y if D is None else y + D * x, h


def cost(*, form, B, T, D, M, itemsize=2):
    """FLOPs, bytes and state bytes of one form, the skip D x included.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: x, B, C read
    once, y written once, dt, A and D read and h_T written once in float32; nothing is spilled, since the
    state, or a tile of pairs, stays on chip in either form.

    Args:
        form: "recurrent" or "scan".
        B, T, D, M: sizes.
        itemsize: bytes of an entry of x, B, C, y.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * D * M
    if form == "recurrent":
        flops = T * (7 * D * M + 4 * D)
    else:
        lags = [2**n for n in range(T.bit_length()) if 2**n < T]
        # factor 2, write 1, read 2; the first token 2; a pass joins T - lag pairs with 3 an entry
        flops = T * (5 * D * M + 4 * D) + 2 * D * M + 3 * D * M * sum(T - lag for lag in lags)
    moved = itemsize * B * T * (2 * D + 2 * M) + 4 * (B * T * D + D * M + D)
    return {"flops": B * flops, "bytes": moved + state_bytes, "state_bytes": state_bytes}
