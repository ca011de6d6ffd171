r"""TTT-Linear: the state is a small model, and reading a token is a step of gradient descent on it.

The inner model is :math:`f(z; W, b) = z + \mathrm{LN}(z W + b)`. It learns to turn keys into values, by the
gradients of one mini-batch of tokens at a time, all taken where the mini-batch began: so the size of a
mini-batch is part of the model. Two forms compute the same output and the same final state.

The state counts from the model (w, b) that a text begins with, and may end inside a mini-batch:
(S, s, D, d, c), where w + S and b + s are the inner model, D and d the part of S and s that its
present mini-batch of c tokens has added, [B, H, K, K], [B, H, K], [B, H, K, K], [B, H, K] and [B].
"""

import numpy as np

EPS = 1e-6
"""Added to the variance in the layer norm."""


def recurrent(q, k, v, *, w, b, eta, ln_weight, ln_bias, batch_size=16, scale=None, initial_state=None):
    r"""TTT-Linear token by token: the token's gradient at the mini-batch's start, a step, a forward pass.

    .. math:: \ell(W, b; k, v) = \tfrac12 \lVert \mathrm{LN}(k W + b) - (v - k) \rVert^2, \qquad
        g_t = \frac{\partial \ell}{\partial z}(k_t W' + b')
    .. math:: W_t = W_{t-1} - \eta_t\, k_t g_t^\top, \qquad b_t = b_{t-1} - \eta_t\, g_t, \qquad
        o_t = s q_t + \mathrm{LN}(s q_t W_t + b_t)

    where (W', b') is the inner model after the last whole mini-batch.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, K].
        w: inner weights that a text begins with, [H, K, K].
        b: inner biases that a text begins with, [H, K].
        eta: learning rate of each token, [B, T, H], >= 0.
        ln_weight: weight of the inner layer norm, [H, K].
        ln_bias: bias of the inner layer norm, [H, K].
        batch_size: tokens whose gradients are taken at the same inner model.
        scale: s; default 1.
        initial_state: (S, s, D, d, c); default zeros.

    Returns:
        o, [B, T, H, K], and the state after T tokens.

    Cost: B T H (10 K^2 + 33 K + 10) FLOPs: two read-outs 2 each, an outer product and five sums an entry of
    W; the rest is two layer norms and the gradient of one.
    Source: Sun et al. 2024, arXiv:2407.04620; layer norm, bias and the half in the loss as in the authors'
    released code. Differs: that multiplies all that the t-th token of a mini-batch reads of its steps by a
    learned number, 1/t at first; here a step counts the same for every token after it.
    """
    B, T, H, K = q.shape
    q = q if scale is None else scale * q
    S, s, D, d, c = initial_state or _zeros(B, H, K)
    c, o = c.astype(int), np.zeros_like(v)
    for t in range(T):
        # the gradient at the mini-batch's start
        z = np.einsum("bhk,bhkv->bhv", k[:, t], w + S - D) + (b + s - d)  # [B, H, K]
        h = eta[:, t, :, None] * gradient(z, v[:, t] - k[:, t], ln_weight, ln_bias)
        # one step of descent
        step_W = np.einsum("bhk,bhv->bhkv", k[:, t], h)
        S, s, D, d = S - step_W, s - h, D - step_W, d - h
        # o_t = f(q_t; W_t, b_t)
        z = np.einsum("bhk,bhkv->bhv", q[:, t], w + S) + (b + s)
        o[:, t] = q[:, t] + ln_weight * normalised(z)[0] + ln_bias
        # a whole mini-batch: gradients are taken here from now on
        c = (c + 1) % batch_size
        D, d = np.where((c == 0)[:, None, None, None], 0, D), np.where((c == 0)[:, None, None], 0, d)
    return o, (S, s, D, d, c)


