r"""Scans with a factor an entry of the state, made from small inputs: the engine of mamba and longhorn.

.. math:: S_t = a_t \odot S_{t-1} + k_t\,(\epsilon_t \odot v_t)^\top, \qquad
    o_t = s\, S_t^\top q_t + D \odot v_t

========  ============================  ======================================  =========
method    :math:`a_{kv}`                :math:`\epsilon`                        w
========  ============================  ======================================  =========
mamba     :math:`e^{w_v A_{vk}}`        w                                       step size
longhorn  :math:`1 - k_k^2 \epsilon_v`  :math:`w / (1 + w \lVert k \rVert^2)`   beta
========  ============================  ======================================  =========

No tensor with T and both axes of the state is in memory with the Triton kernels, behind the operators
`effattn_lite::selective_scan` and `effattn_lite::selective_scan_backward`. Eager torch holds one chunk of it,
joined pair by pair as in the reference's scan, so that no quotient and no logarithm of factors is formed.
"""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register

CHUNK = 32
"""Default chunk of the eager form: it holds a few tensors of [B, C, H, K, V]."""


def selective_scan(
    q, k, v, w, *, A=None, D=None, scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl
):
    """Run checked arguments; returns o and the final state or None.

    Args:
        q, k: what a token reads and writes, [B, T, H, K].
        v, w: values and their step sizes or weights, [B, T, H, V].
        A: rates of decay, [V, K], with H = 1; None: factors from k and w, as Longhorn's.
        D: weight of v in the output, [V], with H = 1, or None.
        initial_state: [N, H, V, K] with A, else [N, H, K, V]; so is the final state.
        scale, output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    # where there is no token there is nothing to launch
    if choose_impl(impl, v, refusal=_refusal(q, v)) == "triton" and q.shape[0] * q.shape[1]:
        o, state = torch.ops.effattn_lite.selective_scan(
            q, k, v, w, A, D, initial_state, cu_seqlens, scale, output_final_state
        )
        return o, state if output_final_state else None
    o, state = _eager(q, k, v, w, A, D, scale, initial_state, cu_seqlens, chunk_size or CHUNK)
    return o, state if output_final_state else None


def selective_scan_step(q, k, v, w, *, A=None, D=None, state, scale, out_state, impl):
    """Run one token's step on checked arguments; returns o and the state after it.

    Args:
        q, k: [N, H, K].
        v, w: [N, H, V].
        A, D: as above.
        state: [N, H, V, K] with A, else [N, H, K, V].
        out_state: where the next state is written; `state` itself is allowed; None allocates.
        scale, impl: as in the ops.
    """
    tensors = [x for x in (q, k, v, w, A, D, state) if x is not None]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    refusal = _refusal(q, v) or ("no gradient (the step is for decoding)" if differentiated else None)
    if choose_impl(impl, v, refusal=refusal) == "triton":
        if out_state is None:
            out_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        elif not (out_state.is_contiguous() and state.is_contiguous()):
            raise ValueError(f"out_state has strides {out_state.stride()}, expected a contiguous state")
        o = torch.ops.effattn_lite.selective_scan_step(q, k, v, w, A, D, state.contiguous(), out_state, scale)
        return o, out_state
    o, new = _eager(*(x[:, None] for x in (q, k, v, w)), A, D, scale, state, None, 1)
    return o[:, 0], new if out_state is None else out_state.copy_(new)


def check_tensors(tensors, *, like, states=None, cu_seqlens=None):
    """Check named tensors against their axes and against the first of them.

    Args:
        tensors: name -> (tensor or None, axes, whether it must have the first one's dtype; if not, the wide
            one will do as well).
        like: name of the first.
        states: name -> (state or None, axes with N), float32 or, for float64, float64.
        cu_seqlens: boundaries of packed sequences, or None.
    """
    sizes, first = {}, tensors[like][0]
    wide = torch.promote_types(first.dtype, torch.float32)
    for name, (x, axes, same) in tensors.items():
        if x is not None:
            check_shape(name, x, axes, sizes, like)
            check_alike(name, x, first, dtype=same or x.dtype != wide, like=like)
    if "T" in sizes:
        check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    for name, (state, axes) in (states or {}).items():
        if state is not None:
            check_shape(name, state, axes, sizes, like)
            check_alike(name, state, first, dtype=False, like=like)
            if state.dtype != wide:
                raise TypeError(f"{name} is {state.dtype}, expected {wide}, since states are kept wide")


def _refusal(q, v):
    if q.shape[-1] > 256:
        return f"at most 256 states, got {q.shape[-1]}"
    if q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 for bfloat16"
    return None


def _eager(q, k, v, w, A, D, scale, initial_state, cu_seqlens, C):
    wide = torch.promote_types(v.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(v.device.type, enabled=False):
        parts = [x.to(wide) for x in (q, k, v, w)]
        rates = None if A is None else A.to(wide).mT  # [K, V]
        B, T, H, K = q.shape
        edges = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
        N = B if cu_seqlens is None else len(edges) - 1
        if initial_state is None:
            S = q.new_zeros(N, H, K, v.shape[-1], dtype=wide)
        else:
            S = initial_state if A is None else initial_state.mT
        outputs, states = [parts[2][:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            state = S if cu_seqlens is None else S[n : n + 1]
            for start in range(first, last, C):
                o, state = _chunk(*(x[:, start : min(start + C, last)] for x in parts), rates, state)
                outputs.append(o)
            states.append(state)
        o, state = scale * torch.cat(outputs, dim=1), torch.cat(states)
        o = o if D is None else o + D.to(wide) * parts[2]
        return o.to(v.dtype), state if A is None else state.mT.contiguous()


def _chunk(q, k, v, w, rates, S):
    if rates is None:
        eps = w / (1 + w * k.square().sum(-1, keepdim=True))  # [B, C, H, V]
        a = 1 - k.square()[..., None] * eps[..., None, :]  # [B, C, H, K, V]
    else:
        eps, a = w, (rates * w[..., None, :]).exp()
    b = k[..., None] * (eps * v)[..., None, :]
    # the first token takes the state along
    b = torch.cat((b[:, :1] + a[:, :1] * S[:, None], b[:, 1:]), dim=1)
    lag = 1
    while lag < b.shape[1]:
        b = torch.cat((b[:, :lag], b[:, lag:] + a[:, lag:] * b[:, :-lag]), dim=1)
        a = torch.cat((a[:, :lag], a[:, lag:] * a[:, :-lag]), dim=1)
        lag *= 2
    # b_t is S_t
    return torch.einsum("bihk,bihkv->bihv", q, b), b[:, -1]


def _forward_run(q, k, v, w, A, D, initial_state, cu_seqlens, scale, output_final_state):
    from effattn_lite.kernels import selective_scan_launch

    return selective_scan_launch.forward(
        q, k, v, w, A, D, initial_state, cu_seqlens, scale, output_final_state
    )


def _forward_fake(q, k, v, w, A, D, initial_state, cu_seqlens, scale, output_final_state):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = (q.shape[3], v.shape[3]) if A is None else (v.shape[3], q.shape[3])
    shape = (N, q.shape[2], *last) if output_final_state else (0,)
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


def _backward_run(do, dht, q, k, v, w, A, D, initial_state, cu_seqlens, scale):
    from effattn_lite.kernels import selective_scan_launch

    return selective_scan_launch.backward(do, dht, q, k, v, w, A, D, initial_state, cu_seqlens, scale)


def _backward_fake(do, dht, q, k, v, w, A, D, initial_state, cu_seqlens, scale):
    def like(x):
        return q.new_empty(0 if x is None else x.shape, dtype=torch.float32)

    return (*(x.new_empty(x.shape) for x in (q, k, v, w)), like(A), like(D), like(initial_state))


def _step_run(q, k, v, w, A, D, state, out_state, scale):
    from effattn_lite.kernels import selective_scan_launch

    return selective_scan_launch.step(q, k, v, w, A, D, state, out_state, scale)


def _step_fake(q, k, v, w, A, D, state, out_state, scale):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, scale, output_final_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, output_final_state


def _backward(ctx, do, dht):
    scale, output_final_state = ctx.options
    _, _, _, _, A, D, initial_state, _ = ctx.saved_tensors
    dq, dk, dv, dw, dA, dD, dh0 = torch.ops.effattn_lite.selective_scan_backward(
        do, dht if output_final_state else None, *ctx.saved_tensors, scale
    )
    dA, dD = (None if x is None else dx.to(x.dtype) for x, dx in ((A, dA), (D, dD)))
    return dq, dk, dv, dw, dA, dD, None if initial_state is None else dh0, None, None, None


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor w, Tensor? A, Tensor? D"
_ARGUMENTS = f"{_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, float scale"
register(
    "selective_scan",
    f"({_ARGUMENTS}, bool output_final_state) -> (Tensor, Tensor)",
    _forward_run,
    _forward_fake,
)
register(
    "selective_scan_backward",
    f"(Tensor do, Tensor? dht, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)
register(
    "selective_scan_step",
    f"({_INPUTS}, Tensor state, Tensor(a!) out_state, float scale) -> Tensor",
    _step_run,
    _step_fake,
)
torch.library.register_autograd("effattn_lite::selective_scan", _backward, setup_context=_save)
