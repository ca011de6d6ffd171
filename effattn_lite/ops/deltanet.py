"""DeltaNet: linear attention whose keys read before they write, and write the difference only."""

import torch

from effattn_lite.ops.engines.delta import delta, delta_step


def deltanet(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""The delta rule: a key reads what it holds, and moves it towards the new value.

    .. math:: S_t = S_{t-1} + \beta_t k_t (v_t - S_{t-1}^\top k_t)^\top
        = (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K]; expected of length 1 over K (not normalised here).
        v: values, [B, T, H, V].
        beta: write strength, [B, T, H], in [0, 1], or in [0, 2] where reflections are wanted.
        scale: s; default K ** -0.5.
        initial_state: S_0, [N, H, K, V], float32; default zeros; its gradient is returned.
        output_final_state: return S_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; torch's default is 64; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and S_T, [N, H, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K or V above 256.

    Cost: B T H (6 C K + 4 C V + C^2 + 6 K V) FLOPs in chunks of C, 6 B T H K V recurrent; 4 B H K V bytes of
    state.
    Source: Yang et al. 2024, arXiv:2406.06484; the rule is that of Schlag et al. 2021, arXiv:2102.11174.
    Differs: the papers' state is the transpose, [V, K].
    """
    return delta(
        q, k, v, beta=beta, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of the delta rule, for decoding.

    .. math:: S_t = S_{t-1} + \beta_t k_t (v_t - S_{t-1}^\top k_t)^\top
        = (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        beta: write strength, [N, H].
        state: S_{t-1}, [N, H, K, V], float32.
        scale: s; default K ** -0.5.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, K, V].

    Cost: 6 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Yang et al. 2024, arXiv:2406.06484; the rule is that of Schlag et al. 2021, arXiv:2102.11174.
    Differs: the papers' state is the transpose, [V, K].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return delta_step(q, k, v, beta=beta, state=state, scale=scale, out_state=out_state, impl=impl)
