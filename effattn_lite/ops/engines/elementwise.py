r"""Element-wise recurrences: the engine of hgrn (a leaky sum) and of rwkv4 and aft (a fading average).

.. math:: h_t = e^{g_t} \odot h_{t-1} + x_t \qquad\text{and}\qquad
    o_t = \frac{A_{t-1} + e^{u + k_t} v_t}{B_{t-1} + e^{u + k_t}}, \quad
    A_t = e^{g} A_{t-1} + e^{k_t} v_t, \quad B_t = e^{g} B_{t-1} + e^{k_t}

A and B are carried as (a, b, m), times e^-m, with m the largest exponent so far. Eager torch, chunk by chunk,
or Triton behind the operators `effattn_lite::leak`, `effattn_lite::average` and their backwards.
"""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl, register

CHUNK = {"leak": 64, "average": 16}
"""Default chunk of the eager forms: the average has a table of [C, C, D]."""

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
INF = float("inf")


def leak(x, *, g, initial_state, output_final_state, cu_seqlens, chunk_size, impl):
    """Check the arguments of a leaky sum and run it; returns h and the final state or None.

    Args:
        x, g: inputs and log decay, [B, T, D]; g of any float dtype.
        initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    sizes = _check({"x": x, "g": g}, "B T D", chunk_size)
    _check_packing(sizes, cu_seqlens, x)
    if initial_state is not None:
        _check_state("initial_state", (initial_state,), x, sizes)
    # where there is no token there is nothing to launch
    if choose_impl(impl, x, refusal=_refusal(x)) == "triton" and x.numel():
        o, state = torch.ops.effattn_lite.leak(x, g, initial_state, cu_seqlens, output_final_state)
        return o, state if output_final_state else None
    wide = torch.promote_types(x.dtype, torch.float32)
    S = x.new_zeros(sizes["N"], sizes["D"], dtype=wide) if initial_state is None else initial_state
    parts = [z.to(wide) for z in (x, g)]
    o, state = _by_chunks(_leak_chunk, parts, S, cu_seqlens, chunk_size or CHUNK["leak"])
    return o.to(x.dtype), state if output_final_state else None


def leak_step(x, *, g, state, out_state, impl):
    """Check the arguments of one token's step of a leaky sum, [N, D], and run it; returns o and the state."""
    sizes = _check({"x": x, "g": g}, "N D", None)
    for name, S in (("state", state), ("out_state", out_state)):
        if S is not None:
            _check_state(name, (S,), x, sizes)
    if choose_impl(impl, x, refusal=_refusal(x, x, g, state)) == "triton":
        (state,), (out_state,) = _in_place((state,), None if out_state is None else (out_state,))
        return torch.ops.effattn_lite.leak_step(x, g, state, out_state), out_state
    h = g.to(state.dtype).exp() * state + x.to(state.dtype)
    return h.to(x.dtype), h if out_state is None else out_state.copy_(h)


def average(k, v, *, g, u, initial_state, output_final_state, cu_seqlens, chunk_size, impl):
    """Check the arguments of a fading average and run it; returns o and the final (a, b, m) or None.

    Args:
        k, v: logarithms of weights, and values, [B, T, D].
        g, u: log decay and bonus, [D].
        initial_state, output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    sizes = _check({"k": k, "v": v}, "B T D", chunk_size, {"g": g, "u": u})
    _check_packing(sizes, cu_seqlens, k)
    if initial_state is not None:
        _check_state("initial_state", initial_state, k, sizes)
        initial_state = torch.stack(initial_state)  # [3, N, D]
    if choose_impl(impl, k, refusal=_refusal(k)) == "triton" and k.numel():
        o, state = torch.ops.effattn_lite.average(k, v, g, u, initial_state, cu_seqlens, output_final_state)
        return o, state.unbind() if output_final_state else None
    wide = torch.promote_types(k.dtype, torch.float32)
    if initial_state is None:
        initial_state = k.new_zeros(3, sizes["N"], sizes["D"], dtype=wide)
    constants = [z.to(wide) for z in (g, u)]
    o, state = _by_chunks(
        lambda *chunk: _average_chunk(*chunk, *constants),
        [z.to(wide) for z in (k, v)],
        initial_state,
        cu_seqlens,
        chunk_size or CHUNK["average"],
    )
    return o.to(v.dtype), state.unbind() if output_final_state else None


def average_step(k, v, *, g, u, state, out_state, impl):
    """Check the arguments of one token's step of an average, [N, D], and run it; returns o and (a, b, m)."""
    sizes = _check({"k": k, "v": v}, "N D", None, {"g": g, "u": u})
    for name, S in (("state", state), ("out_state", out_state)):
        if S is not None:
            _check_state(name, S, k, sizes)
    if choose_impl(impl, k, refusal=_refusal(k, k, v, g, u, *state)) == "triton":
        state, out_state = _in_place(state, out_state)
        return torch.ops.effattn_lite.average_step(k, v, g, u, *state, *out_state), out_state
    wide = state[0].dtype
    chunk = [z.to(wide)[:, None] for z in (k, v)]
    o, new = _average_chunk(*chunk, torch.stack(state), g.to(wide), u.to(wide))
    o, new = o[:, 0].to(v.dtype), new.unbind()
    return o, new if out_state is None else tuple(a.copy_(b) for a, b in zip(out_state, new, strict=True))


