"""Mamba-2: a state space model whose transition is one number a head and token."""

import torch

from effattn_lite.ops.engines.gated_decay import gated_decay, gated_decay_step


def mamba2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""State space duality: the whole state of a head fades by one factor that the token chooses.

    .. math:: S_t = e^{g_t} S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Value head h reads and writes with query and key h // (HV / H): many heads share one, as in the paper.

    Args:
        q: queries, the paper's C, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, the paper's B, [B, T, H, K].
        v: values, the paper's input times its step, [B, T, HV, V]; HV is a multiple of H.
        g: log decay, step times A, [B, T, HV], nats a token, <= 0; 0 keeps everything; its gradient is
            returned.
        scale: s; default 1.
        initial_state: S_0, [N, HV, K, V], float32; default zeros; its gradient is returned.
        output_final_state: return S_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 64 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, HV, V], dtype of q; and S_T, [N, HV, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K or V above 256.

    Cost: 2 B T H C K + B T HV (2 C V + 4 K V) FLOPs in chunks of C, 5 B T HV K V recurrent; 4 B HV K V bytes
    of state.
    Source: Dao and Gu 2024, arXiv:2405.21060. Differs: the paper writes C, B, X for q, k, v, N for K and P
    for V; the discretisation, the skip D x and the gate are the layer's.
    """
    return gated_decay(
        q, k, v, g=g, channel=False, scale=1.0 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of the state space model, for decoding.

    .. math:: S_t = e^{g_t} S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: query, the paper's C, [N, H, K].
        k: key, the paper's B, [N, H, K].
        v: value, the paper's input times its step, [N, HV, V].
        g: log decay, step times A, [N, HV], nats, <= 0.
        state: S_{t-1}, [N, HV, K, V], float32.
        scale: s; default 1.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, HV, V], and S_t, [N, HV, K, V].

    Cost: 5 N HV K V FLOPs; reads and writes 4 N HV K V bytes of state, which is all that counts.
    Source: Dao and Gu 2024, arXiv:2405.21060.
    """
    scale = 1.0 if scale is None else scale
    return gated_decay_step(
        q, k, v, g=g, channel=False, state=state, scale=scale, out_state=out_state, impl=impl
    )
