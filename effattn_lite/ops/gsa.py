"""Gated slot attention: two gated linear attentions with a softmax over M slots between them."""

import torch

from effattn_lite.ops.engines.slots import slots, slots_step

State = tuple[torch.Tensor, torch.Tensor]


def gsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    s: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""Gated slot attention: softmax attention to M slots, which gates fill with keys and values.

    .. math:: \tilde K_t = \tilde K_{t-1} \operatorname{Diag}(e^{g_t}) + k_t s_t^\top, \qquad
        \tilde V_t = \operatorname{Diag}(e^{g_t})\, \tilde V_{t-1} + s_t v_t^\top, \qquad
        o_t = \tilde V_t^\top \operatorname{softmax}(s\, \tilde K_t^\top q_t)

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        s: what a token writes to each slot, [B, T, H, M]; 1 - e^g in the paper.
        g: log decay of each slot, [B, T, H, M], nats a token, <= 0; 0 keeps the slot; its gradient is
            returned.
        scale: of the scores; default K ** -0.5.
        initial_state: (K~_0, V~_0), [N, H, K, M] and [N, H, M, V], float32; default zeros; their gradients
            are returned.
        output_final_state: return (K~_T, V~_T) as well; they carry gradients.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 16 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and (K~_T, V~_T), float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K, V or M above 256.

    Cost: B T H (C (2 K + 2 V + 7 M) + 4 M (K + V)) FLOPs in chunks of C, 5 B T H M (K + V) recurrent;
    4 B H M (K + V) bytes of state.
    Source: Zhang et al. 2024, arXiv:2409.07146. Differs: s is free; the scores are scaled, as in the authors'
    code.
    """
    return slots(
        q, k, v, s=s, g=_gate(g), scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    s: torch.Tensor,
    g: torch.Tensor,
    state: State,
    scale: float | None = None,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of gated slot attention, for decoding.

    .. math:: \tilde K_t = \tilde K_{t-1} \operatorname{Diag}(e^{g_t}) + k_t s_t^\top, \qquad
        \tilde V_t = \operatorname{Diag}(e^{g_t})\, \tilde V_{t-1} + s_t v_t^\top, \qquad
        o_t = \tilde V_t^\top \operatorname{softmax}(s\, \tilde K_t^\top q_t)

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        s: what the token writes to each slot, [N, H, M].
        g: log decay of each slot, [N, H, M], nats, <= 0.
        state: (K~_{t-1}, V~_{t-1}), [N, H, K, M] and [N, H, M, V], float32.
        scale: of the scores; default K ** -0.5.
        out_state: tensors that receive the next state; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and (K~_t, V~_t).

    Cost: 5 N H M (K + V) FLOPs; reads and writes 4 N H M (K + V) bytes of state, which is all that counts.
    Source: Zhang et al. 2024, arXiv:2409.07146.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return slots_step(q, k, v, s=s, g=_gate(g), state=state, scale=scale, out_state=out_state, impl=impl)


def _gate(g):
    # without gates the engine would make ABC's
    if g is None:
        raise ValueError("g is None, expected a log decay [B, T, H, M]")
    return g
