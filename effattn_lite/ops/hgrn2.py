"""HGRN2: gated linear attention whose key is what the gate leaves over."""

import torch

from effattn_lite.ops.common import check_shape
from effattn_lite.ops.engines.gated_decay import gated_decay, gated_decay_step


def hgrn2(
    q: torch.Tensor,
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
    r"""HGRN2: each row of the memory moves towards the value by one minus its gate.

    .. math:: S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + (1 - e^{g_t})\, v_t^\top, \qquad
        o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        v: values, [B, T, H, V].
        g: log decay, [B, T, H, K], nats a token, <= 0; 0 keeps the channel and writes nothing; its gradient
            is returned.
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

    Cost: B T H (5 C K + 2 C V + 4 K V) FLOPs in chunks of C, 5 B T H K V recurrent; 4 B H K V bytes of state.
    The keys, 1 - e^g, are written to memory in the dtype of q.
    Source: Qin et al. 2024, arXiv:2404.07904. Differs: the paper writes o for q, i for v and f for e^g; the
    lower bound of f by layer is the layer's.
    """
    return gated_decay(
        q, _keys(g, q), v, g=g, channel=True, scale=1.0 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of HGRN2, for decoding.

    .. math:: S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + (1 - e^{g_t})\, v_t^\top, \qquad
        o_t = s\, S_t^\top q_t

    Args:
        q: query, [N, H, K].
        v: value, [N, H, V].
        g: log decay, [N, H, K], nats, <= 0.
        state: S_{t-1}, [N, H, K, V], float32.
        scale: s; default 1.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch for the state, one or more for the key; no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, K, V].

    Cost: 5 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Qin et al. 2024, arXiv:2404.07904.
    """
    scale = 1.0 if scale is None else scale
    return gated_decay_step(
        q, _keys(g, q), v, g=g, channel=True, state=state, scale=scale, out_state=out_state, impl=impl
    )


def _keys(g, q):
    sizes = {}
    rows = "B T" if q.ndim == 4 else "N"
    check_shape("q", q, f"{rows} H K", sizes)
    check_shape("g", g, f"{rows} H K", sizes)
    # 1 - e^g, without cancellation near g = 0
    return -torch.expm1(g).to(q.dtype)
