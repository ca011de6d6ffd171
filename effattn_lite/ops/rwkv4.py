"""RWKV-4: a fading average a channel, with a bonus for the current token."""

import torch

from effattn_lite.ops.engines.elementwise import State, average, average_step


def rwkv4(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    u: torch.Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""RWKV-4's time mixing: every channel averages its past with weights e^key that fade.

    .. math:: o_t = \frac{A_{t-1} + e^{u + k_t} v_t}{B_{t-1} + e^{u + k_t}}, \qquad
        A_t = e^{g} A_{t-1} + e^{k_t} v_t, \qquad B_t = e^{g} B_{t-1} + e^{k_t}

    with :math:`A = a\,e^{m}`, :math:`B = b\,e^{m}`, :math:`m_t = \max(m_{t-1} + g, k_t)`: a, b and m are
    what is carried, so no key overflows.

    Args:
        k: keys, logarithms of weights, [B, T, D], float32, bfloat16 or float16 (float64 with impl="torch").
        v: values, [B, T, D].
        g: log decay, [D], nats a token, <= 0; its gradient is returned.
        u: bonus of the current token, [D], added to its key; its gradient is returned.
        initial_state: (a, b, m), each [N, D], float32; default zeros; its gradients are returned.
        output_final_state: return the final (a, b, m) as well; they carry gradients.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk of the torch form; default 16. The kernel has none.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, D], dtype of v; and (a, b, m), each [N, D], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.

    Cost: 23 B T D FLOPs token by token; k and v are read and o is written once, k and v twice where a text is
    cut into segments; 12 B D bytes of state.
    Source: Peng et al. 2023, arXiv:2305.13048. Differs: the paper writes -w for g.
    """
    return average(
        k, v, g=g, u=u, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    u: torch.Tensor,
    state: State,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of RWKV-4's time mixing, for decoding.

    .. math:: o_t = \frac{A_{t-1} + e^{u + k_t} v_t}{B_{t-1} + e^{u + k_t}}, \qquad
        A_t = e^{g} A_{t-1} + e^{k_t} v_t, \qquad B_t = e^{g} B_{t-1} + e^{k_t}

    Args:
        k: key, [N, D].
        v: value, [N, D].
        g: log decay, [D].
        u: bonus of the current token, [D].
        state: (a, b, m), each [N, D], float32.
        out_state: tensors that receive the next (a, b, m); `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, D], and (a, b, m) after the token.

    Cost: 23 N D FLOPs; reads and writes 12 N D bytes of state.
    Source: Peng et al. 2023, arXiv:2305.13048.
    """
    return average_step(k, v, g=g, u=u, state=state, out_state=out_state, impl=impl)
