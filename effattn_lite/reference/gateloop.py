r"""GateLoop: a gated memory whose channels turn as well as fade, both as the text says.

A channel's transition is a complex number, :math:`e^{g_t + i\theta_t}`: g shortens, theta turns. Between two
tokens lie the sum of the g and the sum of the theta, so a score decays with what was read between them, and
swings with it: a rotary position whose clock the text drives. Three forms compute the same output and the
same final state.
"""

import numpy as np


def recurrent(q, k, v, *, g, theta, scale=None, initial_state=None):
    r"""GateLoop token by token: shrink and turn each row of the state, write the token, read the real part.

    .. math:: S_t = \operatorname{Diag}(e^{g_t + i\theta_t})\, S_{t-1} + k_t v_t^\top, \qquad
        o_t = s\, \operatorname{Re}(S_t)^\top q_t

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0.
        theta: angle, [B, T, H, K], radians a token.
        scale: s; default 1.
        initial_state: real and imaginary part of S_0, each [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and the parts of S_T, each [B, H, K, V].

    Cost: B H (T (5 K V + 3 K + V) + 2 K V) FLOPs, counting a complex number as one: turn 1, outer product 1,
    add 1, read 2 an entry of S; the transition 3 K; the scale V.
    Source: Katsch 2023, arXiv:2311.01927. Differs: k and v are not merged beforehand, and a state is carried.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    real, imaginary = np.zeros((2, B, H, K, V)) if initial_state is None else initial_state
    S = real + 1j * imaginary
    o = np.zeros_like(v)
    for t in range(T):
        # S_t = Diag(e^(g_t + i theta_t)) S_{t-1} + k_t v_t^T
        turn = np.exp(g[:, t] + 1j * theta[:, t])[..., None]
        S = turn * S + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        # o_t = s Re(S_t)^T q_t, since q is real
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S.real)
    return o, (S.real.copy(), S.imag.copy())


def parallel(q, k, v, *, g, theta, scale=None, initial_state=None):
    r"""GateLoop for all tokens at once: scores that swing and decay with what lies between two tokens.

    .. math:: A_{tj} = \sum_c q_{tc}\, e^{G_{tc} - G_{jc}} \cos(\Theta_{tc} - \Theta_{jc})\, k_{jc}
        \;\; (t \ge j), \qquad O = s\,A V + s \operatorname{Re}\bigl((e^{G + i\Theta} \odot Q)\, S_0\bigr)

    with :math:`G_t = \sum_{r \le t} g_r` and :math:`\Theta_t = \sum_{r \le t} \theta_r`.

    Args and returns: as `recurrent`.

    Cost: B H (T^2 (5 K + 2 V) + T (4 K V + 8 K + 2 V) + 4 K V + K) FLOPs, quadratic in T.
    Source: Katsch 2023, arXiv:2311.01927, the surrogate attention mode. Differs: takes and returns a state;
    the differences are taken before the exponential, so nothing overflows.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    real, imaginary = np.zeros((2, B, H, K, V)) if initial_state is None else initial_state
    S = real + 1j * imaginary
    G = np.cumsum(g + 1j * theta, axis=1)  # [B, T, H, K]
    t = np.arange(T)
    seen = (t[:, None] >= t)[:, :, None, None]
    # e^(G_t - G_j) on and below the diagonal, 0 above; exp of a difference <= 0: cannot overflow
    D = np.exp(np.where(seen, G[:, :, None] - G[:, None], -np.inf))  # [B, T, T, H, K]
    A = np.einsum("bthk,btjhk,bjhk->bhtj", q, D.real, k)
    past = np.einsum("bthk,bhkv->bthv", q * np.exp(G), S).real  # [T, K] @ [K, V] -> [T, V]
    o = scale * (np.einsum("bhtj,bjhv->bthv", A, v) + past)
    kept = k * np.exp(G[:, -1:] - G)
    S = np.exp(G[:, -1])[..., None] * S + np.einsum("bthk,bthv->bhkv", kept, v)
    return o, (S.real.copy(), S.imag.copy())


