"""StreamingLLM: the public operator."""

import torch

from effattn_lite.ops.engines.softmax_attention import attend


def streaming_llm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: int = 4,
    window: int,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""A sliding window, and the first few tokens for ever: without them a pretrained softmax falls apart.

    .. math:: \mathcal S(t) = \{j \le t : j < n_{\mathrm{sink}} \ \text{or}\ j > t - W\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K], positions already in them; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV.
        v: values, [B, Tk, HKV, V].
        sinks: tokens at the start of a sequence that are always seen.
        window: W >= 1 last tokens that are seen, the query's own included.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk; each has its own sinks.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V]; with return_lse also lse, [B, T, H].

    Raises:
        ValueError, TypeError, NotImplementedError: as `softmax_attention`.

    Cost: B H T (sinks + W) (2 K + 2 V) FLOPs in products; decoding keeps sinks + W keys and values.
    Source: Xiao et al. 2023, arXiv:2309.17453, section 3.2. Differs: there positions are counted inside the
        cache; here the caller rotates, `layers.streaming_llm` as the paper does.
    """
    o, lse = attend(q, k, v, sinks=sinks, window=window, scale=scale, cu_seqlens=cu_seqlens, impl=impl)
    return (o, lse) if return_lse else o
