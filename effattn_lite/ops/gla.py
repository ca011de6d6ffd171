"""Gated linear attention: every key channel of every token says how much of its memory is kept."""

import torch

from effattn_lite.ops.engines.gated_decay import gated_decay, gated_decay_step


def gla(
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
    r"""Gated linear attention: each row of the memory fades by a factor that the token chooses.

    .. math:: S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel; its gradient is returned.
        scale: s; default K ** -0.5.
        initial_state: S_0, [N, H, K, V], float32; default zeros; its gradient is returned.
        output_final_state: return S_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 16 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and S_T, [N, H, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K or V above 256.

    Cost: B T H (5 C K + 2 C V + 4 K V) FLOPs in chunks of C, 5 B T H K V recurrent; 4 B H K V bytes of state.
    Source: Yang et al. 2024, arXiv:2312.06635. Differs: the paper writes alpha for e^g; s is that of the
    authors' code.
    """
    return gated_decay(
        q, k, v, g=g, channel=True, scale=q.shape[-1] ** -0.5 if scale is None else scale,
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
    r"""One token of gated linear attention, for decoding.

    .. math:: S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        g: log decay, [N, H, K], nats, <= 0.
        state: S_{t-1}, [N, H, K, V], float32.
        scale: s; default K ** -0.5.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, K, V].

    Cost: 5 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Yang et al. 2024, arXiv:2312.06635.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return gated_decay_step(
        q, k, v, g=g, channel=True, state=state, scale=scale, out_state=out_state, impl=impl
    )
