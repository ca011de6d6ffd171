r"""Titans' neural memory, with a matrix as memory: gradient descent with momentum and forgetting.

What surprises, the gradient of the memory's error, is carried on in a momentum P; the memory forgets a share
and adds the momentum. Gradients of a mini-batch are taken where it began. Two forms compute the same output
and the same final state (M, P, M', c): memory, momentum, the memory at the start of the present mini-batch,
and that one's tokens; [B, H, K, V] three times, and [B].
"""

import numpy as np


def recurrent(q, k, v, *, g, mu, eta, batch_size=16, scale=None, initial_state=None):
    r"""Titans' memory token by token: a surprise, its momentum, the memory, a forward pass.

    .. math:: P_t = \mu_t P_{t-1} - \eta_t\, k_t\,(M'^\top k_t - v_t)^\top, \qquad
        M_t = e^{g_t} M_{t-1} + P_t, \qquad o_t = s\,M_t^\top q_t

    where M' is the memory after the last whole mini-batch; the bracket times k is the gradient of
    :math:`\tfrac12 \lVert M'^\top k_t - v_t \rVert^2`.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log of the share of the memory that a step keeps, [B, T, H], <= 0.
        mu: share of the momentum that a step keeps, [B, T, H], in [0, 1].
        eta: learning rate of each token, [B, T, H], >= 0.
        batch_size: tokens whose gradients are taken at the same memory.
        scale: s; default 1.
        initial_state: (M, P, M', c); default zeros.

    Returns:
        o, [B, T, H, V], and the state after T tokens.

    Cost: B T H (9 K V + 3 V + 1) FLOPs: two read-outs 2 each, two decays, an outer product and two sums an
    entry of M; error, rate and scale V each.
    Source: Behrouz et al. 2025, arXiv:2501.00663. Differs: the paper writes 1 - alpha for e^g, eta for mu and
    theta for the rate; its loss has no half; its memory may be deeper than one matrix.
    """
    B, T, H, K = q.shape
    scale = 1.0 if scale is None else scale
    M, P, start, c = initial_state or _zeros(B, H, K, v.shape[-1])
    c, o = c.astype(int), np.zeros_like(v)
    for t in range(T):
        # the surprise: what the memory says less what it should
        error = np.einsum("bhk,bhkv->bhv", k[:, t], start) - v[:, t]
        P = mu[:, t, :, None, None] * P - np.einsum("bhk,bhv->bhkv", k[:, t], eta[:, t, :, None] * error)
        M = np.exp(g[:, t])[..., None, None] * M + P
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], M)
        # a whole mini-batch: gradients are taken here from now on
        c = (c + 1) % batch_size
        start = np.where((c == 0)[:, None, None, None], M, start)
    return o, (M, P, start, c)


