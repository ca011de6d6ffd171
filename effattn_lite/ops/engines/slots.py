r"""Attention to memory slots in two passes of gated linear attention: the engine of gsa and abc.

.. math:: \tilde K_t = \tilde K_{t-1} \operatorname{Diag}(e^{g_t}) + k_t s_t^\top, \qquad
    \tilde V_t = \operatorname{Diag}(e^{g_t})\, \tilde V_{t-1} + s_t v_t^\top, \qquad
    o_t = \tilde V_t^\top \operatorname{softmax}(s\, \tilde K_t^\top q_t)

ABC's gates come from a running sum of weights: :math:`e^{g_t} = 1 - w_t` and :math:`s_t = w_t`, the token's
share of it. Eager torch, chunk by chunk, or Triton behind the operators `effattn_lite::slots` and
`slots_shares`, their backwards, and `slots_step`.
"""

import torch
from torch.nn import functional as F

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register
from effattn_lite.ops.engines.common import check_state

CHUNK = 16
"""Default chunk of the eager form, which has a table of [B, C, C, H, M]."""

PARTS = {"K~": "N H K M", "V~": "N H M V"}
SHARES = PARTS | {"z": "N H M", "c": "N H"}
"""Axes of the states of gsa and of abc."""

EMPTY = 1e4
"""How much less than the first token's weight, in nats, an empty memory weighs: e^-EMPTY is 0."""


