r"""A gated memory whose channels turn: GateLoop as gated linear attention with twice the channels.

.. math:: S_t = \operatorname{Diag}(e^{g_t + i\theta_t})\, S_{t-1} + k_t v_t^\top, \qquad
    o_t = s \operatorname{Re}(S_t)^\top q_t

With the angle :math:`\Theta_t = \sum_{r \le t} \theta_r` the turn leaves the state: q and k become
:math:`(\cos\Theta \odot x, \sin\Theta \odot x)`, and the engine `gated_decay` does the rest. In float32 an
angle of many radians has few digits left, so it is summed 32 tokens at a time, and what came before, summed
in float64, counts modulo 2 pi. Triton turns q and k in one launch, behind `effattn_lite::turn`, and decodes
in another.
"""

import math

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register
from effattn_lite.ops.engines.gated_decay import gated_decay

State = tuple[torch.Tensor, torch.Tensor]

SPAN = 32
"""Tokens over which an angle is summed before it is reduced modulo 2 pi."""


def gateloop(
    q, k, v, *, g, theta, scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl
):  # fmt: skip
    """Check the arguments of the op and run it; returns o and the parts of the final state or None.

    Args:
        q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V].
        g, theta: log decay and angle, [B, T, H, K], of any float dtype.
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the op.
    """
    sizes = _check(q, k, v, g, theta, "B T")
    check_cu_seqlens(cu_seqlens, *q.shape[:2])
    sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, q, sizes)
    wide = torch.promote_types(q.dtype, torch.float32)
    angle = _running_angle(theta.to(wide))
    end = angle[:, -1] if angle.shape[1] else angle.sum(1)
    if cu_seqlens is not None:
        angle, end = _from_starts(angle, cu_seqlens)
    # where there is no token there is nothing to launch
    if choose_impl(impl, q, refusal=_refusal(q, v)) == "triton" and q.numel():
        chosen, (q2, k2, g2) = "triton", torch.ops.effattn_lite.turn(q, k, g, angle)
    else:
        chosen, g2, v = "torch", torch.cat((g, g), dim=-1), v.to(wide)
        cos, sin = angle.cos(), angle.sin()
        q2, k2 = (torch.cat((cos * x, sin * x), dim=-1) for x in (q, k))
    P = None
    if initial_state is not None:
        real, imaginary = initial_state
        P = torch.cat((real, -imaginary), dim=2)
    o, P = gated_decay(
        q2, k2, v, g=g2, channel=True, scale=scale, initial_state=P, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=chosen,
    )  # fmt: skip
    if not output_final_state:
        return o.to(q.dtype), None
    # P is e^(-i Theta_T) S, its imaginary part negated: turn it back
    cos, sin = end.cos()[..., None], end.sin()[..., None]
    one, two = P.chunk(2, dim=2)
    return o.to(q.dtype), (cos * one + sin * two, sin * one - cos * two)


def gateloop_step(q, k, v, *, g, theta, state, scale, out_state, impl):
    """Check the arguments of one token's step and run it; returns o and the parts of the state after it.

    Args:
        q, k, v: [N, H, K], [N, H, K], [N, H, V].
        g, theta: log decay and angle, [N, H, K].
        state: real and imaginary part of S_{t-1}, each [N, H, K, V].
        out_state: where the next state is written; `state` itself is allowed; None allocates.
        scale, impl: as in the op.
    """
    sizes = _check(q, k, v, g, theta, "N")
    for name, S in (("state", state), ("out_state", out_state)):
        if S is not None:
            _check_state(name, S, q, sizes)
    refusal = _refusal(q, v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, theta, *state)):
        refusal = refusal or "no gradient (the step is for decoding)"
    if choose_impl(impl, q, refusal=refusal) == "triton":
        if out_state is None:
            out_state = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)
        elif not all(x.is_contiguous() for x in (*state, *out_state)):
            raise ValueError(f"out_state has strides {[x.stride() for x in out_state]}, expected contiguous")
        state = [x.contiguous() for x in state]
        return torch.ops.effattn_lite.gateloop_step(q, k, v, g, theta, *state, *out_state, scale), out_state
    real, imaginary = state
    wide = real.dtype
    size, angle = g.to(wide).exp()[..., None], theta.to(wide)[..., None]
    cos, sin = size * angle.cos(), size * angle.sin()
    kv = k.to(wide)[..., None] * v.to(wide)[..., None, :]
    new = cos * real - sin * imaginary + kv, sin * real + cos * imaginary
    o = (scale * (q.to(wide)[..., None] * new[0]).sum(-2)).to(q.dtype)
    return o, new if out_state is None else tuple(a.copy_(b) for a, b in zip(out_state, new, strict=True))


