r"""Test-time training: an inner model that descends on the tokens it reads, a mini-batch at a time.

.. math:: W_t = W_{t-1} - \eta_t\, k_t g_t^\top, \qquad
    g_t = \frac{\partial}{\partial z}\,\tfrac12 \lVert \mathrm{LN}(z) - (v_t - k_t) \rVert^2
    \text{ at } z = k_t W' + b'

Eager torch, mini-batch by mini-batch in the dual form, or Triton behind the operators
`effattn_lite::ttt_linear` and `effattn_lite::ttt_linear_backward`.
"""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register
from effattn_lite.ops.engines.common import check_state, count_after, descend

EPS = 1e-6
"""Added to the variance in the layer norm."""

EVERY = 16
"""Of so many mini-batches the forward keeps one inner model; the backward makes the others again."""


def ttt_linear(
    q, k, v, *, w, b, eta, ln_weight, ln_bias, batch_size, scale, initial_state, output_final_state,
    cu_seqlens, impl,
):  # fmt: skip
    """Check the arguments of the op and run it; returns o and the final state (S, s, D, d, c) or None.

    Args:
        q, k, v: [B, T, H, K].
        w, b, ln_weight, ln_bias: [H, K, K], [H, K], [H, K], [H, K].
        eta: [B, T, H].
        batch_size, scale, initial_state, output_final_state, cu_seqlens, impl: as in the op.
    """
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    _check(q, k, v, w, b, eta, ln_weight, ln_bias, batch_size, "B T", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if initial_state is not None:
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        check_state("initial_state", initial_state, q, sizes, PARTS)
    if choose_impl(impl, q, refusal=_refusal(q, batch_size)) == "triton" and q.shape[0] * q.shape[1]:
        inner = (w, b, eta, ln_weight, ln_bias)
        return _launch(q, k, v, inner, batch_size, scale, initial_state, output_final_state, cu_seqlens)
    wide = torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        tokens = [x.to(wide) for x in (q, k, v, eta)]
        tokens[0] = tokens[0] if scale is None else scale * tokens[0]
        base = (w.to(wide), b.to(wide))
        norm = (ln_weight.to(wide), ln_bias.to(wide))
        o, state = descend(
            lambda *x: _minibatch(*x, *norm), tokens, base, initial_state, batch_size, cu_seqlens
        )
    return o.to(q.dtype), state if output_final_state else None


PARTS = {"S": "N H K K", "s": "N H K", "D": "N H K K", "d": "N H K", "c": "N"}
"""Parts of the state of TTT-Linear."""


def _minibatch(tokens, start, now, ln_weight, ln_bias):
    q, k, v, eta = tokens
    # 1 gradients of all tokens at the mini-batch's start
    z = torch.einsum("bihk,bhkv->bihv", k, start[0]) + start[1][:, None]
    h = eta[..., None] * gradient(z, v - k, ln_weight, ln_bias)
    # 2 what token i reads of the steps up to its own; the 1 is the bias
    A = (torch.einsum("bihk,bjhk->bhij", q, k) + 1).tril()
    z = torch.einsum("bihk,bhkv->bihv", q, now[0]) + now[1][:, None] - torch.einsum("bhij,bjhv->bihv", A, h)
    o = q + ln_weight * normalised(z)[0] + ln_bias
    # 3 all steps at once
    return o, (torch.einsum("bihk,bihv->bhkv", k, h), h.sum(1))


def normalised(z):
    """z without its mean, over its standard deviation, and that deviation; over the last axis."""
    z = z - z.mean(-1, keepdim=True)
    sigma = (z.square().mean(-1, keepdim=True) + EPS).sqrt()
    return z / sigma, sigma


def gradient(z, target, ln_weight, ln_bias):
    """Gradient of half the squared error of LN(z) by z; see the reference."""
    z, sigma = normalised(z)
    u = ln_weight * (ln_weight * z + ln_bias - target)
    return (u - u.mean(-1, keepdim=True) - z * (u * z).mean(-1, keepdim=True)) / sigma


def _refusal(q, batch_size):
    most = 32 if q.dtype == torch.float32 else 64
    if q.shape[-1] > most:
        return f"K <= {most} in {q.dtype}, got {q.shape[-1]}"
    if batch_size > 64:
        return f"batch_size <= 64, got {batch_size}"
    if q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 for bfloat16"
    return None


def _launch(q, k, v, inner, batch_size, scale, initial_state, output_final_state, cu_seqlens):
    *state, c = initial_state or (None,) * 5
    count = None if c is None else c.detach().round().to(torch.int32).clamp(0, batch_size - 1)
    tensors = [q if scale is None else (scale * q).to(q.dtype), k, v, *inner, *state]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)
    # a sequence begins at slot (its first token) // (tokens a slot) + 2 n, and is never longer than that
    slots = q.shape[0] * q.shape[1] // (batch_size * EVERY) + 2 * N + 1 if keep else 0
    o, *final = torch.ops.effattn_lite.ttt_linear(
        *tensors, count, cu_seqlens, batch_size, output_final_state, slots
    )
    if not output_final_state:
        return o, None
    c = q.new_zeros(N, dtype=torch.float32) if c is None else c
    tokens = q.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    return o, (*final[:4], count_after(c, tokens, batch_size))


