"""mLSTM (xLSTM): a matrix memory with an exponential input gate, a sigmoid forget gate and a normaliser."""

import torch

from effattn_lite.ops.engines import mlstm as engine


def mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    i: torch.Tensor,
    f: torch.Tensor,
    scale: float | None = None,
    initial_state: engine.State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, engine.State | None]:
    r"""A matrix memory whose writes are weighed by an exponential, read as an average.

    .. math:: m_t = \max(\log\sigma(f_t) + m_{t-1},\; i_t), \qquad (C_t, n_t) =
        e^{\log\sigma(f_t) + m_{t-1} - m_t}\,(C_{t-1}, n_{t-1}) + e^{i_t - m_t}\, k_t\,(v_t^\top, 1)
    .. math:: o_t = \frac{s\, C_t^\top q_t}{\max(|s\, n_t^\top q_t|,\; e^{-m_t})}

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        i: input gate before its exponential, [B, T, H], any floating dtype; a token is written with weight
            e^i.
        f: forget gate before its sigmoid, [B, T, H], any floating dtype; a step keeps the share sigmoid(f).
        scale: s; default K ** -0.5.
        initial_state: (C_0, n_0, m_0), [N, H, K, V], [N, H, K] and [N, H], float32; default zeros; its
            gradient is returned.
        output_final_state: return (C_T, n_T, m_T) as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 64 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and (C_T, n_T, m_T), float32 (float64 for float64), or None. The memory
        is e^m C and the normaliser e^m n: outputs depend on these alone, the parts on m too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K or V above 256.

    Cost: B T H (2 C (K + V) + 4 K V) FLOPs in chunks of C, 5 B T H K V recurrent; the state has
    4 B H (K V + K + 1) bytes.
    Source: Beck et al. 2024, arXiv:2405.04517. Differs: s stands at the read-out, not in the keys.
    """
    return engine.mlstm(
        q, k, v, i=i, f=f, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    i: torch.Tensor,
    f: torch.Tensor,
    state: engine.State,
    scale: float | None = None,
    out_state: engine.State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, engine.State]:
    r"""One token of mLSTM, for decoding.

    .. math:: m_t = \max(\log\sigma(f_t) + m_{t-1},\; i_t), \qquad (C_t, n_t) =
        e^{\log\sigma(f_t) + m_{t-1} - m_t}\,(C_{t-1}, n_{t-1}) + e^{i_t - m_t}\, k_t\,(v_t^\top, 1)
    .. math:: o_t = \frac{s\, C_t^\top q_t}{\max(|s\, n_t^\top q_t|,\; e^{-m_t})}

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        i: input gate before its exponential, [N, H].
        f: forget gate before its sigmoid, [N, H].
        state: (C, n, m) of the tokens before, [N, H, K, V], [N, H, K] and [N, H], float32.
        scale: s; default K ** -0.5.
        out_state: tensors that receive the next state; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and (C, n, m) after the token.

    Cost: 5 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Beck et al. 2024, arXiv:2405.04517.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return engine.mlstm_step(q, k, v, i=i, f=f, state=state, scale=scale, out_state=out_state, impl=impl)