def dual(q, k, v, *, w, b, eta, ln_weight, ln_bias, batch_size=16, scale=None, initial_state=None):
    r"""TTT-Linear a mini-batch at a time, without one inner model a token: the dual form.

    .. math:: O = s Q + \mathrm{LN}\bigl(s Q W + b
        - \bigl((s Q K^\top + 1) \odot [i \ge j]\bigr)\,(\eta \odot G)\bigr), \qquad
        W \leftarrow W - K^\top (\eta \odot G), \quad b \leftarrow b - \sum_j \eta_j g_j

    The 1 is the bias, a key that every token shares. A first mini-batch goes on where the state stopped.

    Args and returns: as `recurrent`.

    Cost: B T H (n (4 K + 1) + 6 K^2 + 30 K + 10 + (5 K^2 + 5 K) / n) FLOPs in mini-batches of n.
    Source: Sun et al. 2024, arXiv:2407.04620, its dual form, with bias, layer norm and eta of the source.
    """
    B, T, H, K = q.shape
    q = q if scale is None else scale * q
    state = initial_state or _zeros(B, H, K)
    S, s, D, d = (np.array(x, np.float64) if initial_state else x for x in state[:4])
    c, o = state[4].astype(int), np.zeros_like(v)
    for row in range(B):
        start = 0
        while start < T:
            # the rest of a mini-batch
            part = slice(start, min(start + batch_size - c[row], T))
            qc, kc, vc = (x[row, part].swapaxes(0, 1) for x in (q, k, v))  # [H, n, K]
            i = np.arange(qc.shape[1])
            # 1 gradients of all tokens at the mini-batch's start, [n, K] @ [K, K]
            z = np.einsum("hik,hkv->hiv", kc, w + S[row] - D[row]) + (b + s[row] - d[row])[:, None]
            g = gradient(z, vc - kc, ln_weight[:, None], ln_bias[:, None])
            h = eta[row, part].T[..., None] * g  # [H, n, K]
            # 2 what token i reads of the steps up to its own: [n, K] @ [K, n], and 1 for the bias
            A = np.where(i[:, None] >= i, np.einsum("hik,hjk->hij", qc, kc) + 1, 0)
            z = np.einsum("hik,hkv->hiv", qc, w + S[row]) + (b + s[row])[:, None]
            z = z - np.einsum("hij,hjv->hiv", A, h)
            o[row, part] = (qc + ln_weight[:, None] * normalised(z)[0] + ln_bias[:, None]).swapaxes(0, 1)
            # 3 all steps at once: [K, n] @ [n, K]
            step_W, step_b = np.einsum("hik,hiv->hkv", kc, h), h.sum(1)
            S[row], s[row], D[row], d[row] = (
                S[row] - step_W,
                s[row] - step_b,
                D[row] - step_W,
                d[row] - step_b,
            )
            start, c[row] = part.stop, (c[row] + len(i)) % batch_size
            if c[row] == 0:
                D[row], d[row] = 0, 0
    return o, (S, s, D, d, c)


def normalised(z):
    """z without its mean, over its standard deviation, and that deviation; over the last axis."""
    z = z - z.mean(-1, keepdims=True)
    sigma = np.sqrt((z * z).mean(-1, keepdims=True) + EPS)
    return z / sigma, sigma


def gradient(z, target, ln_weight, ln_bias):
    r"""Gradient of half the squared error of LN(z) by z.

    .. math:: e = \gamma \odot \hat z + \beta - target, \qquad
        g = \frac{1}{\sigma}\bigl(u - \bar u - \hat z\,\overline{u \odot \hat z}\bigr), \quad
        u = \gamma \odot e

    Args:
        z: what is normalised, [..., K].
        target: what LN(z) should be, [..., K].
        ln_weight: gamma.
        ln_bias: beta.

    Source: the chain rule; the projection takes out of u what the norm does not see.
    """
    z, sigma = normalised(z)
    u = ln_weight * (ln_weight * z + ln_bias - target)
    return (u - u.mean(-1, keepdims=True) - z * (u * z).mean(-1, keepdims=True)) / sigma


def step(q, k, v, *, w, b, eta, ln_weight, ln_bias, state, batch_size=16, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, K].
        w: inner weights that a text begins with, [H, K, K].
        b: inner biases that a text begins with, [H, K].
        eta: learning rate, [B, H].
        ln_weight: weight of the inner layer norm, [H, K].
        ln_bias: bias of the inner layer norm, [H, K].
        state: (S, s, D, d, c) of the tokens before.
        batch_size: tokens whose gradients are taken at the same inner model.
        scale: s; default 1.

    Returns:
        o, [B, H, K], and the state after the token.

    Cost: that of a token of `recurrent`.
    Source: Sun et al. 2024, arXiv:2407.04620.
    """
    o, state = recurrent(
        q[:, None], k[:, None], v[:, None], w=w, b=b, eta=eta[:, None], ln_weight=ln_weight, ln_bias=ln_bias,
        batch_size=batch_size, scale=scale, initial_state=state,
    )  # fmt: skip
    return o[:, 0], state


def cost(*, form, B, T, H, K, batch_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v, eta
    read once, o written once, the parameters read once, the state written once in float32; it stays on chip.

    Args:
        form: "recurrent" or "dual".
        B, T, H, K: sizes.
        batch_size: tokens of a mini-batch.
        itemsize: bytes of an entry of q, k, v, eta, o and the parameters.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * (2 * B * H * (K * K + K) + B)
    if form == "recurrent":
        flops = B * T * H * (10 * K * K + 33 * K + 10)
    else:
        batches = [min(batch_size, T - start) for start in range(0, T, batch_size)]
        # scores, the bias's 1, what they mix; two passes over the model and one to write it, two layer norms
        # and the gradient of one; the models of start and present, and the step, a mini-batch
        flops = (
            B
            * H
            * sum(n * n * (4 * K + 1) + n * (6 * K * K + 30 * K + 10) + 5 * K * K + 5 * K for n in batches)
        )
    moved = B * T * H * (4 * K + 1) + H * (K * K + 3 * K)
    return {"flops": flops, "bytes": itemsize * moved + state_bytes, "state_bytes": state_bytes}


def _zeros(B, H, K):
    # no text yet
    return (
        np.zeros((B, H, K, K)),
        np.zeros((B, H, K)),
        np.zeros((B, H, K, K)),
        np.zeros((B, H, K)),
        np.zeros(B),
    )
