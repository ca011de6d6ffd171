"""Mamba: a selective state space model, one small diagonal system a channel."""

import torch

from effattn_lite.ops.engines.selective_scan import check_tensors, selective_scan, selective_scan_step


def mamba(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Selective scan: a channel keeps M numbers, and the token says how fast they fade and what is written.

    .. math:: h_t = e^{\Delta_t A} \odot h_{t-1} + (\Delta_t \odot x_t)\, B_t^\top, \qquad
        y_t = s\, h_t C_t + D \odot x_t

    Args:
        x: inputs, [B, T, D], float32, bfloat16 or float16 (float64 with impl="torch").
        dt: step sizes, [B, T, D], >= 0, dtype of x or float32.
        A: rates of decay, [D, M], < 0, nats a unit of dt; its gradient is returned.
        B: what a token writes to the states of every channel, [B, T, M].
        C: what it reads from them, [B, T, M].
        D: weight of the input in the output, [D]; default none; its gradient is returned.
        scale: s; default 1.
        initial_state: h_0, [N, D, M], float32; default zeros; its gradient is returned.
        output_final_state: return h_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk of the torch form; default 32. It changes no result.
        impl: "auto", "torch" or "triton".

    Returns:
        y, [B, T, D], dtype of x; and h_T, [N, D, M], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with M above 256.

    Cost: 7 B T D M FLOPs recurrent, one of them an exponential; 4 B D M bytes of state.
    Source: Gu and Dao 2023, arXiv:2312.00752; B by Euler's rule as in the released code. Differs: the paper
    writes N for M; the gate and its SiLU are the layer's.
    """
    check_tensors(
        _named(x, dt, A, B, C, D, "B T"),
        like="x",
        states={"initial_state": (initial_state, "N D M")},
        cu_seqlens=cu_seqlens,
    )
    o, state = selective_scan(
        C[:, :, None], B[:, :, None], x[:, :, None], dt[:, :, None], A=A, D=D,
        scale=1.0 if scale is None else scale,
        initial_state=None if initial_state is None else initial_state[:, None],
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=impl,
    )  # fmt: skip
    return o[:, :, 0], None if state is None else state[:, 0]


def step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    state: torch.Tensor,
    D: torch.Tensor | None = None,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of the selective scan, for decoding.

    .. math:: h_t = e^{\Delta_t A} \odot h_{t-1} + (\Delta_t \odot x_t)\, B_t^\top, \qquad
        y_t = s\, h_t C_t + D \odot x_t

    Args:
        x: input, [N, D].
        dt: step size, [N, D], >= 0.
        A: rates of decay, [D, M], < 0.
        B, C: what the token writes and reads, [N, M].
        state: h_{t-1}, [N, D, M], float32.
        D: weight of the input in the output, [D]; default none.
        scale: s; default 1.
        out_state: tensor that receives h_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        y, [N, D], and h_t, [N, D, M].

    Cost: 7 N D M FLOPs; reads and writes 4 N D M bytes of state, which is most of what counts.
    Source: Gu and Dao 2023, arXiv:2312.00752.
    """
    states = {"state": (state, "N D M"), "out_state": (out_state, "N D M")}
    check_tensors(_named(x, dt, A, B, C, D, "N"), like="x", states=states)
    y, after = selective_scan_step(
        C[:, None], B[:, None], x[:, None], dt[:, None], A=A, D=D, state=state[:, None],
        scale=1.0 if scale is None else scale, impl=impl,
        out_state=None if out_state is None else out_state[:, None],
    )  # fmt: skip
    return y[:, 0], after[:, 0] if out_state is None else out_state


def _named(x, dt, A, B, C, D, rows):
    return {
        "x": (x, f"{rows} D", True),
        "dt": (dt, f"{rows} D", False),
        "A": (A, "D M", False),
        "B": (B, f"{rows} M", True),
        "C": (C, f"{rows} M", True),
        "D": (D, "D", False),
    }
