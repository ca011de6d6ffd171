"""FlexPrefill: the public operator, and its choice of blocks."""

import torch
import torch.nn.functional as F

from effattn_lite.ops import common
from effattn_lite.ops.block_sparse_attention import block_sparse_attention
from effattn_lite.ops.engines import block_select


def flexprefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1024,
    block_size: int = 128,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Block-sparse attention where each head picks its pattern and its budget from its last queries.

    .. math:: \hat a = \textstyle\sum_{j \in J} \frac1{B_S} \sum_{t > T - B_S} A_{tj}, \quad
        \bar a = \operatorname{softmax}(s\, \bar q\, \bar K^\top), \quad
        \text{query-aware if } \sqrt{\mathrm{JSD}(\bar a, \hat a)} < \tau

    A vertical-slash head counts the columns, and the diagonals, that hold gamma of the last queries' weight,
    n tokens, and keeps n // BS + 1 blocks of them, by their weight. A query-aware head keeps the fewest pairs
    of blocks that hold gamma of all rows' estimates together, and the least budget of the other two.
    Prefill only: what a token sees depends on the last tokens.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch".
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        gamma: share of the weight to reach, > 0; 1 keeps every block.
        tau: a head whose estimate is nearer to the truth than this is query-aware; 0: none is.
        min_budget: tokens in the columns, and in the diagonals, at least.
        block_size: BS, tokens in a block; up to 2 BS or min_budget tokens attention is full.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1; read on the host.
        return_lse: return the log-sum-exp of each row as well.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32. Gradients flow through the
        attention, not through the choice.

    Raises:
        ValueError: shapes do not fit, or a size is < 1.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256, or block_size over 128.

    Cost: 2 B H T K (BS + T / BS^2) FLOPs in products for the choice (the kernels compute the first twice);
        B H n (2 K + 2 V) in products of the attention, n the pairs in chosen blocks.
    Source: Lai et al. 2025, arXiv:2502.20766. Differs: the released code stops one pair short of gamma in
        query-aware heads, and counts diagonals from the oldest, which matters where T is no multiple of BS.
    """
    mask = _choose(
        q, k, v, gamma=gamma, tau=tau, min_budget=min_budget, block_size=block_size,
        scale=scale, cu_seqlens=cu_seqlens, impl=impl,
    )  # fmt: skip
    return block_sparse_attention(
        q, k, v, block_mask=mask, block_size=block_size, scale=scale,
        cu_seqlens=cu_seqlens, return_lse=return_lse, impl=impl,
    )  # fmt: skip


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1024,
    block_size: int = 128,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Blocks that each block of queries sees, as a mask: sets differ in size.

    Masses are compared with 11 significant bits; of equal ones the lowest block goes first.

    Args: as `flexprefill`.

    Returns:
        A mask, [B, H, NQ, NK] of bool, NQ = NK = ceil(T / block_size); for packed sequences laid out as
        `block_sparse_attention` says.

    Raises:
        ValueError, TypeError, NotImplementedError: as `flexprefill`.

    Cost: 2 B H T K (BS + T / BS^2) FLOPs in products; some 50 B H (T / BS)^2 bytes.
    Source: Lai et al. 2025.
    """
    return _choose(
        q, k, None, gamma=gamma, tau=tau, min_budget=min_budget, block_size=block_size,
        scale=scale, cu_seqlens=cu_seqlens, impl=impl,
    )  # fmt: skip


def _choose(q, k, v, *, gamma, tau, min_budget, block_size, scale, cu_seqlens, impl):
    block_select.check(q, k, v, cu_seqlens, block_size=block_size, min_budget=min_budget)
    limit = f"block_size <= 128, got {block_size}" if block_size > 128 else None
    impl = common.choose_impl(impl, q, refusal=block_select.refusal(q) or limit)
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def choose(q, k):
        see = block_select.visible(q.shape[1], block_size, block_size, q.device)
        if q.shape[1] <= block_size * max(2, -(-min_budget // block_size)) or gamma >= 1 or not q.numel():
            return see.expand(q.shape[0], q.shape[2], *see.shape)
        return see & _patterns(q, k, gamma, tau, -(-min_budget // block_size), block_size, scale, impl)

    return block_select.per_sequence(choose, q.detach(), k.detach(), cu_seqlens)


def _patterns(q, k, gamma, tau, least, BS, scale, impl):
    """Columns and diagonals of blocks, and in query-aware heads pairs of blocks, [B, H, NB, NB]."""
    T, G, NB = q.shape[1], q.shape[2] // k.shape[2], -(-q.shape[1] // BS)
    sums = block_select.last_query_sums(q, k, last=BS, scale=scale, impl=impl)
    columns, diagonals = (x / BS for x in sums)
    a, b = (F.pad(x, (0, NB * BS - T)).unflatten(2, (NB, BS)).sum(-1) for x in (columns, diagonals))
    q_mean, k_mean = (block_select.block_means(x, BS, impl=impl)[0] for x in (q, k))
    k_mean = k_mean.repeat_interleave(G, 1)  # [B, H, NB, K]
    last = q[:, T - BS :].to(k_mean.dtype).mean(1)
    # [B, H, K] x [B, H, NB, K] -> [B, H, NB]
    estimate = (torch.einsum("bhk,bhjk->bhj", last, k_mean) * scale).softmax(-1)
    aware = _divergence(a, estimate) < tau**2  # [B, H]

    first = torch.arange(NB, device=q.device) == 0
    chosen = []
    for tokens, blocks in ((columns, a), (diagonals, b)):
        n = (block_select.fewest(tokens, gamma) // BS + 1).clamp(min=least).masked_fill(aware, least)
        # the first block of columns and the main diagonal in any case
        chosen.append(block_select.place(blocks.masked_fill(first, torch.inf)) < n[..., None])
    i = torch.arange(NB, device=q.device)
    slash = chosen[1][..., (i[:, None] - i).clamp(min=0)]

    # [B, H, NB, K] x [B, H, NB, K] -> [B, H, NB, NB]
    s = (q_mean @ k_mean.mT) * scale
    p = s.masked_fill(i > i[:, None], -torch.inf).softmax(-1).flatten(2)
    pairs = block_select.top_mass(p, gamma * NB).unflatten(2, (NB, NB))
    return chosen[0][:, :, None] | slash | (pairs & aware[..., None, None])


def _divergence(p, q):
    """Jensen-Shannon divergence of rows, in nats."""
    m = (p + q) / 2
    parts = ((x * torch.where(x > 0, x / m, 1).log()).sum(-1) for x in (p, q))
    return (sum(parts) / 2).clamp(min=0)
