r"""Longhorn: every token solves a small regression in closed form, and its step size follows from the key.

A gradient step of fixed size may overshoot; the implicit step cannot. It asks for the state that stays near
the old one and maps the key to the value:

.. math:: S_t = \arg\min_S\; \lVert S - S_{t-1} \rVert_F^2
    + \lVert S^\top k_t - v_t \rVert^2_{\operatorname{Diag}(\beta_t)}

1. The gradient is zero: :math:`S - S_{t-1} + k\,(\beta \odot (S^\top k - v))^\top = 0`.
2. Its product with :math:`k^\top` leaves vectors of V entries alone:
   :math:`S^\top k - S_{t-1}^\top k + \lVert k \rVert^2\, \beta \odot (S^\top k - v) = 0`.
3. So the new error is the old one, damped:
   :math:`S^\top k - v = (S_{t-1}^\top k - v) / (1 + \beta \lVert k \rVert^2)`.
4. Put into 1, with :math:`\varepsilon = \beta / (1 + \beta \lVert k \rVert^2)`:
   :math:`S_t = S_{t-1} + k\,(\varepsilon \odot (v - S_{t-1}^\top k))^\top`.
5. That is a delta rule with a strength a value channel. For a recurrence entry by entry the paper keeps of
   :math:`k k^\top` the diagonal alone:
   :math:`S_t = (1 - k^2 \varepsilon^\top) \odot S_{t-1} + k\,(\varepsilon \odot v)^\top`.

Step 5 is an approximation, and it is the method: what is computed here is its last line. Every factor lies in
(0, 1], since :math:`\varepsilon\, k_c^2 < 1` for every channel c, so nothing can grow. Two forms compute the
same output and the same final state.
"""

import numpy as np


def recurrent(q, k, v, *, beta, scale=None, initial_state=None):
    r"""Longhorn token by token: every entry of the state fades by its own factor, the token is written, read.

    .. math:: \varepsilon_t = \frac{\beta_t}{1 + \beta_t\, k_t^\top k_t}, \qquad
        S_t = (1 - k_t^{\odot 2} \varepsilon_t^\top) \odot S_{t-1} + k_t\,(\varepsilon_t \odot v_t)^\top,
        \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K], of any length.
        v: values, [B, T, H, V].
        beta: weight of a value channel's error, [B, T, H, V], >= 0; the paper's is a sigmoid.
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B T H (7 K V + 3 K + 5 V) FLOPs: factor 2, fade 1, outer product 1, add 1, read 2 an entry of the
    state; k^2 and its sum 3 K; epsilon 3, its product with v 1 and the scale 1 an entry of V.
    Source: Liu et al. 2024, arXiv:2407.14207. Differs: the paper has one head, writes x for v and
    the state as its transpose; convolution, skip and gate are the layer's.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    o = np.zeros_like(v)
    for t in range(T):
        # epsilon_t = beta_t / (1 + beta_t |k_t|^2)
        length = np.einsum("bhk,bhk->bh", k[:, t], k[:, t])[..., None]  # [B, H, 1]
        eps = beta[:, t] / (1 + beta[:, t] * length)  # [B, H, V]
        # S_t = (1 - k_t^2 epsilon_t^T) * S_{t-1} + k_t (epsilon_t * v_t)^T
        keep = 1 - np.einsum("bhk,bhv->bhkv", k[:, t] ** 2, eps)
        S = keep * S + np.einsum("bhk,bhv->bhkv", k[:, t], eps * v[:, t])
        # o_t = s S_t^T q_t: the token just written is read too
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return o, S


def scan(q, k, v, *, beta, scale=None, initial_state=None):
    r"""Longhorn for all tokens at once: pairs (factor, write) are joined, the distance doubles in every pass.

    .. math:: (a, b) \text{ after } (a', b') = (a\, a',\; a\, b' + b), \qquad
        a_t = 1 - k_t^{\odot 2} \varepsilon_t^\top, \quad b_t = k_t\,(\varepsilon_t \odot v_t)^\top

    Joining is associative, so after the pass with lag 1, 2, 4, ... entry t covers the last 2, 4, 8, ...
    tokens. No logarithm, no exponential and no quotient of factors: nothing is lost where a factor is small.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K], of any length.
        v: values, [B, T, H, V].
        beta: weight of a value channel's error, [B, T, H, V], >= 0.
        scale: s; default 1.
        initial_state: S_0, [B, H, K, V]; default zeros.

    Returns:
        o, [B, T, H, V], and S_T, [B, H, K, V].

    Cost: B H (T (5 K V + 3 K + 5 V) + 2 K V + 3 K V sum (T - lag)) FLOPs over the lags 1, 2, 4, ... < T:
    about 3 log2(T) an entry and token; T states are held at once.
    Source: Hillis and Steele 1986, Data parallel algorithms, for the recurrence of Liu et al. 2024,
    arXiv:2407.14207.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = 1.0 if scale is None else scale
    S = np.zeros((B, H, K, V)) if initial_state is None else initial_state
    length = np.einsum("bthk,bthk->bth", k, k)[..., None]  # [B, T, H, 1]
    eps = beta / (1 + beta * length)  # [B, T, H, V]
    a = 1 - np.einsum("bthk,bthv->bthkv", k**2, eps)  # [B, T, H, K, V]
    b = np.einsum("bthk,bthv->bthkv", k, eps * v)  # [B, T, H, K, V]
    # the first token takes the state along
    b[:, 0] += a[:, 0] * S
    lag = 1
    while lag < T:
        # the right sides are old: a product is made before it is stored
        b[:, lag:] += a[:, lag:] * b[:, :-lag]
        a[:, lag:] = a[:, lag:] * a[:, :-lag]
        lag *= 2
    # b_t is S_t
    o = scale * np.einsum("bthk,bthkv->bthv", q, b)
    return o, b[:, -1]


def step(q, k, v, *, beta, state, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        beta: weight of a value channel's error, [B, H, V], >= 0.
        state: S_{t-1}, [B, H, K, V].
        scale: s; default 1.

    Returns:
        o, [B, H, V], and S_t, [B, H, K, V].

    Cost: B H (7 K V + 3 K + 5 V) FLOPs.
    Source: Liu et al. 2024, arXiv:2407.14207.
    """
    scale = 1.0 if scale is None else scale
    eps = beta / (1 + beta * np.einsum("bhk,bhk->bh", k, k)[..., None])
    keep = 1 - np.einsum("bhk,bhv->bhkv", k**2, eps)
    S = keep * state + np.einsum("bhk,bhv->bhkv", k, eps * v)
    return scale * np.einsum("bhk,bhkv->bhv", q, S), S


def cost(*, form, B, T, H, K, V, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v, beta
    read once, o written once, S_T written once in float32; nothing is spilled, since the state, or a tile of
    pairs, stays on chip in either form.

    Args:
        form: "recurrent" or "scan".
        B, T, H, K, V: sizes.
        itemsize: bytes of an entry of q, k, v, beta, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * H * K * V
    if form == "recurrent":
        flops = T * (7 * K * V + 3 * K + 5 * V)
    else:
        lags = [2**n for n in range(T.bit_length()) if 2**n < T]
        # factor 2, write 1, read 2; the first token 2; a pass joins T - lag pairs with 3 an entry
        flops = T * (5 * K * V + 3 * K + 5 * V) + 2 * K * V + 3 * K * V * sum(T - lag for lag in lags)
    return {
        "flops": B * H * flops,
        "bytes": itemsize * B * T * H * (2 * K + 3 * V) + state_bytes,
        "state_bytes": state_bytes,
    }
