"""Attention with bounded-memory control: softmax attention to M slots, each an average of the text so far."""

import torch

from effattn_lite.ops.engines.slots import slots, slots_step

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def abc(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    s: torch.Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""ABC: M slots average keys and values with weights e^s; a query attends to the slots.

    .. math:: z_t = \ln\bigl(e^{z_{t-1}} + e^{s_t}\bigr), \qquad
        w_t = e^{s_t - z_t}, \qquad
        \tilde K_t = \tilde K_{t-1} \operatorname{Diag}(1 - w_t) + k_t w_t^\top, \qquad
        \tilde V_t = \operatorname{Diag}(1 - w_t)\, \tilde V_{t-1} + w_t v_t^\top
    .. math:: o_t = \tilde V_t^\top \operatorname{softmax}(s\, \tilde K_t^\top q_t)

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        s: control, [B, T, H, M]: logarithms of the weights with which a token enters the slots' averages.
        scale: of the scores; default K ** -0.5.
        initial_state: (K~_0, V~_0, z_0, c_0), [N, H, K, M], [N, H, M, V], [N, H, M] and [N, H], float32: the
            averages, the log of the sum of their weights, and of how many tokens; default zeros, an empty
            memory; their gradients are returned.
        output_final_state: return (K~_T, V~_T, z_T, c_T) as well; they carry gradients.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 16 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and (K~_T, V~_T, z_T, c_T), float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K, V or M above 256.

    Cost: B T H (C (2 K + 2 V + 7 M) + 4 M (K + V)) FLOPs in chunks of C, 5 B T H M (K + V) recurrent;
    4 B H M (K + V + 1) bytes of state. The shares w are written to memory in the dtype of q: in float16 those
    below 6e-5, of a text of some ten thousand tokens, lose digits.
    Source: Peng et al. 2022, arXiv:2110.02488. Differs: the scores are scaled.
    """
    return slots(
        q, k, v, s=s, g=None, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    s: torch.Tensor,
    state: State,
    scale: float | None = None,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of ABC, for decoding.

    .. math:: w_t = \frac{e^{s_t}}{e^{z_{t-1}} + e^{s_t}}, \qquad
        \tilde K_t = \tilde K_{t-1} \operatorname{Diag}(1 - w_t) + k_t w_t^\top, \qquad
        \tilde V_t = \operatorname{Diag}(1 - w_t)\, \tilde V_{t-1} + w_t v_t^\top
    .. math:: o_t = \tilde V_t^\top \operatorname{softmax}(s\, \tilde K_t^\top q_t)

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        s: control, [N, H, M].
        state: (K~, V~, z, c) of the tokens before, float32; zeros are an empty memory.
        scale: of the scores; default K ** -0.5.
        out_state: tensors that receive the next state; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and (K~, V~, z, c) after the token.

    Cost: 5 N H M (K + V) FLOPs; reads and writes 4 N H M (K + V) bytes of state, which is all that counts.
    Source: Peng et al. 2022, arXiv:2110.02488.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return slots_step(q, k, v, s=s, g=None, state=state, scale=scale, out_state=out_state, impl=impl)
