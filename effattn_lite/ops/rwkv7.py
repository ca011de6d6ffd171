"""RWKV-7: a state whose channels fade each at its own rate, and whose transition adds a matrix of rank 1."""

import torch

from effattn_lite.ops.engines.dplr import dplr, dplr_step


def rwkv7(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""RWKV-7's time mixing: read with a, fade, write the answer at b and the value at k, read with q.

    .. math:: S_t = \bigl(\operatorname{Diag}(e^{g_t}) + b_t a_t^\top\bigr)\, S_{t-1} + k_t v_t^\top,
        \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K], not normalised.
        v: values, [B, T, H, V].
        g: log decay of a key channel, [B, T, H, K], nats a token, <= 0; 0 keeps everything.
        a: what is read before the write, [B, T, H, K]; in use minus a vector of length 1.
        b: where the answer is written, [B, T, H, K]; in use -a times rates in (0, 1).
        scale: s; default 1.
        initial_state: S_0, [N, H, K, V], float32; default zeros; its gradient is returned.
        output_final_state: return S_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; torch's default is 16; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and S_T, [N, H, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K or V above 256.

    Cost: B T H (14 C K + 8 C V + C^2 + 8 K V) FLOPs in chunks of C, 9 B T H K V recurrent; 4 B H K V bytes of
    state. In torch also a table of C K numbers a token and head.
    Source: Peng et al. 2025, arXiv:2503.14456. Differs: the paper's state is transposed, [V, K]; its r is q
    here, its w is exp(g).
    """
    return dplr(
        q, k, v, g=g, a=a, b=b, scale=1.0 if scale is None else scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of RWKV-7, for decoding.

    .. math:: S_t = \bigl(\operatorname{Diag}(e^{g_t}) + b_t a_t^\top\bigr)\, S_{t-1} + k_t v_t^\top,
        \qquad o_t = s\, S_t^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        g: log decay of a key channel, [N, H, K], nats, <= 0.
        a: what is read before the write, [N, H, K].
        b: where the answer is written, [N, H, K].
        state: S_{t-1}, [N, H, K, V], float32.
        scale: s; default 1.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, K, V].

    Cost: 9 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Peng et al. 2025, arXiv:2503.14456.
    """
    scale = 1.0 if scale is None else scale
    return dplr_step(q, k, v, g=g, a=a, b=b, state=state, scale=scale, out_state=out_state, impl=impl)
