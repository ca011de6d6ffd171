"""RWKV-6 (Finch): linear attention with a decay that the token chooses and a bonus for the current token."""

import torch

from effattn_lite.ops.engines.gated_decay import gated_decay, gated_decay_step


def rwkv6(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    u: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Finch's time mixing: a token reads the past and its bonus, then decays each channel and writes.

    .. math:: o_t = s\,\bigl(S_{t-1} + \operatorname{Diag}(u)\, k_t v_t^\top\bigr)^\top q_t, \qquad
        S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top

    Args:
        q: receptance (the paper's r), [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel; its gradient is returned.
        u: bonus of the current token, [H, K]; its gradient is returned.
        scale: s; default 1.
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

    Cost: B T H (5 C K + 2 C V + 4 K V) FLOPs in chunks of C, 7 B T H K V recurrent; 4 B H K V bytes of state.
    Source: Peng et al. 2024, arXiv:2404.05892. Differs: the paper writes w for e^g.
    """
    return gated_decay(
        q, k, v, g=g, u=u, channel=True, scale=1.0 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    u: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of Finch's time mixing, for decoding.

    .. math:: o_t = s\,\bigl(S_{t-1} + \operatorname{Diag}(u)\, k_t v_t^\top\bigr)^\top q_t, \qquad
        S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top

    Args:
        q: receptance, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        g: log decay, [N, H, K], nats, <= 0.
        u: bonus of the current token, [H, K].
        state: S_{t-1}, [N, H, K, V], float32.
        scale: s; default 1.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, K, V].

    Cost: 7 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Peng et al. 2024, arXiv:2404.05892.
    """
    scale = 1.0 if scale is None else scale
    return gated_decay_step(
        q, k, v, g=g, u=u, channel=True, state=state, scale=scale, out_state=out_state, impl=impl
    )
