r"""Linear attention whose decay depends on the token: the engine of mamba2, gla, hgrn2 and rwkv6.

.. math:: S_t = \operatorname{Diag}(e^{g_t})\,S_{t-1} + k_t v_t^\top, \qquad
    o_t = s\,S_t^\top q_t \quad\text{or, with a bonus,}\quad
    o_t = s\,(S_{t-1} + \operatorname{Diag}(u)\,k_t v_t^\top)^\top q_t

g is [B, T, HV], one gate a head, whose value heads may share q and k, or [B, T, H, K], one a key channel.
Eager torch, chunk by chunk, or two Triton launches behind the operators `effattn_lite::gated_decay` and
`effattn_lite::gated_decay_backward`.
"""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register

CHUNK = {3: 64, 4: 16}
"""Default chunk of the eager form by axes of g: a gate a channel needs a table of [B, C, C, H, K]."""


def gated_decay(
    q, k, v, *, g, u=None, channel, scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl
):  # fmt: skip
    """Check the arguments of an op and run it; returns o and the final state or None.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V]; HV is H with a gate a channel, else a multiple of it.
        g: log decay, [B, T, H, K] with a gate a channel, else [B, T, HV].
        u: bonus of the current token, [H, K], with a gate a channel; None: a token reads after its write.
        channel: whether every key channel has its gate.
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    _check(q, k, v, g, u, channel, initial_state, cu_seqlens)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    # where there is no token there is nothing to launch
    if choose_impl(impl, q, refusal=_refusal(q, v, chunk_size)) == "triton" and q.shape[0] * q.shape[1]:
        o, state = torch.ops.effattn_lite.gated_decay(
            q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size
        )
        return o, state if output_final_state else None
    o, state = _eager(q, k, v, g, u, scale, initial_state, cu_seqlens, chunk_size or CHUNK[g.ndim])
    return o, state if output_final_state else None


def gated_decay_step(q, k, v, *, g, u=None, channel, state, scale, out_state, impl):
    """Check the arguments of one token's step and run it; returns o and the state after it.

    Args:
        q, k: [N, H, K].
        v: [N, HV, V].
        g: log decay, [N, H, K] with a gate a channel, else [N, HV].
        u: bonus, [H, K], or None.
        state: S_{t-1}, [N, HV, K, V].
        out_state: where the next state is written; `state` itself is allowed; None allocates.
        channel: as above; scale, impl: as in the ops.
    """
    sizes = {}
    check_shape("q", q, "N H K", sizes)
    _check_gated(q, k, v, g, u, channel, "N", sizes)
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
            raise ValueError(f"out_state has strides {out_state.stride()}, expected contiguous [N, HV, K, V]")
        o = torch.ops.effattn_lite.gated_decay_step(q, k, v, g, u, state.contiguous(), out_state, scale)
        return o, out_state
    o, new = _eager_step(q, k, v, g, u, state, scale)
    return o, new if out_state is None else out_state.copy_(new)


def _check(q, k, v, g, u, channel, initial_state, cu_seqlens):
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    _check_gated(q, k, v, g, u, channel, "B T", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if initial_state is not None:
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        _check_state("initial_state", initial_state, q, sizes)


def _check_gated(q, k, v, g, u, channel, rows, sizes):
    if channel:
        sizes["HV"] = sizes["H"]
    for name, x, axes in (("k", k, "H K"), ("v", v, "HV V")):
        check_shape(name, x, f"{rows} {axes}", sizes)
        check_alike(name, x, q)
    if sizes["H"] == 0 or sizes["HV"] % sizes["H"]:
        raise ValueError(f"v has {sizes['HV']} heads, expected a multiple of q's {sizes['H']}")
    check_shape("g", g, f"{rows} H K" if channel else f"{rows} HV", sizes)
    check_alike("g", g, q, dtype=False)
    if u is not None:
        check_shape("u", u, "H K", sizes)
        check_alike("u", u, q, dtype=False)


def _check_state(name, state, q, sizes):
    check_shape(name, state, "N HV K V", sizes)
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
        parts = [x.to(wide) for x in (q, k, v, g)]
        u = u.to(wide) if u is not None else None
        B, T, _, K = q.shape
        HV, V = v.shape[2:]
        edges = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
        N = B if cu_seqlens is None else len(edges) - 1
        S = q.new_zeros(N, HV, K, V, dtype=wide) if initial_state is None else initial_state
        chunk = _head_chunk if g.ndim == 3 else _channel_chunk
        outputs, states = [parts[2][:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            state = S if cu_seqlens is None else S[n : n + 1]
            for start in range(first, last, C):
                o, state = chunk(*(x[:, start : min(start + C, last)] for x in parts), u, state)
                outputs.append(o)
            states.append(state)
        o = torch.cat(outputs, dim=1)
        return (scale * o).to(q.dtype), torch.cat(states)


def _between(g):
    # sums of g over j < r <= i, [B, i, j, ...], 0 for i <= j: added up one by one, so that no digit cancels
    i = torch.arange(g.shape[1], device=g.device)
    later = (i[:, None] > i).view(1, len(i), len(i), *[1] * (g.ndim - 2))
    return torch.where(later, g[:, :, None], 0).cumsum(1)


def _left(g):
    # sums of g over r > j, [B, C, ...]
    return torch.cat((g[:, 1:], torch.zeros_like(g[:, :1])), dim=1).flip(1).cumsum(1).flip(1)


def _head_chunk(q, k, v, g, _, S):
    group, n = v.shape[2] // q.shape[2], q.shape[1]
    # 1 local decay: no exponent is positive
    seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()[:, :, None]
    D = torch.where(seen, _between(g), -torch.inf).exp()  # [B, C, C, HV]
    # 2 intra-chunk: scores once a group
    A = torch.einsum("bihk,bjhk->bijh", q, k).repeat_interleave(group, dim=3) * D
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    # 3 chunk state, 4 inter-chunk
    past = torch.einsum("bihk,bhkv->bihv", q, S) * g.cumsum(1).exp()[..., None]
    U = torch.einsum("bihk,bihv->bhkv", k, v * _left(g).exp()[..., None])
    S = g.sum(1).exp()[..., None, None] * S + U
    # 5 output
    return torch.einsum("bijh,bjhv->bihv", A, v) + past, S


def _channel_chunk(q, k, v, g, u, S):
    i = torch.arange(q.shape[1], device=q.device)
    lag = (i[:, None] - i)[None, :, :, None, None]
    # 1 local decay: no exponent is positive; with a bonus a token reads what its own gate has not met
    E, read = _between(g), g
    if u is not None:
        E, read = (torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1) for x in (E, g))
    D = torch.where(lag >= (0 if u is None else 1), E, -torch.inf).exp()  # [B, C, C, H, K]
    if u is not None:
        D = D + torch.where(lag == 0, u, 0)
    # 2 intra-chunk
    A = torch.einsum("bihk,bijhk->bhij", q, k[:, None] * D)
    # 3 chunk state, 4 inter-chunk
    past = torch.einsum("bihk,bhkv->bihv", q * read.cumsum(1).exp(), S)
    U = torch.einsum("bihk,bihv->bhkv", k * _left(g).exp(), v)
    S = g.sum(1).exp()[..., None] * S + U
    # 5 output
    return torch.einsum("bhij,bjhv->bihv", A, v) + past, S


def _eager_step(q, k, v, g, u, state, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    group = v.shape[1] // q.shape[1]
    qw, kw = (x.to(wide).repeat_interleave(group, dim=1)[..., None] for x in (q, k))
    kv = kw * v.to(wide)[..., None, :]
    w = (g[..., None] if g.ndim == 2 else g).to(wide).exp()[..., None]  # [N, H, 1 or K, 1]
    S = w * state + kv
    seen = S if u is None else state + u.to(wide)[..., None] * kv
    return (scale * (qw * seen).sum(-2)).to(q.dtype), S


def _forward_run(q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    from effattn_lite.kernels import gated_decay_launch

    return gated_decay_launch.forward(
        q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size
    )


def _forward_fake(q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


def _backward_run(do, dht, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size):
    from effattn_lite.kernels import gated_decay_launch

    return gated_decay_launch.backward(do, dht, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size)


def _backward_fake(do, dht, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size):
    def like(x):
        return q.new_empty(0 if x is None else x.shape, dtype=torch.float32)

    grads = (x.new_empty(x.shape) for x in (q, k, v))
    return (*grads, like(g), like(u), like(initial_state))


def _step_run(q, k, v, g, u, state, out_state, scale):
    from effattn_lite.kernels import gated_decay_launch

    return gated_decay_launch.step(q, k, v, g, u, state, out_state, scale)


def _step_fake(q, k, v, g, u, state, out_state, scale):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, scale, output_final_state, chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, output_final_state, chunk_size


def _backward(ctx, do, dht):
    q, k, v, g, u, initial_state, cu_seqlens = ctx.saved_tensors
    scale, output_final_state, chunk_size = ctx.options
    dq, dk, dv, dg, du, dh0 = torch.ops.effattn_lite.gated_decay_backward(
        do, dht if output_final_state else None, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size
    )
    du = du.to(u.dtype) if u is not None else None
    dh0 = dh0 if initial_state is not None else None
    return dq, dk, dv, dg.to(g.dtype), du, dh0, None, None, None, None


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? u"
_ARGUMENTS = f"{_TENSORS}, Tensor? initial_state, Tensor? cu_seqlens, float scale"
register(
    "gated_decay",
    f"({_ARGUMENTS}, bool output_final_state, int? chunk_size) -> (Tensor, Tensor)",
    _forward_run,
    _forward_fake,
)
register(
    "gated_decay_backward",
    f"(Tensor do, Tensor? dht, {_ARGUMENTS}, int? chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)
register(
    "gated_decay_step",
    f"({_TENSORS}, Tensor state, Tensor(a!) out_state, float scale) -> Tensor",
    _step_run,
    _step_fake,
)
torch.library.register_autograd("effattn_lite::gated_decay", _backward, setup_context=_save)