def _check(tensors, axes, chunk_size, constants=None):
    sizes = {}
    (first, like), *_ = tensors.items()
    for name, x in tensors.items():
        check_shape(name, x, axes, sizes, like=first)
        # decays may be wider than what they decay
        check_alike(name, x, like, dtype=name != "g", like=first)
    for name, x in (constants or {}).items():
        check_shape(name, x, "D", sizes, like=first)
        check_alike(name, x, like, dtype=False, like=first)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    return sizes


def _check_packing(sizes, cu_seqlens, x):
    check_cu_seqlens(cu_seqlens, *x.shape[:2])
    sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1


def _check_state(name, state, x, sizes):
    for part in state:
        check_shape(name, part, "N D", sizes, like="the inputs")
        check_alike(name, part, x, dtype=False, like="the inputs")
        wide = torch.promote_types(x.dtype, torch.float32)
        if part.dtype != wide:
            raise TypeError(f"{name} is {part.dtype}, expected {wide}, since states are kept wide")


def _refusal(x, *tensors):
    """Why no kernel can run; tensors are those of a step, whose kernel has no gradient."""
    if x.dtype == torch.bfloat16 and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "compute capability 8.0 for bfloat16"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "no gradient (the step is for decoding)"
    return None


def _in_place(state, out_state):
    """The parts of a state to read and those to write, contiguous all."""
    if out_state is None:
        out_state = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)
    elif not all(x.is_contiguous() for x in (*state, *out_state)):
        raise ValueError(f"out_state has strides {[x.stride() for x in out_state]}, expected contiguous")
    return tuple(x.contiguous() for x in state), out_state


def _by_chunks(chunk, parts, state, cu_seqlens, C):
    """Run `chunk` over all sequences, C tokens at a time; the state is [..., N, D]."""
    edges = [0, parts[0].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [parts[0][:, :0]], []
    for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        # without cu_seqlens all rows of the batch go together
        S = state if cu_seqlens is None else state[..., n : n + 1, :]
        for start in range(first, last, C):
            o, S = chunk(*(x[:, start : min(start + C, last)] for x in parts), S)
            outputs.append(o)
        states.append(S)
    return torch.cat(outputs, dim=1), torch.cat(states, dim=-2)


def _leak_chunk(x, g, h):
    """Doubling: after each round a token knows the sum over twice as many tokens before it."""
    a = g.exp()
    x = torch.cat((x[:, :1] + a[:, :1] * h[:, None], x[:, 1:]), dim=1)
    reach = 1
    while reach < x.shape[1]:
        near, far = slice(reach, None), slice(None, -reach)
        x = torch.cat((x[:, :reach], x[:, near] + a[:, near] * x[:, far]), dim=1)
        # products of factors <= 1: no decay is too strong
        a = torch.cat((a[:, :reach], a[:, near] * a[:, far]), dim=1)
        reach *= 2
    return x, x[:, -1]


def _average_chunk(k, v, S, g, u):
    a, b, m = S  # [B, D]
    # an empty past has no largest exponent
    m = torch.where(b > 0, m, -INF)
    n = k.shape[1]
    i = torch.arange(n, device=k.device, dtype=k.dtype)[:, None]
    lag = (i - i.T)[..., None]  # [C, C, 1]
    # 1 exponents of the chunk's own tokens, with a bonus for the reader itself, and of what came before
    bias = torch.where(lag > 0, g * (lag - 1).clamp(min=0), torch.where(lag == 0, u, -INF))  # [C, C, D]
    E, past = k[:, None] + bias, m[:, None] + g * i
    # the largest cancels in the quotient: it needs no gradient
    top = torch.maximum(E.amax(2), past).detach()  # [B, C, D]
    # 2 intra-chunk, [C, C] @ [C] channel by channel, and 4 inter-chunk; a sum, since autocast would turn a
    # product into bfloat16
    E, past = (E - top[:, :, None]).exp(), (past - top).exp()
    o = (E * v[:, None]).sum(2) + past * a[:, None]
    o = o / (E.sum(2) + past * b[:, None])
    # 3 chunk state: exponents relative to the token after the chunk
    E, past = k + g * (n - 1 - i), m + g * n
    # of equal exponents the last one sets m, and gets its gradient, as in the loop over tokens
    last = n - 1 - E.flip(1).argmax(1, keepdim=True)
    own = E.gather(1, last)[:, 0]
    m = torch.where(own >= past, own, past)
    E, past = (E - m[:, None]).exp(), (past - m).exp()
    return o, torch.stack((past * a + (E * v).sum(1), past * b + E.sum(1), m))


def _run(name):
    """Launch what `elementwise_launch` has under this name."""

    def run(*arguments):
        from effattn_lite.kernels import elementwise_launch

        return getattr(elementwise_launch, name)(*arguments)

    return run


def _forward_fake(parts):
    def fake(x, *rest):
        *_, cu_seqlens, output_final_state = rest
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (*parts, N, x.shape[2]) if output_final_state else (0,)
        return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)

    return fake


