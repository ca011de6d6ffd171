"""TTT-MLP: the state is a two-layer network with a layer norm, trained on the tokens as they are read."""

import math

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl
from effattn_lite.ops.engines.common import check_state, descend
from effattn_lite.ops.engines.ttt_linear import gradient, normalised

MODEL = {"W1": "N H K M", "b1": "N H M", "W2": "N H M K", "b2": "N H K"}
PARTS = MODEL | {f"recent {name}": axes for name, axes in MODEL.items()} | {"c": "N"}
State = tuple[torch.Tensor, ...]


def ttt_mlp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    eta: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    batch_size: int = 16,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""An inner network z + LN(gelu(z W_1 + b_1) W_2 + b_2) learns to turn keys into values while it is read.

    .. math:: \theta_t = \theta_{t-1} - \eta_t\, \nabla_\theta\,
        \tfrac12 \lVert f(k_t; \theta') - v_t \rVert^2, \qquad o_t = f(s q_t; \theta_t)

    where theta' is the inner network after the last whole mini-batch.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16, float16 or float64.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, K].
        w1, b1: first inner layer that a text begins with, [H, K, M] and [H, M]; M = 4 K in the paper.
        w2, b2: second inner layer that a text begins with, [H, M, K] and [H, K].
        eta: learning rate of each token's own step, [B, T, H], >= 0.
        ln_weight: weight of the inner layer norm, [H, K].
        ln_bias: bias of the inner layer norm, [H, K].
        batch_size: tokens whose gradients are taken at the same inner network.
        scale: s; default 1.
        initial_state: as the state returned, float32; default zeros; its gradient is returned.
        output_final_state: return the state after the text as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, K], dtype of q; and None or the state, float32 (float64 for float64): W_1, b_1, W_2, b_2
        less those that the text began with, the part of each that the present mini-batch has added, and the
        tokens c of that, [N].

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: B T H (14 K M + 4 n (K + M)) FLOPs in mini-batches of n; 16 B H K M bytes of state.
    Source: Sun et al. 2024, arXiv:2407.04620; layer norm, biases, tanh-gelu and the half in the loss as in
    the authors' released code. Differs: that multiplies all that the t-th token of a mini-batch reads of its
    steps by a learned number, 1/t at first.
    """
    sizes, layers, norm = {}, (w1, b1, w2, b2), (ln_weight, ln_bias)
    check_shape("q", q, "B T H K", sizes)
    _check(q, k, v, layers, eta, norm, batch_size, "B T", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if initial_state is not None:
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        check_state("initial_state", initial_state, q, sizes, PARTS)
    choose_impl(impl if impl != "triton" else _no_kernel(), q)
    wide = torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        tokens = [x.to(wide) for x in (q, k, v, eta)]
        tokens[0] = tokens[0] if scale is None else scale * tokens[0]
        base, norm = (tuple(x.to(wide) for x in part) for part in (layers, norm))
        o, state = descend(
            lambda *x: _minibatch(*x, *norm), tokens, base, initial_state, batch_size, cu_seqlens
        )
    return o.to(q.dtype), state if output_final_state else None


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    eta: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    state: State,
    batch_size: int = 16,
    scale: float | None = None,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of TTT-MLP, for decoding.

    .. math:: \theta_t = \theta_{t-1} - \eta_t\, \nabla_\theta\,
        \tfrac12 \lVert f(k_t; \theta') - v_t \rVert^2, \qquad o_t = f(s q_t; \theta_t)

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, K].
        w1, b1, w2, b2: inner layers that a text begins with, as in the op.
        eta: learning rate, [N, H].
        ln_weight: weight of the inner layer norm, [H, K].
        ln_bias: bias of the inner layer norm, [H, K].
        state: that of the tokens before, float32.
        batch_size: tokens whose gradients are taken at the same inner network.
        scale: s; default 1.
        out_state: tensors that receive the next state; `state` itself updates in place; default new ones.
        impl: "auto" or "torch".

    Returns:
        o, [N, H, K], and the state after the token.

    Cost: 22 N H K M FLOPs; reads and writes 16 N H K M bytes of state.
    Source: Sun et al. 2024, arXiv:2407.04620.
    """
    sizes = {}
    check_shape("q", q, "N H K", sizes)
    _check(q, k, v, (w1, b1, w2, b2), eta, (ln_weight, ln_bias), batch_size, "N", sizes)
    for name, x in (("state", state), ("out_state", out_state)):
        if x is not None:
            check_state(name, x, q, sizes, PARTS)
    o, new = ttt_mlp(
        q[:, None], k[:, None], v[:, None], w1=w1, b1=b1, w2=w2, b2=b2, eta=eta[:, None], ln_weight=ln_weight,
        ln_bias=ln_bias, batch_size=batch_size, scale=scale, initial_state=state, output_final_state=True,
        impl=impl,
    )  # fmt: skip
    return o[:, 0], new if out_state is None else tuple(
        a.copy_(b) for a, b in zip(out_state, new, strict=True)
    )


