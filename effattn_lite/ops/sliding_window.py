"""Sliding-window attention: the public operator."""

import torch

from effattn_lite.ops.engines.softmax_attention import attend


def sliding_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Each token sees itself and the W - 1 tokens before it: cost grows with T, and the cache stops growing.

    .. math:: \mathcal S(t) = \{j : t - W < j \le t\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Args:
        q: queries, [B, T, H, K], positions already in them; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV.
        v: values, [B, Tk, HKV, V].
        window: W >= 1 last tokens that are seen, the query's own included.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk; no window crosses an edge.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V]; with return_lse also lse, [B, T, H].

    Raises:
        ValueError, TypeError, NotImplementedError: as `softmax_attention`.

    Cost: B H T W (2 K + 2 V) FLOPs in products; decoding keeps W keys and values.
    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1, where half of the window lies ahead of
        the token; here it ends with the token, as in Jiang et al. 2023, arXiv:2310.06825, section 2.
    """
    o, lse = attend(q, k, v, window=window, scale=scale, cu_seqlens=cu_seqlens, impl=impl)
    return (o, lse) if return_lse else o
