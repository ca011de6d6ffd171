r"""mLSTM: linear attention with an exponential input gate, a sigmoid forget gate and a normaliser.

.. math:: m_t = \max(\log\sigma(f_t) + m_{t-1},\; i_t), \qquad
    o_t = \frac{s\, C_t^\top q_t}{\max(|s\, n_t^\top q_t|,\; e^{-m_t})}

The memory is e^m C and the normaliser e^m n; no output depends on m, but the state (C, n, m) does. Eager
torch, chunk by chunk, or Triton behind the operators `effattn_lite::mlstm`, `mlstm_backward`, `mlstm_step`.
"""

import torch
from torch.nn import functional as F

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register

CHUNK = 64
"""Default chunk of the eager form."""

LIMIT = 80.0
"""The bound e^-m is kept between e^-80 and e^80, inside float32, where 0 / 0 and infinities begin: below
m = -80 an output is e^-80 of a value at most; above 80 a denominator so near 0 has no digit left."""

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def mlstm(q, k, v, *, i, f, scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl):
    """Check the arguments of the op and run it; returns o and the final state (C, n, m) or None.

    Args:
        q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V].
        i, f: gates before exponential and sigmoid, [B, T, H].
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the op.
    """
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    _check_tensors(q, k, v, i, f, "B T", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if initial_state is not None:
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        _check_state("initial_state", initial_state, q, sizes)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    # where there is no token there is nothing to launch
    if choose_impl(impl, q, refusal=_refusal(q, v, chunk_size)) == "triton" and q.shape[0] * q.shape[1]:
        o, *state = torch.ops.effattn_lite.mlstm(
            q, k, v, i, f, *(initial_state or (None,) * 3), cu_seqlens, scale, output_final_state, chunk_size
        )
        return o, tuple(state[:3]) if output_final_state else None
    o, state = _eager(q, k, v, i, f, scale, initial_state, cu_seqlens, chunk_size or CHUNK)
    return o, state if output_final_state else None


def mlstm_step(q, k, v, *, i, f, state, scale, out_state, impl):
    """Check the arguments of one token's step and run it; returns o and the state after it.

    Args:
        q, k, v: [N, H, K], [N, H, K], [N, H, V].
        i, f: gates before exponential and sigmoid, [N, H].
        state: (C, n, m), [N, H, K, V], [N, H, K] and [N, H].
        out_state: where the next state is written; `state` itself is allowed; None allocates.
        scale, impl: as in the op.
    """
    sizes = {}
    check_shape("q", q, "N H K", sizes)
    _check_tensors(q, k, v, i, f, "N", sizes)
    _check_state("state", state, q, sizes)
    if out_state is not None:
        _check_state("out_state", out_state, q, sizes)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, i, f, *state))
    refusal = _refusal(q, v, None) or ("no gradient (the step is for decoding)" if differentiated else None)
    if choose_impl(impl, q, refusal=refusal) == "triton":
        if out_state is None:
            out_state = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)
        elif not all(x.is_contiguous() for x in (*out_state, *state)):
            raise ValueError(f"out_state has strides {[x.stride() for x in out_state]}, expected contiguous")
        state = [x.contiguous() for x in state]
        return torch.ops.effattn_lite.mlstm_step(q, k, v, i, f, *state, *out_state, scale), out_state
    wide = torch.promote_types(q.dtype, torch.float32)
    o, new = _chunk(*(x[:, None].to(wide) for x in (q, k, v, i, f)), scale, state)
    o = o[:, 0].to(q.dtype)
    return o, new if out_state is None else tuple(a.copy_(b) for a, b in zip(out_state, new, strict=True))


def _check_tensors(q, k, v, i, f, first, sizes):
    for name, x, axes in (("k", k, "H K"), ("v", v, "H V"), ("i", i, "H"), ("f", f, "H")):
        check_shape(name, x, f"{first} {axes}", sizes)
        check_alike(name, x, q, dtype=name in "kv")


def _check_state(name, state, q, sizes):
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        raise ValueError(f"{name} has shape {getattr(state, 'shape', state)}, expected a tuple (C, n, m)")
    wide = torch.promote_types(q.dtype, torch.float32)
    for part, x, axes in zip("Cnm", state, ("N H K V", "N H K", "N H"), strict=True):
        check_shape(f"{part} of {name}", x, axes, sizes)
        check_alike(f"{part} of {name}", x, q, dtype=False)
        if x.dtype != wide:
            raise TypeError(f"{part} of {name} is {x.dtype}, expected {wide}, since states are kept wide")


def _refusal(q, v, chunk_size):
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > 256:
        return f"K and V <= 256, got {K} and {V}"
    if chunk_size is not None and (chunk_size < 16 or chunk_size & (chunk_size - 1)):
        return f"chunk_size a power of two from 16, got {chunk_size}"
    if q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 for bfloat16"
    return None


