r"""TTT-MLP: test-time training with a hidden layer, so that the state is a small nonlinear network.

The inner model is :math:`f(z) = z + \mathrm{LN}(\mathrm{gelu}(z W_1 + b_1)\,W_2 + b_2)`, trained as in
TTT-Linear: by the gradients of a mini-batch of tokens, all taken where the mini-batch began. Two forms
compute the same output and the same final state.

The state counts from the model (w1, b1, w2, b2) that a text begins with, and may end inside a mini-batch:
four arrays that are added to it, four that its present mini-batch of c tokens has added, and c, [B].
"""

import numpy as np

EPS = 1e-6
"""Added to the variance in the layer norm."""


def recurrent(
    q, k, v, *, w1, b1, w2, b2, eta, ln_weight, ln_bias, batch_size=16, scale=None, initial_state=None
):
    r"""TTT-MLP token by token: the token's gradient at the mini-batch's start, a step, a forward pass.

    .. math:: \ell(\theta; k, v) = \tfrac12 \lVert \mathrm{LN}(\mathrm{gelu}(k W_1 + b_1) W_2 + b_2) - (v - k)
        \rVert^2, \qquad \theta_t = \theta_{t-1} - \eta_t\, \nabla_\theta \ell(\theta'; k_t, v_t), \qquad
        o_t = f(s q_t; \theta_t)

    where theta' is the inner model after the last whole mini-batch.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, K].
        w1, b1: first inner layer that a text begins with, [H, K, M] and [H, M]; M = 4 K in the paper.
        w2, b2: second inner layer that a text begins with, [H, M, K] and [H, K].
        eta: learning rate of each token, [B, T, H], >= 0.
        ln_weight: weight of the inner layer norm, [H, K].
        ln_bias: bias of the inner layer norm, [H, K].
        batch_size: tokens whose gradients are taken at the same inner model.
        scale: s; default 1.
        initial_state: as the state returned; default zeros.

    Returns:
        o, [B, T, H, K], and the state after T tokens: W_1, b_1, W_2, b_2 less those that the text began with,
        the part of each that the present mini-batch has added, and its tokens c.

    Cost: B T H (22 K M + 33 K + 46 M + 10) FLOPs.
    Source: Sun et al. 2024, arXiv:2407.04620; layer norm, biases, tanh-gelu and the half in the loss as in
    the authors' released code. Differs: that multiplies all that the t-th token of a mini-batch reads of its
    steps by a learned number, 1/t at first.
    """
    q = q if scale is None else scale * q
    base = (w1, b1, w2, b2)
    *state, c = initial_state or _zeros(base, len(q))
    now, recent, c, o = state[:4], state[4:], c.astype(int), np.zeros_like(v)
    for t in range(q.shape[1]):
        # the gradient at the mini-batch's start
        W1, B1, W2, B2 = (x + y - z for x, y, z in zip(base, now, recent, strict=True))
        a = np.einsum("bhk,bhkm->bhm", k[:, t], W1) + B1
        x, slope = gelu(a)
        z = np.einsum("bhm,bhmk->bhk", x, W2) + B2
        h2 = eta[:, t, :, None] * gradient(z, v[:, t] - k[:, t], ln_weight, ln_bias)
        h1 = slope * np.einsum("bhk,bhmk->bhm", h2, W2)
        # one step of descent
        steps = np.einsum("bhk,bhm->bhkm", k[:, t], h1), h1, np.einsum("bhm,bhk->bhmk", x, h2), h2
        now, recent = ([y - dy for y, dy in zip(part, steps, strict=True)] for part in (now, recent))
        # o_t = f(q_t; theta_t)
        W1, B1, W2, B2 = (x + y for x, y in zip(base, now, strict=True))
        x = gelu(np.einsum("bhk,bhkm->bhm", q[:, t], W1) + B1)[0]
        z = np.einsum("bhm,bhmk->bhk", x, W2) + B2
        o[:, t] = q[:, t] + ln_weight * normalised(z)[0] + ln_bias
        # a whole mini-batch: gradients are taken here from now on
        c = (c + 1) % batch_size
        recent = [np.where((c == 0).reshape(-1, *[1] * (y.ndim - 1)), 0, y) for y in recent]
    return o, (*now, *recent, c)