def _no_kernel():
    raise NotImplementedError("ttt_mlp has no kernel; use impl='torch'")


def _check(q, k, v, layers, eta, norm, batch_size, first, sizes):
    for name, x in (("k", k), ("v", v)):
        check_shape(name, x, f"{first} H K", sizes)
        check_alike(name, x, q)
    named = dict(zip(("w1", "b1", "w2", "b2"), zip(layers, MODEL.values(), strict=True), strict=True))
    named = {name: (x, axes.removeprefix("N ")) for name, (x, axes) in named.items()}
    named |= {"eta": (eta, f"{first} H"), "ln_weight": (norm[0], "H K"), "ln_bias": (norm[1], "H K")}
    for name, (x, axes) in named.items():
        check_shape(name, x, axes, sizes)
        check_alike(name, x, q, dtype=False)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")


def _minibatch(tokens, start, now, ln_weight, ln_bias):
    q, k, v, eta = tokens
    # 1 gradients of all tokens at the mini-batch's start
    a = torch.einsum("bihk,bhkm->bihm", k, start[0]) + start[1][:, None]
    x, slope = _gelu(a)
    z = torch.einsum("bihm,bhmk->bihk", x, start[2]) + start[3][:, None]
    h2 = eta[..., None] * gradient(z, v - k, ln_weight, ln_bias)
    h1 = slope * torch.einsum("bihk,bhmk->bihm", h2, start[2])
    # 2 what token i reads of the steps up to its own, in both layers; the 1 is the bias
    A = (torch.einsum("bihk,bjhk->bhij", q, k) + 1).tril()
    a = torch.einsum("bihk,bhkm->bihm", q, now[0]) + now[1][:, None] - torch.einsum("bhij,bjhm->bihm", A, h1)
    a = _gelu(a)[0]
    A = (torch.einsum("bihm,bjhm->bhij", a, x) + 1).tril()
    z = torch.einsum("bihm,bhmk->bihk", a, now[2]) + now[3][:, None] - torch.einsum("bhij,bjhk->bihk", A, h2)
    o = q + ln_weight * normalised(z)[0] + ln_bias
    # 3 all steps at once
    steps = (
        torch.einsum("bihk,bihm->bhkm", k, h1),
        h1.sum(1),
        torch.einsum("bihm,bihk->bhmk", x, h2),
        h2.sum(1),
    )
    return o, steps


def _gelu(x):
    # gelu by tanh, and its derivative: half is sigmoid(2 u), so half' = 2 half (1 - half) u'
    c = math.sqrt(2 / math.pi)
    half = 0.5 + 0.5 * torch.tanh(c * x * (1 + 0.044715 * x * x))
    return x * half, half + 2 * x * half * (1 - half) * c * (1 + 3 * 0.044715 * x * x)
