"""Kimi Delta Attention: the delta rule on a state whose every key channel fades at its own rate."""

import torch

from effattn_lite.ops.engines.delta import delta, delta_step


def kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Kimi Delta Attention: fade every channel, erase the key's old value, write the new one.

    .. math:: S_t = (I - \beta_t k_t k_t^\top)\, \operatorname{Diag}(e^{g_t})\, S_{t-1}
        + \beta_t k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch"); value head h reads
            query head h // (HV / H).
        k: keys, [B, T, H, K], shared as the queries; expected of length 1 over K (not normalised here).
        v: values, [B, T, HV, V], HV a multiple of H.
        g: log decay of a key channel, [B, T, HV, K], nats a token, <= 0; 0 keeps everything.
        beta: write strength, [B, T, HV], in [0, 1], or in [0, 2] where reflections are wanted.
        scale: s; default K ** -0.5.
        initial_state: S_0, [N, HV, K, V], float32; default zeros; its gradient is returned.
        output_final_state: return S_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; torch's default is 16; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, HV, V], dtype of q; and S_T, [N, HV, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K or V above 256.

    Cost: B T HV (6 C K + 4 C V + C^2 + 6 K V) FLOPs in chunks of C, 7 B T HV K V recurrent; 4 B HV K V bytes
    of state. In torch also a table of C K numbers a token and head.
    Source: Kimi Team 2025, arXiv:2510.26692.
    """
    return delta(
        q, k, v, g=g, beta=beta, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of Kimi Delta Attention, for decoding.

    .. math:: S_t = (I - \beta_t k_t k_t^\top)\, \operatorname{Diag}(e^{g_t})\, S_{t-1}
        + \beta_t k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, HV, V].
        g: log decay of a key channel, [N, HV, K], nats, <= 0.
        beta: write strength, [N, HV].
        state: S_{t-1}, [N, HV, K, V], float32.
        scale: s; default K ** -0.5.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, HV, V], and S_t, [N, HV, K, V].

    Cost: 7 N HV K V FLOPs; reads and writes 4 N HV K V bytes of state, which is all that counts.
    Source: Kimi Team 2025, arXiv:2510.26692.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return delta_step(q, k, v, g=g, beta=beta, state=state, scale=scale, out_state=out_state, impl=impl)