def rotated(q, k, v, *, g, theta, scale=None, initial_state=None):
    r"""GateLoop without complex numbers: turn q and k, and it is gated linear attention with 2 K channels.

    The cosine of a difference is a product of two vectors, so the turn moves from the state to q and k:

    .. math:: \hat q_t = (\cos\Theta_t \odot q_t,\; \sin\Theta_t \odot q_t), \qquad
        \hat k_t = (\cos\Theta_t \odot k_t,\; \sin\Theta_t \odot k_t), \qquad \hat g_t = (g_t, g_t)

    .. math:: P_t = \operatorname{Diag}(e^{\hat g_t})\, P_{t-1} + \hat k_t v_t^\top, \qquad
        o_t = s\, P_t^\top \hat q_t

    The two halves of P are the real part of :math:`e^{-i\Theta_t} S_t` and its imaginary part, negated.

    Args and returns: as `recurrent`.

    Cost: B H (T (10 K V + 8 K + V) + 7 K V) FLOPs, all of them real.
    Source: Katsch 2023, arXiv:2311.01927, for the recurrence; Su et al. 2021, arXiv:2104.09864, for moving a
    rotation into q and k.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    real, imaginary = np.zeros((2, B, H, K, V)) if initial_state is None else initial_state
    angle = np.cumsum(theta, axis=1)
    cos, sin = np.cos(angle), np.sin(angle)
    q, k = (np.concatenate((cos * x, sin * x), axis=-1) for x in (q, k))  # [B, T, H, 2 K]
    P = np.concatenate((real, -imaginary), axis=2)  # [B, H, 2 K, V]
    o = np.zeros_like(v)
    for t in range(T):
        kept = np.tile(np.exp(g[:, t]), 2)[..., None]
        P = kept * P + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], P)
    # turn the state back: S_T = e^(i Theta_T) (P_1 - i P_2)
    cos, sin = cos[:, -1, ..., None], sin[:, -1, ..., None]
    one, two = P[:, :, :K], P[:, :, K:]
    return o, (cos * one + sin * two, sin * one - cos * two)


def step(q, k, v, *, g, theta, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        g: log decay, [B, H, K], nats, <= 0.
        theta: angle, [B, H, K], radians.
        state: real and imaginary part of S_{t-1}, each [B, H, K, V].
        scale: s; default 1.

    Returns:
        o, [B, H, V], and the parts of S_t, each [B, H, K, V].

    Cost: B H (7 K V + 3 K + V) FLOPs, counting a complex number as one.
    Source: Katsch 2023, arXiv:2311.01927.
    """
    token = (x[:, None] for x in (q, k, v))
    o, state = recurrent(*token, g=g[:, None], theta=theta[:, None], scale=scale, initial_state=state)
    return o[:, 0], state


def cost(*, form, B, T, H, K, V, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data, a complex number as
    one. Bytes: q, k, v, theta read once, o written once, g read and the state written once in float32;
    nothing is spilled, since the state, or a tile of scores, stays on chip in every form.

    Args:
        form: "recurrent", "parallel" or "rotated".
        B, T, H, K, V: sizes.
        itemsize: bytes of an entry of q, k, v, theta, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    flops = {
        "recurrent": T * (5 * K * V + 3 * K + V) + 2 * K * V,
        "parallel": T * T * (5 * K + 2 * V) + T * (4 * K * V + 8 * K + 2 * V) + 4 * K * V + K,
        "rotated": T * (10 * K * V + 8 * K + V) + 7 * K * V,
    }[form]
    state_bytes = 2 * 4 * B * H * K * V
    return {
        "flops": B * H * flops,
        "bytes": B * T * H * (itemsize * (3 * K + 2 * V) + 4 * K) + state_bytes,
        "state_bytes": state_bytes,
    }
