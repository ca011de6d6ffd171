r"""A state whose transition is a diagonal plus a matrix of rank 1: engine of rwkv7.

.. math:: y_t = S_{t-1}^\top a_t, \qquad
    S_t = \operatorname{Diag}(e^{g_t})\,S_{t-1} + b_t y_t^\top + k_t v_t^\top, \qquad o_t = s\,S_t^\top q_t

Eager torch, chunk by chunk, or Triton behind the operators `effattn_lite::dplr` and
`effattn_lite::dplr_backward`.
"""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register

CHUNK = 16
"""Default chunk of the eager form, which makes a table of [C, C, H, K]."""


def dplr(
    q, k, v, *, g, a, b, scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl
):  # fmt: skip
    """Check the arguments of an op and run it; returns o and the final state or None.

    Args:
        q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V].
        g: log decay, [B, T, H, K].
        a, b: what is read and where the answer is written, [B, T, H, K].
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    _check_tensors(q, k, v, g, a, b, "B T", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if initial_state is not None:
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        _check_state("initial_state", initial_state, q, sizes)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    # where there is no token there is nothing to launch
    if choose_impl(impl, q, refusal=_refusal(q, v, chunk_size)) == "triton" and q.shape[0] * q.shape[1]:
        o, state = torch.ops.effattn_lite.dplr(
            q, k, v, g, a, b, initial_state, cu_seqlens, scale, output_final_state, chunk_size
        )
    else:
        o, state = _eager(q, k, v, g, a, b, scale, initial_state, cu_seqlens, chunk_size or CHUNK)
    return o, state if output_final_state else None


def dplr_step(q, k, v, *, g, a, b, state, scale, out_state, impl):
    """Check the arguments of one token's step and run it; returns o and the state after it.

    Args:
        q, k, v: [N, H, K], [N, H, K], [N, H, V].
        g, a, b: [N, H, K].
        state: S_{t-1}, [N, H, K, V].
        out_state: where the next state is written; `state` itself is allowed; None allocates.
        scale, impl: as in the ops.
    """
    sizes = {}
    check_shape("q", q, "N H K", sizes)
    _check_tensors(q, k, v, g, a, b, "N", sizes)
    _check_state("state", state, q, sizes)
    if out_state is not None:
        _check_state("out_state", out_state, q, sizes)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, a, b, state))
    refusal = _refusal(q, v, None) or ("no gradient (the step is for decoding)" if differentiated else None)
    if choose_impl(impl, q, refusal=refusal) == "triton":
        if out_state is None:
            out_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        elif not (out_state.is_contiguous() and state.is_contiguous()):
            raise ValueError(f"out_state has strides {out_state.stride()}, expected contiguous [N, H, K, V]")
        o = torch.ops.effattn_lite.dplr_step(q, k, v, g, a, b, state.contiguous(), out_state, scale)
        return o, out_state
    o, new = _eager_step(q, k, v, g, a, b, state, scale)
    return o, new if out_state is None else out_state.copy_(new)


def _check_tensors(q, k, v, g, a, b, rows, sizes):
    check_shape("k", k, f"{rows} H K", sizes)
    check_shape("v", v, f"{rows} H V", sizes)
    check_alike("k", k, q)
    check_alike("v", v, q)
    check_shape("g", g, f"{rows} H K", sizes)
    check_alike("g", g, q, dtype=False)
    for name, x in (("a", a), ("b", b)):
        check_shape(name, x, f"{rows} H K", sizes)
        check_alike(name, x, q)


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
    if chunk_size is not None and (chunk_size < 32 or chunk_size & (chunk_size - 1)):
        return f"chunk_size a power of two from 32, got {chunk_size}"
    if q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 for bfloat16"
    return None


def _eager(q, k, v, g, a, b, scale, initial_state, cu_seqlens, C):
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        tensors = [x.to(wide) for x in (q, k, v, g, a, b)]
        B, T, H, K = q.shape
        edges = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
        N = B if cu_seqlens is None else len(edges) - 1
        S = tensors[0].new_zeros(N, H, K, v.shape[3]) if initial_state is None else initial_state
        outputs, states = [tensors[2][:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            state = S if cu_seqlens is None else S[n : n + 1]
            for start in range(first, last, C):
                o, state = _chunk(*(x[:, start : min(start + C, last)] for x in tensors), state)
                outputs.append(o)
            states.append(state)
        return (scale * torch.cat(outputs, dim=1)).to(dtype), torch.cat(states)


def _chunk(q, k, v, g, a, b, S):
    i = torch.arange(q.shape[1], device=q.device)
    lower = (i[:, None] >= i)[:, :, None, None]  # [C, C, 1, 1]
    # 1 local decay: between two tokens, since the chunk began; no exponent is positive
    G = g.cumsum(1)  # [B, C, H, K]
    D = (G[:, :, None] - G[:, None]).masked_fill(~lower, float("-inf")).exp()  # [B, C, C, H, K]
    Db, Dk, xi = D * b[:, None], D * k[:, None], G.exp()
    # 2 readers on writers, [B, H, C, C]; a comes before its own decay, so it meets what the row above meets
    ab, ak = (_below(torch.einsum("bihk,bijhk->bhij", a[:, 1:], x[:, :-1])) for x in (Db, Dk))
    qb, qk = (torch.einsum("bihk,bijhk->bhij", q, x) for x in (Db, Dk))
    # 3 the answers: (I - A) Y = found, by forward substitution
    before = torch.cat((a[:, :1], a[:, 1:] * xi[:, :-1]), dim=1)
    found = torch.einsum("bihk,bhkv->bhiv", before, S) + torch.einsum("bhij,bjhv->bhiv", ak, v)
    Y = torch.linalg.solve_triangular(-ab, found, upper=False, unitriangular=True)  # [B, H, C, V]
    # 4 output: what earlier chunks left, and what this chunk wrote up to i
    o = torch.einsum("bihk,bhkv->bihv", q * xi, S)
    o = o + torch.einsum("bhij,bhjv->bihv", qb, Y) + torch.einsum("bhij,bjhv->bihv", qk, v)
    # 5 state: [K, C] @ [C, V] -> [K, V]
    S = xi[:, -1, :, :, None] * S + torch.einsum("bjhk,bhjv->bhkv", Db[:, -1], Y)
    return o, S + torch.einsum("bjhk,bjhv->bhkv", Dk[:, -1], v)


def _below(x):
    """x [..., C - 1, C] with a row of zeros on top."""
    return torch.nn.functional.pad(x, (0, 0, 1, 0))


def _eager_step(q, k, v, g, a, b, state, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    qw, kw, gw, aw, bw = (x.to(wide)[..., None] for x in (q, k, g, a, b))  # [N, H, K, 1]
    y = (aw * state).sum(-2, keepdim=True)
    S = gw.exp() * state + bw * y + kw * v.to(wide)[..., None, :]
    return (scale * (qw * S).sum(-2)).to(q.dtype), S


def _forward_run(q, k, v, g, a, b, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    from effattn_lite.kernels import dplr_launch

    return dplr_launch.forward(
        q, k, v, g, a, b, initial_state, cu_seqlens, scale, output_final_state, chunk_size
    )


def _forward_fake(q, k, v, g, a, b, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, q.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


def _backward_run(do, dht, q, k, v, g, a, b, initial_state, cu_seqlens, scale, chunk_size):
    from effattn_lite.kernels import dplr_launch

    return dplr_launch.backward(do, dht, q, k, v, g, a, b, initial_state, cu_seqlens, scale, chunk_size)


def _backward_fake(do, dht, q, k, v, g, a, b, initial_state, cu_seqlens, scale, chunk_size):
    def like(x):
        return q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)

    return tuple(map(like, (q, k, v, g, a, b, initial_state)))


def _step_run(q, k, v, g, a, b, state, out_state, scale):
    from effattn_lite.kernels import dplr_launch

    return dplr_launch.step(q, k, v, g, a, b, state, out_state, scale)


def _step_fake(q, k, v, g, a, b, state, out_state, scale):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, scale, output_final_state, chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, output_final_state, chunk_size


def _backward(ctx, do, dht):
    *tensors, cu_seqlens = ctx.saved_tensors
    scale, output_final_state, chunk_size = ctx.options
    dht = dht if output_final_state else None
    grads = torch.ops.effattn_lite.dplr_backward(do, dht, *tensors, cu_seqlens, scale, chunk_size)
    grads = [None if x is None else dx for x, dx in zip(tensors, grads, strict=True)]
    return *grads, None, None, None, None


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor a, Tensor b"
_ARGUMENTS = f"{_TENSORS}, Tensor? initial_state, Tensor? cu_seqlens, float scale"
register(
    "dplr",
    f"({_ARGUMENTS}, bool output_final_state, int? chunk_size) -> (Tensor, Tensor)",
    _forward_run,
    _forward_fake,
)
register(
    "dplr_backward",
    f"(Tensor do, Tensor? dht, {_ARGUMENTS}, int? chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)
register(
    "dplr_step",
    f"({_TENSORS}, Tensor state, Tensor(a!) out_state, float scale) -> Tensor",
    _step_run,
    _step_fake,
)
torch.library.register_autograd("effattn_lite::dplr", _backward, setup_context=_save)
