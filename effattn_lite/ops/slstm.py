"""sLSTM: exponential gates, a normaliser, and recurrent weights that only a loop over tokens can follow."""

import torch
from torch.nn import functional as F

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def slstm(
    z: torch.Tensor,
    *,
    i: torch.Tensor,
    f: torch.Tensor,
    o: torch.Tensor,
    r_z: torch.Tensor,
    r_i: torch.Tensor,
    r_f: torch.Tensor,
    r_o: torch.Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""sLSTM: every gate sees the last output; the input gate is an exponential, and a normaliser divides.

    .. math:: \hat x_t = x_t + R_x^\top h_{t-1} \;\text{ for } x = z, i, f, o, \qquad
        m_t = \max(\log\sigma(\hat f_t) + m_{t-1},\; \hat i_t)

    .. math:: c_t = f'_t\, c_{t-1} + i'_t \tanh \hat z_t, \qquad n_t = f'_t\, n_{t-1} + i'_t, \qquad
        h_t = \sigma(\hat o_t) \odot c_t / n_t

    with :math:`i'_t = e^{\hat i_t - m_t}` and :math:`f'_t = e^{\log\sigma(\hat f_t) + m_{t-1} - m_t}`.

    Args:
        z: cell input before its tanh, [B, T, H, V], float32, bfloat16, float16 or float64.
        i: input gate before its exponential, [B, T, H, V].
        f: forget gate before its sigmoid, [B, T, H, V].
        o: output gate before its sigmoid, [B, T, H, V].
        r_z, r_i, r_f, r_o: recurrent weights of a head, [H, V, V], from the last output to each of the four.
        initial_state: (c, n, h, m), each [N, H, V], float32; default zeros; its gradients are returned.
        output_final_state: return the final (c, n, h, m) as well; they carry gradients.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        impl: "auto" or "torch"; there is no kernel.

    Returns:
        h, [B, T, H, V], dtype of z; and (c, n, h, m), each [N, H, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton".

    Cost: B T H (8 V^2 + 23 V) FLOPs, one token after the other; 16 B H V bytes of state.
    Source: Beck et al. 2024, arXiv:2405.04517, with the forget gate a sigmoid, as in the released code; the
    paper allows an exponential too. Differs: a bias is part of what is passed in.
    """
    sizes = {}
    gates, weights = {"z": z, "i": i, "f": f, "o": o}, {"r_z": r_z, "r_i": r_i, "r_f": r_f, "r_o": r_o}
    _check(gates, "B T H V", weights, sizes)
    check_cu_seqlens(cu_seqlens, *z.shape[:2])
    sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, z, sizes)
    _refuse_triton(impl, z)
    wide = torch.promote_types(z.dtype, torch.float32)
    if initial_state is None:
        initial_state = z.new_zeros(4, sizes["N"], *z.shape[2:], dtype=wide).unbind()
    x, R = _stacked(gates, weights, wide)
    edges = [0, z.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [x[0, :, :0]], []
    for s, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        # without cu_seqlens all rows of the batch go together
        state = initial_state if cu_seqlens is None else tuple(part[s : s + 1] for part in initial_state)
        for t in range(first, last):
            state = _cell(x[:, :, t], R, state)
            outputs.append(state[2][:, None])
        states.append(state)
    final = tuple(torch.cat(parts) for parts in zip(*states, strict=True))
    return torch.cat(outputs, dim=1).to(z.dtype), final if output_final_state else None


def step(
    z: torch.Tensor,
    *,
    i: torch.Tensor,
    f: torch.Tensor,
    o: torch.Tensor,
    r_z: torch.Tensor,
    r_i: torch.Tensor,
    r_f: torch.Tensor,
    r_o: torch.Tensor,
    state: State,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of sLSTM, for decoding.

    .. math:: c_t = f'_t\, c_{t-1} + i'_t \tanh \hat z_t, \qquad n_t = f'_t\, n_{t-1} + i'_t, \qquad
        h_t = \sigma(\hat o_t) \odot c_t / n_t

    Args:
        z, i, f, o: cell input and gates before their activations, [N, H, V].
        r_z, r_i, r_f, r_o: recurrent weights, [H, V, V].
        state: (c, n, h, m), each [N, H, V], float32.
        out_state: tensors that receive the next state; `state` itself updates in place; default new ones.
        impl: "auto" or "torch"; there is no kernel.

    Returns:
        h, [N, H, V], dtype of z, and (c, n, h, m) after the token.

    Cost: N H (8 V^2 + 23 V) FLOPs; reads and writes 16 N H V bytes of state.
    Source: Beck et al. 2024, arXiv:2405.04517.
    """
    sizes = {}
    gates, weights = {"z": z, "i": i, "f": f, "o": o}, {"r_z": r_z, "r_i": r_i, "r_f": r_f, "r_o": r_o}
    _check(gates, "N H V", weights, sizes)
    for name, S in (("state", state), ("out_state", out_state)):
        if S is not None:
            _check_state(name, S, z, sizes)
    _refuse_triton(impl, z)
    new = _cell(*_stacked(gates, weights, state[0].dtype), state)
    y = new[2].to(z.dtype)
    return y, new if out_state is None else tuple(a.copy_(b) for a, b in zip(out_state, new, strict=True))


def _check(gates, axes, weights, sizes):
    z = gates["z"]
    for name, x in gates.items():
        check_shape(name, x, axes, sizes, like="z")
        check_alike(name, x, z, like="z")
    for name, x in weights.items():
        check_shape(name, x, "H V V", sizes, like="z")
        check_alike(name, x, z, dtype=False, like="z")


def _check_state(name, state, z, sizes):
    wide = torch.promote_types(z.dtype, torch.float32)
    for part in state:
        check_shape(name, part, "N H V", sizes, like="z")
        check_alike(name, part, z, dtype=False, like="z")
        if part.dtype != wide:
            raise TypeError(f"{name} is {part.dtype}, expected {wide}, since states are kept wide")


def _refuse_triton(impl, z):
    if impl == "triton":
        raise NotImplementedError("slstm has no kernel: its steps wait for each other; use impl='torch'")
    choose_impl(impl, z, refusal="impl='torch'")


def _stacked(gates, weights, wide):
    """Gates [4, B, ..., H, V] and weights [H, V, 4 V], so that a step is one product."""
    return torch.stack([x.to(wide) for x in gates.values()]), torch.cat(
        [r.to(wide) for r in weights.values()], dim=-1
    )


def _cell(x, R, state):
    c, n, h, m = state
    # an empty past has no exponent
    m = torch.where(n > 0, m, -torch.inf)
    # autocast would turn the float32 product into bfloat16
    with torch.autocast(x.device.type, enabled=False):
        mixed = torch.einsum("bhv,hvw->bhw", h, R)  # [V] @ [V, 4 V] -> [4 V]
    z, i, f, o = x + mixed.unflatten(-1, (4, -1)).movedim(-2, 0)
    faded = F.logsigmoid(f) + m
    m = torch.maximum(faded, i)
    past, own = (faded - m).exp(), (i - m).exp()
    c, n = past * c + own * z.tanh(), past * n + own
    return c, n, torch.sigmoid(o) * c / n, m
