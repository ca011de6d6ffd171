r"""The delta rule with no decay, one decay a head or one a key channel: engine of deltanet and its kin.

.. math:: \tilde S_t = \operatorname{Diag}(e^{g_t})\,S_{t-1}, \qquad
    S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top, \qquad o_t = s\,S_t^\top q_t

g is None, [B, T, HV] or [B, T, HV, K]; HV value heads share H heads of queries and keys. Eager torch, chunk
by chunk, or Triton behind the operators `effattn_lite::delta` and `effattn_lite::delta_backward`.
"""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register

CHUNK = {0: 64, 3: 64, 4: 16}
"""Default chunk of the eager form by axes of g: decay a channel needs a table of [C, C, HV, K]."""


def delta(
    q, k, v, *, g=None, beta, scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl
):  # fmt: skip
    """Check the arguments of an op and run it; returns o and the final state or None.

    Args:
        q, k, v: [B, T, H, K], [B, T, H, K], [B, T, HV, V].
        g: log decay, [B, T, HV] or [B, T, HV, K], or None.
        beta: write strength, [B, T, HV].
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    # where there is no token there is nothing to launch
    if choose_impl(impl, q, refusal=_refusal(q, v, chunk_size)) == "triton" and q.shape[0] * q.shape[1]:
        o, state = torch.ops.effattn_lite.delta(
            q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, chunk_size
        )
        return o, state if output_final_state else None
    C = chunk_size or CHUNK[0 if g is None else g.ndim]
    o, state = _eager(q, k, v, g, beta, scale, initial_state, cu_seqlens, C)
    return o, state if output_final_state else None


def delta_step(q, k, v, *, g=None, beta, state, scale, out_state, impl):
    """Check the arguments of one token's step and run it; returns o and the state after it.

    Args:
        q, k, v: [N, H, K], [N, H, K], [N, HV, V].
        g: log decay, [N, HV] or [N, HV, K], or None.
        beta: write strength, [N, HV].
        state: S_{t-1}, [N, HV, K, V].
        out_state: where the next state is written; `state` itself is allowed; None allocates.
        scale, impl: as in the ops.
    """
    sizes = {}
    check_shape("q", q, "N H K", sizes)
    _check_tensors(q, k, v, g, beta, "N", sizes)
    _check_state("state", state, q, sizes)
    if out_state is not None:
        _check_state("out_state", out_state, q, sizes)
    tensors = [x for x in (q, k, v, g, beta, state) if x is not None]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    refusal = _refusal(q, v, None) or ("no gradient (the step is for decoding)" if differentiated else None)
    if choose_impl(impl, q, refusal=refusal) == "triton":
        if out_state is None:
            out_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        elif not (out_state.is_contiguous() and state.is_contiguous()):
            raise ValueError(f"out_state has strides {out_state.stride()}, expected contiguous [N, HV, K, V]")
        o = torch.ops.effattn_lite.delta_step(q, k, v, g, beta, state.contiguous(), out_state, scale)
        return o, out_state
    o, new = _eager_step(q, k, v, g, beta, state, scale)
    return o, new if out_state is None else out_state.copy_(new)


def _check(q, k, v, g, beta, initial_state, cu_seqlens):
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    _check_tensors(q, k, v, g, beta, "B T", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if initial_state is not None:
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        _check_state("initial_state", initial_state, q, sizes)


def _check_tensors(q, k, v, g, beta, rows, sizes):
    check_shape("k", k, f"{rows} H K", sizes)
    check_shape("v", v, f"{rows} HV V", sizes)
    if sizes["H"] == 0 or sizes["HV"] % sizes["H"]:
        raise ValueError(f"v has {sizes['HV']} heads, expected a multiple of q's {sizes['H']}")
    check_shape("beta", beta, f"{rows} HV", sizes, like="v")
    for name, x in (("k", k), ("v", v), ("beta", beta)):
        check_alike(name, x, q)
    if g is not None:
        check_shape("g", g, f"{rows} HV" if g.ndim == beta.ndim else f"{rows} HV K", sizes, like="v")
        check_alike("g", g, q, dtype=False)


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


def _eager(q, k, v, g, beta, scale, initial_state, cu_seqlens, C):
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta = (x.to(wide) for x in (q, k, v, beta))
        g = g.to(wide) if g is not None else None
        B, T, H, K = q.shape
        share = v.shape[2] // H
        edges = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
        N = B if cu_seqlens is None else len(edges) - 1
        S = v.new_zeros(N, v.shape[2], K, v.shape[3]) if initial_state is None else initial_state
        outputs, states = [v[:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            state = S if cu_seqlens is None else S[n : n + 1]
            for start in range(first, last, C):
                part = slice(start, min(start + C, last))
                qc, kc = (x[:, part].repeat_interleave(share, dim=2) for x in (q, k))
                gate = g[:, part] if g is not None else None
                o, state = _chunk(qc, kc, v[:, part], gate, beta[:, part], state)
                outputs.append(o)
            states.append(state)
        return (scale * torch.cat(outputs, dim=1)).to(dtype), torch.cat(states)


def _chunk(q, k, v, g, beta, S):
    i = torch.arange(q.shape[1], device=q.device)
    lower = i[:, None] >= i  # [C, C]
    b = beta.transpose(1, 2)[..., None]  # [B, HV, C, 1]
    # 1 local decay: between two tokens, since the chunk began, until it is over; no exponent is positive
    if g is None:
        kk, scores = torch.einsum("bihk,bjhk->bhij", k, k), torch.einsum("bihk,bjhk->bhij", q, k)
        since, left, kept = k, k, 1
        reading = q
    else:
        G = g.cumsum(1) if g.ndim == 4 else g.cumsum(1)[..., None]  # [B, C, HV, 1 or K]
        D = (G[:, :, None] - G[:, None]).masked_fill(~lower[:, :, None, None], float("-inf")).exp()
        if g.ndim == 4:
            E = D * k[:, None]  # [B, C, C, HV, K]
            kk, scores = torch.einsum("bihk,bijhk->bhij", k, E), torch.einsum("bihk,bijhk->bhij", q, E)
        else:
            D = D[..., 0].permute(0, 3, 1, 2)
            kk = torch.einsum("bihk,bjhk->bhij", k, k) * D
            scores = torch.einsum("bihk,bjhk->bhij", q, k) * D
        since, left, kept = k * G.exp(), k * (G[:, -1:] - G).exp(), G[:, -1, :, :, None].exp()
        reading = q * G.exp()
    # 2 what is written: (I + A) Delta = Diag(beta) (V - (xi K) S), by forward substitution
    unread = b * (v.transpose(1, 2) - torch.einsum("bihk,bhkv->bhiv", since, S))
    A = torch.where(i[:, None] > i, b * kk, 0)  # its diagonal is taken to be 1
    written = torch.linalg.solve_triangular(A, unread, upper=False, unitriangular=True)  # [B, HV, C, V]
    # 3 output: what earlier chunks left, and what this chunk wrote up to i
    o = torch.einsum("bihk,bhkv->bihv", reading, S)
    o = o + torch.einsum("bhij,bhjv->bihv", torch.where(lower, scores, 0), written)
    # 4 state: [K, C] @ [C, V] -> [K, V]
    return o, kept * S + torch.einsum("bihk,bhiv->bhkv", left, written)


def _eager_step(q, k, v, g, beta, state, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    share = v.shape[1] // q.shape[1]
    qw, kw = (x.to(wide).repeat_interleave(share, dim=1)[..., None] for x in (q, k))  # [N, HV, K, 1]
    if g is not None:
        state = state * (g if g.ndim == 3 else g[..., None]).to(wide).exp()[..., None]
    new = beta.to(wide)[..., None] * (v.to(wide) - (kw * state).sum(-2))
    S = state + kw * new[..., None, :]
    return (scale * (qw * S).sum(-2)).to(q.dtype), S


def _forward_run(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    from effattn_lite.kernels import delta_launch

    return delta_launch.forward(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, chunk_size
    )


def _forward_fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


def _backward_run(do, dht, q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size):
    from effattn_lite.kernels import delta_launch

    return delta_launch.backward(do, dht, q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size)


def _backward_fake(do, dht, q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size):
    def like(x):
        return q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)

    return tuple(map(like, (q, k, v, g, beta, initial_state)))


def _step_run(q, k, v, g, beta, state, out_state, scale):
    from effattn_lite.kernels import delta_launch

    return delta_launch.step(q, k, v, g, beta, state, out_state, scale)


def _step_fake(q, k, v, g, beta, state, out_state, scale):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, scale, output_final_state, chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, output_final_state, chunk_size


def _backward(ctx, do, dht):
    *tensors, cu_seqlens = ctx.saved_tensors
    scale, output_final_state, chunk_size = ctx.options
    dht = dht if output_final_state else None
    grads = torch.ops.effattn_lite.delta_backward(do, dht, *tensors, cu_seqlens, scale, chunk_size)
    grads = [None if x is None else dx for x, dx in zip(tensors, grads, strict=True)]
    return *grads, None, None, None, None


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta"
_ARGUMENTS = f"{_TENSORS}, Tensor? initial_state, Tensor? cu_seqlens, float scale"
register(
    "delta",
    f"({_ARGUMENTS}, bool output_final_state, int? chunk_size) -> (Tensor, Tensor)",
    _forward_run,
    _forward_fake,
)
register(
    "delta_backward",
    f"(Tensor do, Tensor? dht, {_ARGUMENTS}, int? chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)
register(
    "delta_step",
    f"({_TENSORS}, Tensor state, Tensor(a!) out_state, float scale) -> Tensor",
    _step_run,
    _step_fake,
)
torch.library.register_autograd("effattn_lite::delta", _backward, setup_context=_save)
