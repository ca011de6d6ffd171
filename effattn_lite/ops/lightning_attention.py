"""Lightning attention: linear attention with one given constant decay a head."""

import torch

from effattn_lite.ops.engines.decay import decay, decay_step


def lightning_attention(
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
    r"""Lightning attention: every head sums the past with weights that fall by its given factor.

    .. math:: S_t = e^{g_h} S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [H], nats a token, <= 0; 0 keeps everything; learned if it asks for a gradient.
        scale: s; default 1.
        initial_state: S_0, [N, H, K, V], float32; default zeros; its gradient is returned.
        output_final_state: return S_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 64 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and S_T, [N, H, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K or V above 256.

    Cost: B H (2 T C (K + V) + 4 T K V) FLOPs in chunks of C, 5 B T H K V recurrent; state 4 B H K V bytes.
    Source: Qin et al. 2024, arXiv:2401.04658, algorithm 1. Differs: the paper writes lambda for e^g.
    """
    return decay(
        q, k, v, g=g, scale=1.0 if scale is None else scale,
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
    r"""One token of lightning attention, for decoding.

    .. math:: S_t = e^{g_h} S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        g: log decay, [H].
        state: S_{t-1}, [N, H, K, V], float32.
        scale: s; default 1.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, K, V].

    Cost: 5 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Qin et al. 2024, arXiv:2401.04658, section 3.
    """
    scale = 1.0 if scale is None else scale
    return decay_step(q, k, v, g=g, state=state, scale=scale, out_state=out_state, impl=impl)
