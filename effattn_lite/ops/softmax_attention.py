"""Softmax attention: the public operator."""

import torch

from effattn_lite.ops.engines.softmax_attention import attend


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    sink_logits: torch.Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Every query takes the mean of the values it sees, weighted by how well their keys match it.

    .. math:: o_t = \sum_{j \in \mathcal S(t)} e^{s\, q_t^\top k_j - \mathrm{lse}_t}\, v_j, \qquad
        \mathrm{lse}_t = \ln \sum_{j \in \mathcal S(t)} e^{s\, q_t^\top k_j}

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch". The queries are the
            last T of Tk tokens, query i at position Tk - T + i, as decoding and chunked prefill need it.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV, query heads h G .. h G + G - 1 share key head h.
        v: values, [B, Tk, HKV, V].
        causal: see no later token.
        window: W >= 1, see j > t - W only, the token itself included; not causal: j < t + W as well.
        sinks: the first tokens of a sequence, seen from outside the window too.
        sink_logits: learned sinks, [H]: e^sink is added to the denominator, also of lse, and to no value.
        softcap: c > 0: scores become c tanh(score / c).
        return_lse: return lse as well; gradients flow through it.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], int32 or int64, with B = 1 and T = Tk.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).
        A query that sees nothing has o = 0 and lse = -inf.

    Raises:
        ValueError: shapes, devices or ranges do not fit; cu_seqlens does not rise from 0 to T.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: B H n (2 K + 2 V) FLOPs in products, n = T^2 / 2 pairs if causal, T W in a window; the gradient 2.5
        times that; no T by T matrix in memory. Products of float32 inputs are float32, not TF32.
    Source: Dao 2023, arXiv:2307.08691, alg. 1 and 2. Differs: lse is an output, and differentiable.
    """
    o, lse = attend(
        q,
        k,
        v,
        causal=causal,
        window=window,
        sinks=sinks,
        sink_logits=sink_logits,
        softcap=softcap,
        scale=scale,
        cu_seqlens=cu_seqlens,
        impl=impl,
    )
    return (o, lse) if return_lse else o