def dual(q, k, v, *, g, mu, eta, batch_size=16, scale=None, initial_state=None):
    r"""Titans' memory a mini-batch at a time: momentum and forgetting as two triangular matrices.

    .. math:: G_{ti} = \prod_{r=i+1}^{t} e^{g_r}\,[t \ge i], \quad U_{ij} = \prod_{r=j+1}^{i} \mu_r\,[i \ge j]
    .. math:: O = s\,\bigl(\Gamma \odot Q M + a \odot Q P + (Q K^\top \odot G U)\, W\bigr), \qquad
        W = \eta \odot (V - K M'), \quad \Gamma_t = e^{g_1 + .. + g_t}, \quad
        a_t = \sum_i G_{ti}\, \mu_1 \cdots \mu_i

    The surprises W are known as soon as the mini-batch begins; (G U)_{tj} is what the one of token j weighs
    in the memory that token t reads.

    Args and returns: as `recurrent`.

    Cost: B T H (2 n (K + V) + 2 n^2 + ...) FLOPs in mini-batches of n; `cost` has the rest.
    Source: Behrouz et al. 2025, arXiv:2501.00663, whose mini-batches go through a scan instead.
    """
    B, T, H, K = q.shape
    scale = 1.0 if scale is None else scale
    state = initial_state or _zeros(B, H, K, v.shape[-1])
    M, P, start = (np.array(x, np.float64) if initial_state else x for x in state[:3])
    c, o = state[3].astype(int), np.zeros_like(v)
    for row in range(B):
        first = 0
        while first < T:
            # the rest of a mini-batch
            part = slice(first, min(first + batch_size - c[row], T))
            qc, kc, vc = (x[row, part].swapaxes(0, 1) for x in (q, k, v))  # [H, n, K or V]
            keep, carry, n = np.exp(g[row, part]).T, mu[row, part].T, qc.shape[1]  # [H, n]
            # 1 shares kept between two tokens, and from the mini-batch's start: a row from the one above
            G, U, past = np.zeros((H, n, n + 1)), np.zeros((H, n, n)), np.zeros((H, n, 1))
            for t in range(n):
                if t > 0:
                    G[:, t] = keep[:, t, None] * G[:, t - 1]
                    U[:, t] = carry[:, t, None] * U[:, t - 1]
                    past[:, t] = carry[:, t, None] * past[:, t - 1]
                else:
                    G[:, 0, n], past[:, 0] = keep[:, 0], carry[:, :1]
                G[:, t, t], U[:, t, t] = 1, 1
            gamma, G = G[..., n:], G[..., :n]  # [H, n, 1], [H, n, n]
            a = np.einsum("hti,hij->htj", G, past)  # [H, n, 1]
            # 2 surprises at the mini-batch's start, [n, K] @ [K, V], and what each weighs for each reader
            W = eta[row, part].T[..., None] * (vc - np.einsum("hik,hkv->hiv", kc, start[row]))
            L = np.einsum("hti,hij->htj", G, U)
            # 3 output: [n, n] @ [n, V], and what came before
            A = np.einsum("htk,hjk->htj", qc, kc) * L
            z = np.einsum("htj,hjv->htv", A, W) + gamma * np.einsum("htk,hkv->htv", qc, M[row])
            o[row, part] = (scale * (z + a * np.einsum("htk,hkv->htv", qc, P[row]))).swapaxes(0, 1)
            # 4 memory and momentum after the last of these tokens
            M[row] = gamma[:, -1:] * M[row] + a[:, -1:] * P[row]
            M[row] += np.einsum("hjk,hjv->hkv", kc, L[:, -1, :, None] * W)
            P[row] = past[:, -1:] * P[row] + np.einsum("hjk,hjv->hkv", kc, U[:, -1, :, None] * W)
            first, c[row] = part.stop, (c[row] + n) % batch_size
            if c[row] == 0:
                start[row] = M[row]
    return o, (M, P, start, c)


def step(q, k, v, *, g, mu, eta, state, batch_size=16, scale=None):
    r"""One token: the recurrence's body.

    Args:
        q: query, [B, H, K].
        k: key, [B, H, K].
        v: value, [B, H, V].
        g: log of the share of the memory that is kept, [B, H].
        mu: share of the momentum that is kept, [B, H].
        eta: learning rate, [B, H].
        state: (M, P, M', c) of the tokens before.
        batch_size: tokens whose gradients are taken at the same memory.
        scale: s; default 1.

    Returns:
        o, [B, H, V], and the state after the token.

    Cost: that of a token of `recurrent`.
    Source: Behrouz et al. 2025, arXiv:2501.00663.
    """
    o, state = recurrent(
        q[:, None], k[:, None], v[:, None], g=g[:, None], mu=mu[:, None], eta=eta[:, None],
        batch_size=batch_size, scale=scale, initial_state=state,
    )  # fmt: skip
    return o[:, 0], state


def cost(*, form, B, T, H, K, V, batch_size=16, itemsize=2):
    """FLOPs, bytes and state bytes of one form.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data. Bytes: q, k, v, g,
    mu, eta read once, o written once, the state written once in float32; it stays on chip.

    Args:
        form: "recurrent" or "dual".
        B, T, H, K, V: sizes.
        batch_size: tokens of a mini-batch.
        itemsize: bytes of an entry of q, k, v, g, mu, eta, o.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * (3 * B * H * K * V + B)
    if form == "recurrent":
        flops = B * T * H * (9 * K * V + 3 * V + 1)
    else:
        batches = [min(batch_size, T - start) for start in range(0, T, batch_size)]
        # G U and its rows; scores, weights and values; three read-outs and two writes; decay of M and P
        flops = (
            B
            * H
            * sum(
                2 * n**3 + n * n * (2 * K + 2 * V + 5) + n * (10 * K * V + 9 * V + 1) + 6 * K * V - 2
                for n in batches
            )
        )
    moved = B * T * H * (2 * K + 2 * V + 3)
    return {"flops": flops, "bytes": itemsize * moved + state_bytes, "state_bytes": state_bytes}


def _zeros(B, H, K, V):
    # no text yet
    return *(np.zeros((B, H, K, V)) for _ in range(3)), np.zeros(B)
