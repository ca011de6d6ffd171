"""SpargeAttn: the public operator, and the choice of blocks of its first filter."""

import math

import torch

from effattn_lite.ops import common
from effattn_lite.ops.block_sparse_attention import block_sparse_attention
from effattn_lite.ops.engines import block_filter, block_select


def spargeattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    query_block_size: int = 128,
    block_size: int = 64,
    similarity: float = 0.6,
    threshold: float = 0.98,
    skip: float = -50.0,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Block-sparse attention with two filters: one on means of blocks, one inside the running softmax.

    .. math:: \hat P = \operatorname{softmax}(s\,\bar q\,\bar k^\top), \quad
        O \leftarrow O + P_{IJ} V_J \ \text{ only if } \max_{t \in I}(m^J_t - m_t) > \lambda

    A block of keys is judged by its mean if the mean cosine of its tokens is above the similarity, and seen
    otherwise; a block of queries sees all if its own is not. m_t is the running maximum of row t's scores up
    to block J, m^J_t that of the block; I is a quarter of a block of queries, the rows of one warp.
    Prefill only: what a token sees depends on the other tokens of its block, and on the mean key.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch".
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        query_block_size: B_Q, queries that share a choice.
        block_size: B_K, keys in a block.
        similarity: theta, mean cosine above which a block is judged by its mean.
        threshold: tau, share of the estimated mass within which blocks are taken; 1 keeps every block.
        skip: lambda < 0, in nats; -inf skips nothing.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1; read on the host.
        return_lse: return the log-sum-exp of each row as well.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32: of all chosen pairs, those
        whose product was left out included. A row whose chosen blocks all lie ahead of it has o = 0 and
        lse = -inf. Gradients flow through the attention, not through the choice, and only with skip = -inf.

    Raises:
        ValueError: shapes do not fit, a size is < 1, or skip >= 0.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: a gradient with a finite skip; impl="triton" with K or V over 256, or, with a
            finite skip, a block of keys over 128 tokens or 32 KiB (16 KiB before compute capability 8.0), or
            query_block_size no power of two from 4 to 256.

    Cost: B T K (5 H + 9 HKV) + 2 B H T^2 K / (B_Q B_K) FLOPs for the choice; B H (2 K n + 2 V m) in products
        of the attention, n the pairs in chosen blocks, m those that the second filter leaves.
    Source: Zhang et al. 2025, arXiv:2502.18137; likeness, centred keys and defaults as in the released code.
        Differs: nothing is quantised, and thresholds are not searched.
    """
    if not skip < 0:
        raise ValueError(f"skip is {skip}, expected < 0")
    mask = _choose(
        q, k, v, query_block_size=query_block_size, block_size=block_size, similarity=similarity,
        threshold=threshold, scale=scale, cu_seqlens=cu_seqlens, impl=impl,
    )  # fmt: skip
    sizes = dict(block_size=block_size, query_block_size=query_block_size, scale=scale, impl=impl)
    if skip == -math.inf:
        return block_sparse_attention(
            q, k, v, block_mask=mask, cu_seqlens=cu_seqlens, return_lse=return_lse, **sizes
        )
    o, lse = block_filter.attend(q, k, v, mask, skip=skip, cu_seqlens=cu_seqlens, **sizes)
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    query_block_size: int = 128,
    block_size: int = 64,
    similarity: float = 0.6,
    threshold: float = 0.98,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Blocks that the first filter lets each block of queries see, as a mask: sets differ in size.

    Masses are compared with 11 significant bits; of equal ones the lowest block goes first.

    Args: as `spargeattn`.

    Returns:
        A mask, [B, H, NQ, NK] of bool, NQ = ceil(T / query_block_size), NK = ceil(T / block_size); for packed
        sequences laid out as `block_sparse_attention` says.

    Raises:
        ValueError, TypeError, NotImplementedError: as `spargeattn`.

    Cost: B T K (5 H + 9 HKV) + 2 B H T^2 K / (B_Q B_K) FLOPs.
    Source: Zhang et al. 2025.
    """
    return _choose(
        q, k, None, query_block_size=query_block_size, block_size=block_size, similarity=similarity,
        threshold=threshold, scale=scale, cu_seqlens=cu_seqlens, impl=impl,
    )  # fmt: skip


def _choose(
    q, k, v, *, query_block_size, block_size, similarity, threshold, scale, cu_seqlens, impl
):  # fmt: skip
    QS, BS = query_block_size, block_size
    block_select.check(q, k, v, cu_seqlens, query_block_size=QS, block_size=BS)
    impl = common.choose_impl(impl, q, refusal=block_select.refusal(q))
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def choose(q, k):
        see = block_select.visible(q.shape[1], QS, BS, q.device)
        if threshold >= 1 or not q.numel():
            return see.expand(q.shape[0], q.shape[2], *see.shape)
        # the mean key moves all scores of a row alike, but would make all keys look alike
        centre = k.to(torch.promote_types(k.dtype, torch.float32)).mean(1)
        q_mean, q_like = block_select.block_means(q, QS, impl=impl)
        k_mean, k_like = (
            x.repeat_interleave(q.shape[2] // k.shape[2], 1)
            for x in block_select.block_means(k, BS, centre=centre, impl=impl)
        )
        judged = (k_like > similarity)[:, :, None]  # [B, H, 1, NK]
        # [B, H, NQ, K] x [B, H, NK, K] -> [B, H, NQ, NK]
        s = ((q_mean @ k_mean.mT) * scale).masked_fill(~(see & judged), -torch.inf)
        # no block can be judged: no estimate
        p = s.softmax(-1).nan_to_num(nan=0.0)
        chosen = block_select.top_cdf(p, threshold) | ~judged | ~(q_like > similarity)[..., None]
        return chosen & see

    return block_select.per_sequence(choose, q.detach(), k.detach(), cu_seqlens)