def dual(q, k, v, *, w1, b1, w2, b2, eta, ln_weight, ln_bias, batch_size=16, scale=None, initial_state=None):
    r"""TTT-MLP a mini-batch at a time, without one inner model a token: the dual form, layer by layer.

    .. math:: A = \mathrm{gelu}\bigl(s Q W_1 + b_1 - ((s Q K^\top + 1) \odot [i \ge j])\, \Delta_1\bigr),
        \qquad O = s Q + \mathrm{LN}\bigl(A W_2 + b_2 - ((A X^\top + 1) \odot [i \ge j])\, \Delta_2\bigr)

    with X the hidden layer of the keys and :math:`\Delta_1, \Delta_2` the rates times the gradients by what
    goes into the gelu and into the norm.

    Args and returns: as `recurrent`.

    Cost: B T H (14 K M + n (4 K + 4 M + 2) + ...) FLOPs in mini-batches of n; `cost` has the rest.
    Source: Sun et al. 2024, arXiv:2407.04620, its dual form, with biases, layer norm and eta of the source.
    """
    q = q if scale is None else scale * q
    base, T = (w1, b1, w2, b2), q.shape[1]
    *state, c = initial_state or _zeros(base, len(q))
    state = [np.array(x, np.float64) for x in state] if initial_state else state
    now, recent, c, o = state[:4], state[4:], c.astype(int), np.zeros_like(v)
    for row in range(len(q)):
        start = 0
        while start < T:
            # the rest of a mini-batch
            part = slice(start, min(start + batch_size - c[row], T))
            qc, kc, vc = (x[row, part].swapaxes(0, 1) for x in (q, k, v))  # [H, n, K]
            i = np.arange(qc.shape[1])
            # 1 gradients of all tokens at the mini-batch's start
            W1, B1, W2, B2 = (x + y[row] - z[row] for x, y, z in zip(base, now, recent, strict=True))
            x, slope = gelu(np.einsum("hik,hkm->him", kc, W1) + B1[:, None])
            z = np.einsum("him,hmk->hik", x, W2) + B2[:, None]
            h2 = eta[row, part].T[..., None] * gradient(z, vc - kc, ln_weight[:, None], ln_bias[:, None])
            h1 = slope * np.einsum("hik,hmk->him", h2, W2)
            # 2 what token i reads of the steps up to its own, in both layers; the 1 is the bias
            W1, B1, W2, B2 = (x + y[row] for x, y in zip(base, now, strict=True))
            A = np.where(i[:, None] >= i, np.einsum("hik,hjk->hij", qc, kc) + 1, 0)
            a = np.einsum("hik,hkm->him", qc, W1) + B1[:, None] - np.einsum("hij,hjm->him", A, h1)
            a = gelu(a)[0]
            A = np.where(i[:, None] >= i, np.einsum("him,hjm->hij", a, x) + 1, 0)
            z = np.einsum("him,hmk->hik", a, W2) + B2[:, None] - np.einsum("hij,hjk->hik", A, h2)
            o[row, part] = (qc + ln_weight[:, None] * normalised(z)[0] + ln_bias[:, None]).swapaxes(0, 1)
            # 3 all steps at once
            steps = np.einsum("hik,him->hkm", kc, h1), h1.sum(1), np.einsum("him,hik->hmk", x, h2), h2.sum(1)
            start, c[row] = part.stop, (c[row] + len(i)) % batch_size
            for y, z, dy in zip(now, recent, steps, strict=True):
                y[row], z[row] = y[row] - dy, z[row] - dy
                if c[row] == 0:
                    z[row] = 0
    return o, (*now, *recent, c)