def _eager(q, k, v, i, f, scale, initial_state, cu_seqlens, C):
    wide = torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        parts = [x.to(wide) for x in (q, k, v, i, f)]
        B, T, H, K = q.shape
        edges = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
        N = B if cu_seqlens is None else len(edges) - 1
        shapes = ((N, H, K, v.shape[-1]), (N, H, K), (N, H))
        start = initial_state or tuple(q.new_zeros(shape, dtype=wide) for shape in shapes)
        outputs, states = [parts[2][:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            state = start if cu_seqlens is None else tuple(x[n : n + 1] for x in start)
            for begin in range(first, last, C):
                o, state = _chunk(*(x[:, begin : min(begin + C, last)] for x in parts), scale, state)
                outputs.append(o)
            states.append(state)
        final = tuple(torch.cat(part) for part in zip(*states, strict=True))
        return torch.cat(outputs, dim=1).to(q.dtype), final


def _chunk(q, k, v, i, f, scale, state):
    C, n, m = state
    i, b = i.transpose(1, 2), F.logsigmoid(f).transpose(1, 2).cumsum(-1)  # [B, H, C]
    t = torch.arange(b.shape[-1], device=q.device)
    # 1 local gates: no exponent is positive, since m is the largest
    log_D = (b[..., None] - b[..., None, :] + i[..., None, :]).masked_fill(t[:, None] < t, -torch.inf)
    mt = torch.maximum(b + m[..., None], log_D.amax(-1))  # [B, H, C]
    end = mt[..., -1]
    xi = (b + m[..., None] - mt).exp()
    beta = (b[..., -1:] - b + i - end[..., None]).exp()
    kept = (b[..., -1] + m - end).exp()  # [B, H]
    # 2 intra-chunk, 4 inter-chunk
    A = torch.einsum("bihk,bjhk->bhij", q, k) * (log_D - mt[..., None]).exp()
    num = torch.einsum("bhij,bjhv->bhiv", A, v) + xi[..., None] * torch.einsum("bihk,bhkv->bhiv", q, C)
    den = scale * (A.sum(-1) + xi * torch.einsum("bihk,bhk->bhi", q, n))
    # 3 chunk state
    bk = beta[..., None] * k.transpose(1, 2)  # [B, H, C, K]
    C = kept[..., None, None] * C + torch.einsum("bhik,bihv->bhkv", bk, v)
    # 5 output
    o = scale * num / torch.maximum(den.abs(), (-mt.clamp(-LIMIT, LIMIT)).exp())[..., None]
    return o.transpose(1, 2), (C, kept[..., None] * n + bk.sum(2), end)


def _forward_run(q, k, v, i, f, C, n, m, cu_seqlens, scale, output_final_state, chunk_size):
    from effattn_lite.kernels import mlstm_launch

    return mlstm_launch.forward(q, k, v, i, f, (C, n, m), cu_seqlens, scale, output_final_state, chunk_size)


def _forward_fake(q, k, v, i, f, C, n, m, cu_seqlens, scale, output_final_state, chunk_size):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    shapes = ((N, H, K, V), (N, H, K), (N, H)) if output_final_state else ((0,),) * 3
    state = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return v.new_empty(v.shape), *state, *(q.new_empty(i.shape, dtype=torch.float32) for _ in "12")


def _backward_run(do, dC, dn, dm, o, CT, nT, mt, den, q, k, v, i, f, C, n, m, cu_seqlens, scale, chunk_size):
    from effattn_lite.kernels import mlstm_launch

    final = None if dC is None else ((dC, dn, dm), (CT, nT))
    return mlstm_launch.backward(
        do, final, o, mt, den, q, k, v, i, f, (C, n, m), cu_seqlens, scale, chunk_size
    )


def _backward_fake(do, dC, dn, dm, o, CT, nT, mt, den, q, k, v, i, f, C, n, m, cu_seqlens, scale, chunk_size):
    def like(x):
        return q.new_empty(0 if x is None else x.shape, dtype=torch.float32)

    return *(x.new_empty(x.shape) for x in (q, k, v)), *map(like, (i, f, C, n, m))


def _step_run(q, k, v, i, f, C, n, m, out_C, out_n, out_m, scale):
    from effattn_lite.kernels import mlstm_launch

    return mlstm_launch.step(q, k, v, i, f, (C, n, m), (out_C, out_n, out_m), scale)


def _step_fake(q, k, v, i, f, C, n, m, out_C, out_n, out_m, scale):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, scale, output_final_state, chunk_size = inputs
    o, CT, nT, _, mt, den = output
    ctx.save_for_backward(*tensors, o, CT, nT, mt, den)
    ctx.options = scale, output_final_state, chunk_size
    ctx.mark_non_differentiable(mt, den)


def _backward(ctx, do, dC, dn, dm, *_):
    *tensors, o, CT, nT, mt, den = ctx.saved_tensors
    i, f, C, n, m = tensors[3:8]
    scale, output_final_state, chunk_size = ctx.options
    final = (dC, dn, dm) if output_final_state else (None,) * 3
    dq, dk, dv, di, df, *dstate = torch.ops.effattn_lite.mlstm_backward(
        do, *final, o, CT, nT, mt, den, *tensors, scale, chunk_size
    )
    dstate = [None if x is None else dx for x, dx in zip((C, n, m), dstate, strict=True)]
    return dq, dk, dv, di.to(i.dtype), df.to(f.dtype), *dstate, None, None, None, None


_TOKENS = "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f"
_ARGUMENTS = f"{_TOKENS}, Tensor? C, Tensor? n, Tensor? m, Tensor? cu_seqlens, float scale"
register(
    "mlstm",
    f"({_ARGUMENTS}, bool output_final_state, int? chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_run,
    _forward_fake,
)
register(
    "mlstm_backward",
    "(Tensor do, Tensor? dC, Tensor? dn, Tensor? dm, Tensor o, Tensor CT, Tensor nT, Tensor mt, Tensor den,"
    f" {_ARGUMENTS}, int? chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)
register(
    "mlstm_step",
    f"({_TOKENS}, Tensor C, Tensor n, Tensor m, Tensor(a!) out_C, Tensor(b!) out_n, Tensor(c!) out_m,"
    " float scale) -> Tensor",
    _step_run,
    _step_fake,
)
torch.library.register_autograd("effattn_lite::mlstm", _backward, setup_context=_save)