def slots(q, k, v, *, s, g, scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl):
    """Check the arguments of an op and run it; returns o and the final state or None.

    Args:
        q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V].
        s: what a token writes to each slot, [B, T, H, M]; with g None the log of its weight.
        g: log decay, [B, T, H, M]; None: the slots are running averages, as in abc.
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    _check(q, k, v, s, g, "B T", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if initial_state is not None:
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        check_state("initial_state", initial_state, q, sizes, SHARES if g is None else PARTS)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    # where there is no token there is nothing to launch
    fused = choose_impl(impl, q, refusal=_refusal(q, v, s, chunk_size)) == "triton"
    fused = fused and q.shape[0] * q.shape[1] > 0
    Sk, Sv, *tail = initial_state or (None,) * (4 if g is None else 2)
    if g is None:
        s, g, *tail = _shares(s, *tail, cu_seqlens, fused)
    if fused:
        o, Sk, Sv, _ = torch.ops.effattn_lite.slots(
            q, k, v, s, g, Sk, Sv, cu_seqlens, scale, output_final_state, chunk_size
        )
    else:
        o, (Sk, Sv) = _eager(q, k, v, s, g, scale, Sk, Sv, cu_seqlens, chunk_size or CHUNK)
    return o, (Sk, Sv, *tail) if output_final_state else None


def slots_step(q, k, v, *, s, g, state, scale, out_state, impl):
    """Check the arguments of one token's step and run it; returns o and the state after it.

    Args:
        q, k, v: [N, H, K], [N, H, K], [N, H, V].
        s, g: as above, [N, H, M]; g None: running averages.
        state: of two parts, of four with g None.
        out_state: where the next state is written; `state` itself is allowed; None allocates.
        scale, impl: as in the ops.
    """
    sizes, parts = {}, SHARES if g is None else PARTS
    check_shape("q", q, "N H K", sizes)
    _check(q, k, v, s, g, "N", sizes)
    check_state("state", state, q, sizes, parts)
    if out_state is not None:
        check_state("out_state", out_state, q, sizes, parts)
    tensors = [x for x in (q, k, v, s, g, *state) if x is not None]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    refusal = _refusal(q, v, s, None)
    refusal = refusal or ("no gradient (the step is for decoding)" if differentiated else None)
    if choose_impl(impl, q, refusal=refusal) == "triton":
        if out_state is None:
            out_state = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)
        elif not all(x.is_contiguous() for x in (*out_state, *state)):
            raise ValueError(f"out_state has strides {[x.stride() for x in out_state]}, expected contiguous")
        padding = (None,) * (4 - len(parts))
        state = (*(x.contiguous() for x in state), *padding)
        o = torch.ops.effattn_lite.slots_step(q, k, v, s, g, *state, *out_state, *padding, scale)
        return o, out_state
    Sk, Sv, *tail = state
    s = s[:, None]
    s, g, *tail = _shares(s, *tail, None, False) if g is None else (s, g[:, None])
    o, (Sk, Sv) = _eager(q[:, None], k[:, None], v[:, None], s, g, scale, Sk, Sv, None, 1)
    new = (Sk, Sv, *tail)
    if out_state is not None:
        new = tuple(a.copy_(b) for a, b in zip(out_state, new, strict=True))
    return o[:, 0], new


def _check(q, k, v, s, g, rows, sizes):
    for name, x, axes in (("k", k, "H K"), ("v", v, "H V"), ("s", s, "H M")):
        check_shape(name, x, f"{rows} {axes}", sizes)
        check_alike(name, x, q)
    if g is not None:
        check_shape("g", g, f"{rows} H M", sizes)
        check_alike("g", g, q, dtype=False)


def _refusal(q, v, s, chunk_size):
    K, V, M = q.shape[-1], v.shape[-1], s.shape[-1]
    if max(K, V, M) > 256:
        return f"K, V and M <= 256, got {K}, {V} and {M}"
    if chunk_size is not None and (chunk_size < 16 or chunk_size & (chunk_size - 1)):
        return f"chunk_size a power of two from 16, got {chunk_size}"
    if q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 for bfloat16"
    return None


def _shares(s, z, c, cu_seqlens, fused):
    # (w, log(1 - w), z, c): every token's share of the running sum of e^s, and the sum's log after the text
    wide = torch.promote_types(s.dtype, torch.float32)
    B, T, H, M = s.shape
    edges = [0, T] if cu_seqlens is None or fused else cu_seqlens.tolist()
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    z, c = (z, c) if c is not None else (s.new_zeros(N, H, M, dtype=wide), s.new_zeros(N, H, dtype=wide))
    count = c + (T if cu_seqlens is None else cu_seqlens.diff()[:, None])
    if fused:
        return *torch.ops.effattn_lite.slots_shares(s, z, c, cu_seqlens), count
    s, parts = s.to(wide), []
    for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        one = slice(None) if cu_seqlens is None else slice(n, n + 1)
        parts.append(_running(s[:, first:last], z[one], c[one]))
    w, g, z = zip(*parts, strict=True)
    return torch.cat(w, dim=1), torch.cat(g, dim=1), torch.cat(z), count


def _running(s, z, c):
    if not s.shape[1]:
        return s, s, z
    start = torch.where(c[..., None] > 0, z, s[:, 0].detach() - EMPTY)
    past = torch.cat((start[:, None], s), dim=1).logcumsumexp(1)
    # log of the odds of the token against all before it: its share keeps its digits however small it is
    odds = s - past[:, :-1]
    return odds.sigmoid(), F.logsigmoid(-odds), past[:, -1]


def _eager(q, k, v, s, g, scale, Sk, Sv, cu_seqlens, C):
    wide = torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        # contiguous: a sum along strided memory may add in another order
        parts = [x.to(wide).contiguous() for x in (q, k, v, s, g)]
        B, T, H, K = q.shape
        V, M = v.shape[-1], s.shape[-1]
        edges = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
        N = B if cu_seqlens is None else len(edges) - 1
        Sk = q.new_zeros(N, H, K, M, dtype=wide) if Sk is None else Sk
        Sv = q.new_zeros(N, H, M, V, dtype=wide) if Sv is None else Sv
        outputs, states = [parts[2][:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            state = (Sk, Sv) if cu_seqlens is None else (Sk[n : n + 1], Sv[n : n + 1])
            for start in range(first, last, C):
                o, *state = _chunk(*(x[:, start : min(start + C, last)] for x in parts), scale, *state)
                outputs.append(o)
            states.append(state)
        final = tuple(torch.cat(part) for part in zip(*states, strict=True))
        return torch.cat(outputs, dim=1).to(q.dtype), final


def _chunk(q, k, v, s, g, scale, Sk, Sv):
    # 1 local decay: sums of gates, one by one, so that no digit cancels; no exponent is positive
    i = torch.arange(q.shape[1], device=q.device)
    lag = (i[:, None] - i)[None, :, :, None, None]
    between = torch.where(lag > 0, g[:, :, None], 0).cumsum(1)
    P = torch.where(lag >= 0, between, -torch.inf).exp() * s[:, None]  # [B, C, C, H, M]
    since = g.cumsum(1).exp()
    left = (g.flip(1).cumsum(1).flip(1)[:, 1:]).exp()
    w = s * torch.cat((left, torch.ones_like(g[:, :1])), dim=1)
    # 2 intra-chunk and 4 inter-chunk of the first pass: scores of the slots
    x = torch.einsum("bijh,bijhm->bihm", torch.einsum("bihk,bjhk->bijh", q, k), P)
    x = x + since * torch.einsum("bihk,bhkm->bihm", q, Sk)
    p = (scale * x).softmax(-1)
    # 2, 4 and 5 output of the second pass: values of the slots
    A = torch.einsum("bihm,bijhm->bijh", p, P)
    o = torch.einsum("bijh,bjhv->bihv", A, v) + torch.einsum("bihm,bhmv->bihv", p * since, Sv)
    # 3 chunk states
    kept = g.sum(1).exp()
    Sk = kept[..., None, :] * Sk + torch.einsum("bihk,bihm->bhkm", k, w)
    Sv = kept[..., None] * Sv + torch.einsum("bihm,bihv->bhmv", w, v)
    return o, Sk, Sv


def _launch(name):
    def run(*arguments):
        from effattn_lite.kernels import slots_launch

        return getattr(slots_launch, name)(*arguments)

    return run


def _slots_fake(q, k, v, s, g, Sk, Sv, cu_seqlens, scale, output_final_state, chunk_size):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    H, K, V, M = q.shape[2], q.shape[3], v.shape[3], s.shape[3]
    shapes = ((N, H, K, M), (N, H, M, V)) if output_final_state else ((0,), (0,))
    state = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return v.new_empty(v.shape), *state, s.new_empty(s.shape)


def _slots_backward_fake(do, dSk, dSv, p, q, k, v, s, g, Sk, Sv, cu_seqlens, scale, chunk_size):
    def like(x):
        return q.new_empty(0 if x is None else x.shape, dtype=torch.float32)

    return *(x.new_empty(x.shape) for x in (q, k, v, s)), *map(like, (g, Sk, Sv))


def _shares_fake(s, z, c, cu_seqlens):
    return s.new_empty(s.shape), s.new_empty(s.shape, dtype=torch.float32), z.new_empty(z.shape)


def _shares_backward_fake(dw, dg, dz, g, c, cu_seqlens):
    return dw.new_empty(dw.shape), dz.new_empty(dz.shape)


def _step_fake(q, k, v, s, g, Sk, Sv, z, c, out_Sk, out_Sv, out_z, out_c, scale):
    return v.new_empty(v.shape)


def _slots_save(ctx, inputs, output):
    *tensors, scale, output_final_state, chunk_size = inputs
    ctx.save_for_backward(output[3], *tensors)
    ctx.options = scale, output_final_state, chunk_size
    ctx.mark_non_differentiable(output[3])


def _slots_gradient(ctx, do, dSk, dSv, _):
    tensors, (scale, output_final_state, chunk_size) = ctx.saved_tensors, ctx.options
    final = (dSk, dSv) if output_final_state else (None, None)
    *grads, dg, dSk, dSv = torch.ops.effattn_lite.slots_backward(do, *final, *tensors, scale, chunk_size)
    g, Sk, Sv = tensors[5:8]
    states = (None if x is None else dx for x, dx in ((Sk, dSk), (Sv, dSv)))
    return *grads, dg.to(g.dtype), *states, None, None, None, None


def _shares_save(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs[2:])


def _shares_gradient(ctx, dw, dg, dz):
    ds, dz = torch.ops.effattn_lite.slots_shares_backward(dw, dg, dz, *ctx.saved_tensors)
    return ds, dz, None, None


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor s, Tensor g, Tensor? Sk, Tensor? Sv, Tensor? cu_seqlens"
register(
    "slots",
    f"({_TENSORS}, float scale, bool output_final_state, int? chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch("forward"),
    _slots_fake,
)
register(
    "slots_backward",
    f"(Tensor do, Tensor? dSk, Tensor? dSv, Tensor p, {_TENSORS}, float scale, int? chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch("backward"),
    _slots_backward_fake,
)
register(
    "slots_shares",
    "(Tensor s, Tensor z, Tensor c, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _launch("shares"),
    _shares_fake,
)
register(
    "slots_shares_backward",
    "(Tensor dw, Tensor dg, Tensor dz, Tensor g, Tensor c, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _launch("shares_backward"),
    _shares_backward_fake,
)
register(
    "slots_step",
    "(Tensor q, Tensor k, Tensor v, Tensor s, Tensor? g, Tensor Sk, Tensor Sv, Tensor? z, Tensor? c,"
    " Tensor(a!) out_Sk, Tensor(b!) out_Sv, Tensor(c!)? out_z, Tensor(d!)? out_c, float scale) -> Tensor",
    _launch("step"),
    _step_fake,
)
torch.library.register_autograd("effattn_lite::slots", _slots_gradient, setup_context=_slots_save)
torch.library.register_autograd("effattn_lite::slots_shares", _shares_gradient, setup_context=_shares_save)