def _check(q, k, v, g, theta, rows):
    sizes = {}
    check_shape("q", q, f"{rows} H K", sizes)
    for name, x, axes in (("k", k, "H K"), ("v", v, "H V"), ("g", g, "H K"), ("theta", theta, "H K")):
        check_shape(name, x, f"{rows} {axes}", sizes)
        # gates may be wider than what they move
        check_alike(name, x, q, dtype=name in "kv")
    return sizes


def _check_state(name, state, q, sizes):
    wide = torch.promote_types(q.dtype, torch.float32)
    for part in state:
        check_shape(name, part, "N H K V", sizes)
        check_alike(name, part, q, dtype=False)
        if part.dtype != wide:
            raise TypeError(f"{name} is {part.dtype}, expected {wide}, since states are kept wide")


def _refusal(q, v):
    K, V = q.shape[-1], v.shape[-1]
    if 2 * K > 256 or V > 256:
        return f"K <= 128, since a channel has a real and an imaginary part, and V <= 256, got {K} and {V}"
    if q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 for bfloat16"
    return None


def _running_angle(theta):
    """Sums of theta over the tokens up to each, but for whole turns, [B, T, H, K]."""
    B, T, *rest = theta.shape
    if not T:
        return theta
    spans = -(-T // SPAN)
    padding = theta.new_zeros(B, spans * SPAN - T, *rest)
    theta = torch.cat((theta, padding), dim=1).unflatten(1, (spans, SPAN))
    total = theta.sum(2, dtype=torch.float64)
    before = torch.cat((torch.zeros_like(total[:, :1]), total[:, :-1]), dim=1).cumsum(1)
    # a turn more or less changes nothing, but costs digits
    before = before.remainder(2 * math.pi).to(theta.dtype)
    return (theta.cumsum(2) + before[:, :, None]).flatten(1, 2)[:, :T]


def _from_starts(angle, cu_seqlens):
    """Angles of packed sequences, [1, T, H, K], counted from each one's start, and those at their ends."""
    token = torch.arange(angle.shape[1], device=angle.device, dtype=cu_seqlens.dtype)
    owner = torch.searchsorted(cu_seqlens, token, right=True) - 1
    # row i holds the angle before token i
    before = torch.cat((torch.zeros_like(angle[0, :1]), angle[0]))
    starts, ends = before[cu_seqlens[:-1]], before[cu_seqlens[1:]]
    return angle - starts[owner], ends - starts


def _turn_run(q, k, g, angle):
    from effattn_lite.kernels import gateloop

    return gateloop.turn(q, k, g, angle)


def _turn_fake(q, k, g, angle):
    shape = (*q.shape[:-1], 2 * q.shape[-1])
    return q.new_empty(shape), k.new_empty(shape), g.new_empty(shape)


def _turn_backward_run(dq2, dk2, dg2, q, k, angle):
    from effattn_lite.kernels import gateloop

    return gateloop.turn_backward(dq2, dk2, dg2, q, k, angle)


def _turn_backward_fake(dq2, dk2, dg2, q, k, angle):
    return q.new_empty(q.shape), k.new_empty(k.shape), dg2.new_empty(q.shape), angle.new_empty(q.shape)


def _step_run(q, k, v, g, theta, real, imaginary, out_real, out_imaginary, scale):
    from effattn_lite.kernels import gateloop

    return gateloop.step(q, k, v, g, theta, real, imaginary, out_real, out_imaginary, scale)


def _step_fake(q, k, v, *rest):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, _, angle = inputs
    ctx.save_for_backward(q, k, angle)


def _turn_gradient(ctx, dq2, dk2, dg2):
    return torch.ops.effattn_lite.turn_backward(dq2, dk2, dg2, *ctx.saved_tensors)


register(
    "turn", "(Tensor q, Tensor k, Tensor g, Tensor angle) -> (Tensor, Tensor, Tensor)", _turn_run, _turn_fake
)
register(
    "turn_backward",
    "(Tensor dq2, Tensor dk2, Tensor dg2, Tensor q, Tensor k, Tensor angle)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _turn_backward_run,
    _turn_backward_fake,
)
register(
    "gateloop_step",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor theta, Tensor real, Tensor imaginary,"
    " Tensor(a!) out_real, Tensor(b!) out_imaginary, float scale) -> Tensor",
    _step_run,
    _step_fake,
)
torch.library.register_autograd("effattn_lite::turn", _turn_gradient, setup_context=_save)