def ttt_linear_step(q, k, v, *, w, b, eta, ln_weight, ln_bias, state, batch_size, scale, out_state, impl):
    """Check the arguments of one token's step and run it; returns o and the state after it."""
    sizes = {}
    check_shape("q", q, "N H K", sizes)
    _check(q, k, v, w, b, eta, ln_weight, ln_bias, batch_size, "N", sizes)
    check_state("state", state, q, sizes, PARTS)
    if out_state is not None:
        check_state("out_state", out_state, q, sizes, PARTS)
    o, new = ttt_linear(
        q[:, None], k[:, None], v[:, None], w=w, b=b, eta=eta[:, None], ln_weight=ln_weight, ln_bias=ln_bias,
        batch_size=batch_size, scale=scale, initial_state=state, output_final_state=True, cu_seqlens=None,
        impl=impl,
    )  # fmt: skip
    return o[:, 0], new if out_state is None else tuple(
        a.copy_(b) for a, b in zip(out_state, new, strict=True)
    )


def _check(q, k, v, w, b, eta, ln_weight, ln_bias, batch_size, first, sizes):
    for name, x in (("k", k), ("v", v)):
        check_shape(name, x, f"{first} H K", sizes)
        check_alike(name, x, q)
    for name, x, axes in (
        ("w", w, "H K K"), ("b", b, "H K"), ("eta", eta, f"{first} H"), ("ln_weight", ln_weight, "H K"),
        ("ln_bias", ln_bias, "H K"),
    ):  # fmt: skip
        check_shape(name, x, axes, sizes)
        check_alike(name, x, q, dtype=False)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")


def _forward_run(q, k, v, w, b, eta, gamma, beta, S, s, D, d, count, cu_seqlens, batch_size, final, slots):
    from effattn_lite.kernels import ttt_linear_launch

    return ttt_linear_launch.forward(
        q, k, v, (w, b, gamma, beta), eta, (S, s, D, d), count, cu_seqlens, batch_size, EVERY, final, slots
    )


def _forward_fake(q, k, v, w, b, eta, gamma, beta, S, s, D, d, count, cu_seqlens, batch_size, final, slots):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    H, K = q.shape[2:]

    def models(n, wanted):
        shapes = ((n, H, K, K), (n, H, K)) if wanted else ((0,), (0,))
        return [q.new_empty(shape, dtype=torch.float32) for shape in shapes]

    return v.new_empty(v.shape), *models(N, final), *models(N, final), *models(slots, slots)


def _backward_run(
    do, dS, ds, dD, dd, kept_W, kept_b, q, k, v, w, b, eta, gamma, beta, S, s, D, d, count, cu_seqlens,
    batch_size,
):  # fmt: skip
    from effattn_lite.kernels import ttt_linear_launch

    return ttt_linear_launch.backward(
        do, (dS, ds, dD, dd), q, k, v, (w, b, gamma, beta), eta, (S, s, D, d), count, cu_seqlens, batch_size,
        EVERY, (kept_W, kept_b),
    )  # fmt: skip


def _backward_fake(
    do, dS, ds, dD, dd, kept_W, kept_b, q, k, v, w, b, eta, gamma, beta, S, s, D, d, count, cu_seqlens,
    batch_size,
):  # fmt: skip
    def like(x):
        return q.new_empty(0 if x is None else x.shape, dtype=torch.float32)

    return *(x.new_empty(x.shape) for x in (q, k, v)), *map(like, (w, b, eta, gamma, beta, S, s, D, d))


def _save(ctx, inputs, output):
    *tensors, batch_size, final, _ = inputs
    ctx.save_for_backward(*tensors, *output[5:])
    ctx.options = batch_size, final
    ctx.mark_non_differentiable(*output[5:])


def _backward(ctx, do, dS, ds, dD, dd, *_):
    *tensors, kept_W, kept_b = ctx.saved_tensors
    batch_size, final = ctx.options
    dfinal = (dS, ds, dD, dd) if final else (None,) * 4
    grads = torch.ops.effattn_lite.ttt_linear_backward(do, *dfinal, kept_W, kept_b, *tensors, batch_size)
    grads = [None if x is None else dx.to(x.dtype) for x, dx in zip(tensors[:12], grads, strict=True)]
    return *grads, None, None, None, None, None


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor w, Tensor b, Tensor eta, Tensor ln_weight, Tensor ln_bias,"
    " Tensor? S, Tensor? s, Tensor? D, Tensor? d, Tensor? count, Tensor? cu_seqlens, int batch_size"
)
register(
    "ttt_linear",
    f"({_ARGUMENTS}, bool final, SymInt slots) -> ({', '.join(['Tensor'] * 7)})",
    _forward_run,
    _forward_fake,
)
register(
    "ttt_linear_backward",
    "(Tensor do, Tensor? dS, Tensor? ds, Tensor? dD, Tensor? dd, Tensor kept_W, Tensor kept_b,"
    f" {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 12)})",
    _backward_run,
    _backward_fake,
)
torch.library.register_autograd("effattn_lite::ttt_linear", _backward, setup_context=_save)
