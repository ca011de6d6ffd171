r"""Linear attention with a constant decay: the engine of retnet, lightning_attention and rwkv5.

.. math:: S_t = \operatorname{Diag}(e^{g})\,S_{t-1} + k_t v_t^\top, \qquad
    o_t = s\,S_t^\top q_t \quad\text{or, with a bonus,}\quad
    o_t = s\,(S_{t-1} + \operatorname{Diag}(u)\,k_t v_t^\top)^\top q_t

g is [H], one decay a head, or [H, K], one a key channel. Eager torch, chunk by chunk, or two Triton launches
behind the operators `effattn_lite::decay` and `effattn_lite::decay_backward`.
"""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register

CHUNK = {1: 64, 2: 16}
"""Default chunk of the eager form by axes of g: decay a channel needs a table of [C, C, H, K]."""


def decay(q, k, v, *, g, u=None, scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl):
    """Check the arguments of an op and run it; returns o and the final state or None.

    Args:
        q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V].
        g: log decay, [H] or [H, K].
        u: bonus of the current token, [H, K]; None: a token reads the state after its own write.
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    _check(q, k, v, g, u, initial_state, cu_seqlens)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    # where there is no token there is nothing to launch
    if choose_impl(impl, q, refusal=_refusal(q, v, chunk_size)) == "triton" and q.shape[0] * q.shape[1]:
        o, state = torch.ops.effattn_lite.decay(
            q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size
        )
        return o, state if output_final_state else None
    o, state = _eager(q, k, v, g, u, scale, initial_state, cu_seqlens, chunk_size or CHUNK[g.ndim])
    return o, state if output_final_state else None


def decay_step(q, k, v, *, g, u=None, state, scale, out_state, impl):
    """Check the arguments of one token's step and run it; returns o and the state after it.

    Args:
        q, k, v: [N, H, K], [N, H, K], [N, H, V].
        g: log decay, [H] or [H, K].
        u: bonus, [H, K], or None.
        state: S_{t-1}, [N, H, K, V].
        out_state: where the next state is written; `state` itself is allowed; None allocates.
        scale, impl: as in the ops.
    """
    sizes = {}
    check_shape("q", q, "N H K", sizes)
    _check_tensors(q, {"k": (k, "N H K"), "v": (v, "N H V")}, sizes)
    _check_constants(q, g, u, sizes)
    _check_state("state", state, q, sizes)
    if out_state is not None:
        _check_state("out_state", out_state, q, sizes)
    tensors = [x for x in (q, k, v, g, u, state) if x is not None]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    refusal = _refusal(q, v, None) or ("no gradient (the step is for decoding)" if differentiated else None)
    if choose_impl(impl, q, refusal=refusal) == "triton":
        if out_state is None:
            out_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        elif not (out_state.is_contiguous() and state.is_contiguous()):
            raise ValueError(f"out_state has strides {out_state.stride()}, expected contiguous [N, H, K, V]")
        o = torch.ops.effattn_lite.decay_step(q, k, v, g, u, state.contiguous(), out_state, scale)
        return o, out_state
    o, new = _eager_step(q, k, v, g, u, state, scale)
    return o, new if out_state is None else out_state.copy_(new)


def _check(q, k, v, g, u, initial_state, cu_seqlens):
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    _check_tensors(q, {"k": (k, "B T H K"), "v": (v, "B T H V")}, sizes)
    _check_constants(q, g, u, sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if initial_state is not None:
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        _check_state("initial_state", initial_state, q, sizes)


def _check_tensors(q, tensors, sizes):
    for name, (x, axes) in tensors.items():
        check_shape(name, x, axes, sizes)
        check_alike(name, x, q)


def _check_constants(q, g, u, sizes):
    for name, x in (("g", g), ("u", u)):
        if x is not None:
            check_shape(name, x, "H" if x.ndim == 1 and u is None else "H K", sizes)
            check_alike(name, x, q, dtype=False)


def _check_state(name, state, q, sizes):
    check_shape(name, state, "N H K V", sizes)
    check_alike(name, state, q, dtype=False)
    wide = torch.promote_types(q.dtype, torch.float32)
    if state.dtype != wide:
        raise TypeError(f"{name} is {state.dtype}, expected {wide}, since states are kept wide")


def _refusal(q, v, chunk_size):
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > 256:
        return f"K and V <= 256, got {K} and {V}"
    if chunk_size is not None and (chunk_size < 16 or chunk_size & (chunk_size - 1)):
        return f"chunk_size a power of two from 16, got {chunk_size}"
    if q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 for bfloat16"
    return None


def _eager(q, k, v, g, u, scale, initial_state, cu_seqlens, C):
    wide = torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        parts = [x.to(wide) for x in (q, k, v)]
        g, u = g.to(wide), u.to(wide) if u is not None else None
        B, T, H, K = q.shape
        edges = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
        N = B if cu_seqlens is None else len(edges) - 1
        S = q.new_zeros(N, H, K, v.shape[-1], dtype=wide) if initial_state is None else initial_state
        outputs, states = [parts[2][:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            state = S if cu_seqlens is None else S[n : n + 1]
            for start in range(first, last, C):
                chunk = [x[:, start : min(start + C, last)] for x in parts]
                o, state = _chunk(*chunk, g, u, state)
                outputs.append(o)
            states.append(state)
        o = torch.cat(outputs, dim=1)
        return (scale * o).to(q.dtype), torch.cat(states)


def _chunk(q, k, v, g, u, S):
    n = q.shape[1]
    i = torch.arange(n, device=q.device, dtype=q.dtype)
    # a bonus means that token i reads what was there before it: one step less everywhere
    read = 0 if u is not None else 1
    w = g[:, None] if g.ndim == 1 else g  # [H, 1 or K]
    # 1 local decay: no exponent is positive
    lag = i[:, None] - i - (1 - read)  # [C, C]
    since = (w * (i[:, None, None] + read)).exp()  # [C, H, 1 or K]
    left = (w * (n - 1 - i[:, None, None])).exp()
    # 2 intra-chunk
    if g.ndim == 1:
        D = torch.where(lag >= 0, (g[:, None, None] * lag.clamp(min=0)).exp(), 0)  # [H, C, C]
        A = torch.einsum("bihk,bjhk->bhij", q, k) * D
    else:
        D = torch.where(lag[..., None, None] >= 0, (g * lag.clamp(min=0)[..., None, None]).exp(), 0)
        if u is not None:
            D = D + torch.where(lag[..., None, None] == -1, u, 0)
        A = torch.einsum("bihk,bijhk->bhij", q, k[:, None] * D)  # D [C, C, H, K]
    # 3 chunk state, 4 inter-chunk
    past = torch.einsum("bihk,bhkv->bihv", q * since, S)
    S = (w * n).exp()[..., None] * S + torch.einsum("bihk,bihv->bhkv", k * left, v)
    # 5 output
    return torch.einsum("bhij,bjhv->bihv", A, v) + past, S


def _eager_step(q, k, v, g, u, state, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    qw, kw, vw = (x.to(wide) for x in (q, k, v))
    w = (g[:, None] if g.ndim == 1 else g).to(wide).exp()[..., None]  # [H, 1 or K, 1]
    kv = kw[..., None] * vw[..., None, :]
    S = w * state + kv
    seen = S if u is None else state + u.to(wide)[..., None] * kv
    return (scale * (qw[..., None] * seen).sum(-2)).to(q.dtype), S


def _forward_run(q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    from effattn_lite.kernels import decay_launch

    return decay_launch.forward(
        q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size
    )


def _forward_fake(q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, q.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


def _backward_run(do, dht, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size, constants):
    from effattn_lite.kernels import decay_launch

    return decay_launch.backward(
        do, dht, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size, constants
    )


def _backward_fake(do, dht, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size, constants):
    def like(x):
        return q.new_empty(0 if x is None else x.shape, dtype=torch.float32)

    grads = (x.new_empty(x.shape) for x in (q, k, v))
    return (*grads, like(g), like(u), like(initial_state))


def _step_run(q, k, v, g, u, state, out_state, scale):
    from effattn_lite.kernels import decay_launch

    return decay_launch.step(q, k, v, g, u, state, out_state, scale)


def _step_fake(q, k, v, g, u, state, out_state, scale):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, scale, output_final_state, chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, output_final_state, chunk_size


def _backward(ctx, do, dht):
    q, k, v, g, u, initial_state, cu_seqlens = ctx.saved_tensors
    scale, output_final_state, chunk_size = ctx.options
    constants = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    dq, dk, dv, dg, du, dh0 = torch.ops.effattn_lite.decay_backward(
        do,
        dht if output_final_state else None,
        q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size, constants,
    )  # fmt: skip
    dg = dg.to(g.dtype)
    du = du.to(u.dtype) if u is not None else None
    return dq, dk, dv, dg, du, dh0 if initial_state is not None else None, None, None, None, None


_CONSTANTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? u"
_ARGUMENTS = f"{_CONSTANTS}, Tensor? initial_state, Tensor? cu_seqlens, float scale"
register(
    "decay",
    f"({_ARGUMENTS}, bool output_final_state, int? chunk_size) -> (Tensor, Tensor)",
    _forward_run,
    _forward_fake,
)
register(
    "decay_backward",
    f"(Tensor do, Tensor? dht, {_ARGUMENTS}, int? chunk_size, bool constants)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)
register(
    "decay_step",
    f"({_CONSTANTS}, Tensor state, Tensor(a!) out_state, float scale) -> Tensor",
    _step_run,
    _step_fake,
)
torch.library.register_autograd("effattn_lite::decay", _backward, setup_context=_save)
