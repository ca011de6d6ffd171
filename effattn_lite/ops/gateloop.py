"""GateLoop: linear attention whose channels fade and turn, both as the text says."""

import torch

from effattn_lite.ops.engines.gateloop import State, gateloop_step
from effattn_lite.ops.engines.gateloop import gateloop as run


def gateloop(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    theta: torch.Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""GateLoop: every key channel of every token shrinks and turns the memory; the real part is read.

    .. math:: S_t = \operatorname{Diag}(e^{g_t + i\theta_t})\, S_{t-1} + k_t v_t^\top, \qquad
        o_t = s \operatorname{Re}(S_t)^\top q_t

    The gradient of an angle is a sum over the rest of the text. In 16 bits its terms are rounded first by
    Triton, so that their errors add up; where theta's gradient must be sharp over long texts, use float32.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; of any float dtype.
        theta: angle, [B, T, H, K], radians a token; of any float dtype, float32 in good practice, since its
            errors add up over the text.
        scale: s; default 1.
        initial_state: real and imaginary part of S_0, each [N, H, K, V], float32; default zeros; its
            gradients are returned.
        output_final_state: return the parts of S_T as well; they carry gradients.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 16 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and the parts of S_T, each [N, H, K, V], float32 (float64 for float64),
        or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K above 128 or V above 256.

    Cost: gated linear attention with 2 K channels, B T H (6 C K + 2 C V + 8 K V) FLOPs in chunks of C, and
    the turn of q and k; 8 B H K V bytes of state.
    Source: Katsch 2023, arXiv:2311.01927. Differs: q, k and v have heads, and a state is carried.
    """
    return run(
        q, k, v, g=g, theta=theta, scale=1.0 if scale is None else scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    theta: torch.Tensor,
    state: State,
    scale: float | None = None,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of GateLoop, for decoding.

    .. math:: S_t = \operatorname{Diag}(e^{g_t + i\theta_t})\, S_{t-1} + k_t v_t^\top, \qquad
        o_t = s \operatorname{Re}(S_t)^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        g: log decay, [N, H, K].
        theta: angle, [N, H, K], radians.
        state: real and imaginary part of S_{t-1}, each [N, H, K, V], float32.
        scale: s; default 1.
        out_state: tensors that receive the parts of S_t; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and the parts of S_t, each [N, H, K, V].

    Cost: 10 N H K V FLOPs; reads and writes 8 N H K V bytes of state, which is all that counts.
    Source: Katsch 2023, arXiv:2311.01927.
    """
    scale = 1.0 if scale is None else scale
    return gateloop_step(q, k, v, g=g, theta=theta, state=state, scale=scale, out_state=out_state, impl=impl)