def gelu(x):
    r"""x times the normal distribution's share below x, by the usual tanh, and the derivative.

    .. math:: \tfrac{x}{2}(1 + \tanh u), \qquad u = \sqrt{2 / \pi}\,(x + 0.044715\, x^3)
    """
    c = (2 / np.pi) ** 0.5
    half = 0.5 + 0.5 * np.tanh(c * x * (1 + 0.044715 * x * x))
    # half = sigmoid(2 u), so its derivative is 2 half (1 - half) u'
    return x * half, half + 2 * x * half * (1 - half) * c * (1 + 3 * 0.044715 * x * x)


def normalised(z):
    """z without its mean, over its standard deviation, and that deviation; over the last axis."""
    z = z - z.mean(-1, keepdims=True)
    sigma = np.sqrt((z * z).mean(-1, keepdims=True) + EPS)
    return z / sigma, sigma


def gradient(z, target, ln_weight, ln_bias):
    r"""Gradient of half the squared error of LN(z) by z.

    .. math:: g = \frac{1}{\sigma}\bigl(u - \bar u - \hat z\,\overline{u \odot \hat z}\bigr), \qquad
        u = \gamma \odot (\gamma \odot \hat z + \beta - target)
    """
    z, sigma = normalised(z)
    u = ln_weight * (ln_weight * z + ln_bias - target)
    return (u - u.mean(-1, keepdims=True) - z * (u * z).mean(-1, keepdims=True)) / sigma


def step(q, k, v, *, w1, b1, w2, b2, eta, ln_weight, ln_bias, state, batch_size=16, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, K].
        w1, b1, w2, b2: inner layers that a text begins with.
        eta: learning rate, [B, H].
        ln_weight: weight of the inner layer norm, [H, K].
        ln_bias: bias of the inner layer norm, [H, K].
        state: that of the tokens before.
        batch_size: tokens whose gradients are taken at the same inner model.
        scale: s; default 1.

    Returns:
        o, [B, H, K], and the state after the token.

    Cost: that of a token of `recurrent`.
    Source: Sun et al. 2024, arXiv:2407.04620.
    """
    o, state = recurrent(
        q[:, None], k[:, None], v[:, None], w1=w1, b1=b1, w2=w2, b2=b2, eta=eta[:, None], ln_weight=ln_weight,
        ln_bias=ln_bias, batch_size=batch_size, scale=scale, initial_state=state,
    )  # fmt: skip
    return o[:, 0], state


def cost(*, form, B, T, H, K, M, batch_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v, eta
    read once, o written once, the parameters read once, the state written once in float32; it stays on chip.

    Args:
        form: "recurrent" or "dual".
        B, T, H, K, M: sizes; M hidden units.
        batch_size: tokens of a mini-batch.
        itemsize: bytes of an entry of q, k, v, eta, o and the parameters.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    model = 2 * K * M + K + M
    state_bytes = 4 * (2 * B * H * model + B)
    if form == "recurrent":
        flops = B * T * H * (22 * K * M + 33 * K + 46 * M + 10)
    else:
        batches = [min(batch_size, T - start) for start in range(0, T, batch_size)]
        # scores, the bias's 1 and what they mix, twice; both layers twice, backwards once, and two steps;
        # the models of start and present, and the steps taken off, a mini-batch
        flops = (
            B
            * H
            * sum(
                n * n * (4 * K + 4 * M + 2) + n * (14 * K * M + 30 * K + 43 * M + 10) + 5 * model
                for n in batches
            )
        )
    moved = B * T * H * (4 * K + 1) + H * (model + 2 * K)
    return {"flops": flops, "bytes": itemsize * moved + state_bytes, "state_bytes": state_bytes}


def _zeros(base, B):
    # no text yet
    return (*(np.zeros((B, *x.shape)) for x in (*base, *base)), np.zeros(B))
