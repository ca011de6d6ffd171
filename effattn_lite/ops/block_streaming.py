"""Block streaming: the public operator."""

import torch

from effattn_lite.ops.engines.softmax_attention import attend


def block_streaming(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_blocks: int = 1,
    local_blocks: int,
    block_size: int = 128,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""StreamingLLM in blocks: sinks and window begin at multiples of the block size.

    .. math:: \mathcal S(t) = \{j \le t : J < n_{\mathrm{sink}} \ \text{or}\ I - n_{\mathrm{loc}} < J\},
        \qquad I = \lfloor t / B_S \rfloor, \quad J = \lfloor j / B_S \rfloor

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV.
        v: values, [B, Tk, HKV, V].
        sink_blocks: blocks at the start of a sequence that are always seen.
        local_blocks: last blocks that are seen, the query's own included; >= 1.
        block_size: BS, tokens in a block; 1 gives StreamingLLM.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk; blocks count from each start.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V]; with return_lse also lse, [B, T, H].

    Raises:
        ValueError, TypeError, NotImplementedError: as `softmax_attention`.

    Cost: B H T n (2 K + 2 V) FLOPs in products, n <= (sink_blocks + local_blocks) BS keys a query.
    Source: Guo et al. 2024, Block Sparse Attention, https://github.com/mit-han-lab/Block-Sparse-Attention.
        Differs: one pattern for all heads.
    """
    for name, n, least in (
        ("sink_blocks", sink_blocks, 0),
        ("local_blocks", local_blocks, 1),
        ("block_size", block_size, 1),
    ):
        if n < least:
            raise ValueError(f"{name} is {n}, expected >= {least}")
    o, lse = attend(
        q,
        k,
        v,
        sinks=sink_blocks * block_size,
        window=local_blocks * block_size,
        grain=block_size,
        scale=scale,
        cu_seqlens=cu_seqlens,
        impl=impl,
    )
    return (o, lse) if return_lse else o
