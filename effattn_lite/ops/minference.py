"""MInference: the public operator of its vertical-slash pattern, and the choices of two patterns."""

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines import block_select, vertical_slash


def minference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    columns: int = 1000,
    diagonals: int = 6096,
    sinks: int = 30,
    window: int = 30,
    last_queries: int = 64,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Attention on the columns and diagonals of the score matrix that the last queries weigh most.

    .. math:: \mathcal S(t) = \{j \le t : j \in \mathcal V \ \text{or}\ t - j \in \mathcal D\}

    This is the vertical-slash pattern. Offline, MInference gives every head one of three: another is the A
    shape, which is `streaming_llm(sinks, window)`, and the third is `block_sparse_attention` on the blocks of
    `select_blocks`. Heads with other patterns, or other sizes, are other calls. A pair on a column and a
    diagonal counts once. Prefill only: what a token sees depends on the last tokens.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch".
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        columns: size of V, for each head.
        diagonals: size of D, for each head.
        sinks: first columns that are always among them.
        window: nearest diagonals that are always among them, the token's own included.
        last_queries: L, queries at the end whose weights decide.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1; read on the host.
        return_lse: return the log-sum-exp of each row as well.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32. A row that sees nothing
        (without window) has o = 0 and lse = -inf. There is no gradient.

    Raises:
        ValueError: shapes do not fit, or a size is negative.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: a gradient; impl="triton" with K or V over 256, or last_queries over 128.

    Cost: 2 B H L T K FLOPs for the choice (the kernels compute it twice); B H T (columns + diagonals)
        (2 K + 2 V) at most in products of the attention, where single diagonals cost as much as whole blocks.
    Source: Jiang et al. 2024, arXiv:2407.02490; defaults and what is always kept as in the released code.
        Differs: that code sees all pairs of each 64 x 64 block that a chosen diagonal crosses.
    """
    chosen = _choose(
        q, k, v, columns=columns, diagonals=diagonals, sinks=sinks, window=window,
        last_queries=last_queries, scale=scale, cu_seqlens=cu_seqlens, impl=impl,
    )  # fmt: skip
    o, lse = vertical_slash.attend(q, k, v, *chosen, scale=scale, cu_seqlens=cu_seqlens, impl=impl)
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    columns: int = 1000,
    diagonals: int = 6096,
    sinks: int = 30,
    window: int = 30,
    last_queries: int = 64,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Columns and diagonals on which the last queries put most weight: sets of keys and of distances.

    .. math:: \hat A = \operatorname{softmax}(s\,Q_{[-L:]} K^\top), \quad
        v_j = \sum_i \hat A_{ij}, \quad s_\delta = \sum_i \hat A_{i,\,i-\delta}

    Weights are compared with 11 significant bits; of equal ones the lowest number goes first.

    Args: as `minference`.

    Returns:
        Columns, [B, H, min(columns, T)], and diagonals, [B, H, min(diagonals, T)], ascending int64; with
        packed sequences [N, H, ...], -1 where a sequence has fewer.

    Raises:
        ValueError, TypeError, NotImplementedError: as `minference`.

    Cost: 2 B H L T K FLOPs in the product.
    Source: Jiang et al. 2024.
    """
    return _choose(
        q, k, None, columns=columns, diagonals=diagonals, sinks=sinks, window=window,
        last_queries=last_queries, scale=scale, cu_seqlens=cu_seqlens, impl=impl,
    )  # fmt: skip


def select_blocks(
    q: torch.Tensor, k: torch.Tensor, *, top_k: int = 100, block_size: int = 64, impl: str = "auto"
) -> torch.Tensor:
    r"""The block-sparse pattern's choice: the blocks of keys whose mean suits a block's mean query best.

    .. math:: \mathcal I(I) = \operatorname{top}_k\ \bar q_I^\top \bar k_J \ \text{over}\ J \le I

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        top_k: blocks that a block of queries sees; of equals the lowest.
        block_size: BS, tokens in a block.
        impl: "torch", "triton" or "auto".

    Returns:
        `block_indices` of `block_sparse_attention`, [B, NQ, H, min(top_k, NQ)] int64, -1 for none.

    Raises:
        ValueError, TypeError, NotImplementedError: as `minference`.

    Cost: 2 B H (T / BS)^2 K FLOPs, and reading q and k once.
    Source: Jiang et al. 2024. The paper takes a softmax first, which no choice of the largest minds.
    """
    block_select.check(q, k, top_k=top_k, block_size=block_size)
    impl = common.choose_impl(impl, q, refusal=block_select.refusal(q))
    q_mean, k_mean = (block_select.block_means(x.detach(), block_size, impl=impl)[0] for x in (q, k))
    k_mean = k_mean.repeat_interleave(q.shape[2] // k.shape[2], 1)
    see = block_select.visible(q.shape[1], block_size, block_size, q.device)
    # [B, H, NQ, K] x [B, H, NK, K] -> [B, H, NQ, NK]
    s = (q_mean @ k_mean.mT).masked_fill(~see, -torch.inf)
    # shifted and scaled to [0, 1], as ranks are of masses
    low, high = s.masked_fill(~see, torch.inf).amin(-1, keepdim=True), s.amax(-1, keepdim=True)
    rank = ((s - low) / (high - low).clamp(min=1e-30)).masked_fill(~see, -1.0) + 1
    index = block_select.order(rank)[..., :top_k]
    return index.where(see.expand_as(s).gather(-1, index), -1).transpose(1, 2)


def _choose(
    q, k, v, *, columns, diagonals, sinks, window, last_queries, scale, cu_seqlens, impl
):  # fmt: skip
    block_select.check(q, k, v, cu_seqlens, last_queries=last_queries)
    for name, n in (("columns", columns), ("diagonals", diagonals), ("sinks", sinks), ("window", window)):
        if n < 0:
            raise ValueError(f"{name} is {n}, expected >= 0")
    limit = f"last_queries <= 128, got {last_queries}" if last_queries > 128 else None
    impl = common.choose_impl(impl, q, refusal=block_select.refusal(q) or limit)
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def choose(q, k):
        sums = block_select.last_query_sums(q, k, last=last_queries, scale=scale, impl=impl)
        return [
            block_select.top_k(x, n, always)
            for x, n, always in zip(sums, (columns, diagonals), (sinks, window), strict=True)
        ]

    q, k = q.detach(), k.detach()
    if cu_seqlens is None:
        return tuple(choose(q, k))
    edges = cu_seqlens.tolist()
    parts = [choose(q[:, a:b], k[:, a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    widest = [max(part[i].shape[2] for part in parts) for i in range(2)]
    pad = torch.nn.functional.pad
    return tuple(
        torch.cat([pad(p[i], (0, widest[i] - p[i].shape[2]), value=-1) for p in parts]) for i in range(2)
    )