def _leak_backward_fake(do, dht, g, o, initial_state, cu_seqlens):
    shape = 0 if initial_state is None else initial_state.shape
    return do.new_empty(do.shape), g.new_empty(g.shape), do.new_empty(shape, dtype=torch.float32)


def _average_backward_fake(do, dend, k, v, g, u, o, end, initial_state, cu_seqlens):
    shape = 0 if initial_state is None else initial_state.shape
    wide = [k.new_empty(size, dtype=torch.float32) for size in (g.shape, u.shape, shape)]
    return k.new_empty(k.shape), v.new_empty(v.shape), *wide


def _save(ctx, inputs, output):
    *tensors, ctx.output_final_state = inputs
    ctx.save_for_backward(*tensors, *output)


def _leak_backward(ctx, do, dht):
    _, g, initial_state, cu_seqlens, o, _ = ctx.saved_tensors
    dht = dht if ctx.output_final_state else None
    dx, dg, dh0 = torch.ops.effattn_lite.leak_backward(do, dht, g, o, initial_state, cu_seqlens)
    return dx, dg, dh0 if initial_state is not None else None, None, None


def _average_backward(ctx, do, dend):
    k, v, g, u, initial_state, cu_seqlens, o, end = ctx.saved_tensors
    dend, end = (dend, end) if ctx.output_final_state else (None, None)
    dk, dv, dg, du, dstart = torch.ops.effattn_lite.average_backward(
        do, dend, k, v, g, u, o, end, initial_state, cu_seqlens
    )
    dg, du = dg.to(g.dtype), du.to(u.dtype)
    return dk, dv, dg, du, dstart if initial_state is not None else None, None, None


_SAVED = "Tensor? initial_state, Tensor? cu_seqlens"
_TOKEN = "Tensor k, Tensor v, Tensor g, Tensor u"
_PLACES = "Tensor a, Tensor b, Tensor m, Tensor(a!) out_a, Tensor(b!) out_b, Tensor(c!) out_m"
for _name, _schema, _fake in (
    ("leak", f"(Tensor x, Tensor g, {_SAVED}, bool final) -> (Tensor, Tensor)", _forward_fake(())),
    (
        "leak_backward",
        f"(Tensor do, Tensor? dht, Tensor g, Tensor o, {_SAVED}) -> (Tensor, Tensor, Tensor)",
        _leak_backward_fake,
    ),
    (
        "leak_step",
        "(Tensor x, Tensor g, Tensor state, Tensor(a!) out_state) -> Tensor",
        lambda x, *_: x.new_empty(x.shape),
    ),
    ("average", f"({_TOKEN}, {_SAVED}, bool final) -> (Tensor, Tensor)", _forward_fake((3,))),
    (
        "average_backward",
        f"(Tensor do, Tensor? dend, {_TOKEN}, Tensor o, Tensor? end, {_SAVED})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _average_backward_fake,
    ),
    ("average_step", f"({_TOKEN}, {_PLACES}) -> Tensor", lambda k, v, *_: v.new_empty(v.shape)),
):
    run = {name: f"{name}_forward" for name in ("leak", "average")}.get(_name, _name)
    register(_name, _schema, _run(run), _fake)
for _name, _gradient in (("leak", _leak_backward), ("average", _average_backward)):
    torch.library.register_autograd(f"effattn_lite::{_name}", _gradient, setup_context=_save)
