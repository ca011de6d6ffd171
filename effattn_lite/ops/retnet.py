r"""Retention: linear attention in which head h forgets at the fixed rate :math:`\gamma_h = 1 - 2^{-5-h}`."""

import torch

from effattn_lite.ops.engines.decay import decay, decay_step


def retnet(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Retention: every head sums the past with weights that fall by its own constant factor a token.

    .. math:: S_t = \gamma_h S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t,
        \qquad \gamma_h = 1 - 2^{-5-h}

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K]; rotated by the layer, as q.
        v: values, [B, T, H, V].
        scale: s; default K ** -0.5.
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
    Source: Sun et al. 2023, arXiv:2307.08621, eqs. (5) to (7). Differs: s stands at the read-out.
    """
    return decay(
        q, k, v, g=log_decay(q.shape[-2], q), scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    state: torch.Tensor,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of retention, for decoding.

    .. math:: S_t = \gamma_h S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        state: S_{t-1}, [N, H, K, V], float32.
        scale: s; default K ** -0.5.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, K, V].

    Cost: 5 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Sun et al. 2023, arXiv:2307.08621, eq. (6).
    """
    g, scale = log_decay(q.shape[-2], q), q.shape[-1] ** -0.5 if scale is None else scale
    return decay_step(q, k, v, g=g, state=state, scale=scale, out_state=out_state, impl=impl)


def log_decay(heads: int, like: torch.Tensor) -> torch.Tensor:
    r"""Log decay of each head, :math:`g_h = \log(1 - 2^{-5-h})`, [heads], where `like` is, float32 or wider.

    The slowest heads forget 2^-5-h a token: log1p keeps that number where 1 - 2^-5-h would round to 1.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=like.device, dtype=wide)))
