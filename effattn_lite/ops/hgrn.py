"""HGRN: a leaky sum a channel, with a leak that the text sets."""

import torch

from effattn_lite.ops.engines.elementwise import leak, leak_step


def hgrn(
    x: torch.Tensor,
    *,
    g: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""HGRN's recurrence: every channel keeps a share of itself, which the token chooses, and adds its input.

    .. math:: h_t = e^{g_t} \odot h_{t-1} + x_t, \qquad o_t = h_t

    Args:
        x: inputs, [B, T, D], float32, bfloat16 or float16 (float64 with impl="torch").
        g: log decay, [B, T, D], nats a token, <= 0; 0 keeps everything; of any float dtype.
        initial_state: h_0, [N, D], float32; default zeros; its gradient is returned.
        output_final_state: return h_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk of the torch form; default 64. The kernel has none.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, D], dtype of x; and h_T, [N, D], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.

    Cost: 3 B T D FLOPs; x and g are read and o is written once, x and g twice where a text is cut into
    segments; 4 B D bytes of state.
    Source: Qin et al. 2023, arXiv:2311.04823. Differs: real, where the paper's channels turn by a fixed
    angle a token as well; the factor 1 - e^g is the layer's.
    """
    return leak(
        x, g=g, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    x: torch.Tensor,
    *,
    g: torch.Tensor,
    state: torch.Tensor,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of HGRN's recurrence, for decoding.

    .. math:: h_t = e^{g_t} \odot h_{t-1} + x_t, \qquad o_t = h_t

    Args:
        x: input, [N, D].
        g: log decay, [N, D].
        state: h_{t-1}, [N, D], float32.
        out_state: tensor that receives h_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, D], dtype of x, and h_t, [N, D].

    Cost: 3 N D FLOPs; reads and writes 4 N D bytes of state.
    Source: Qin et al. 2023, arXiv:2311.04823.
    """
    return leak_step(x, g=g, state=state, out_state=out_state, impl=impl)
