"""XAttention: the public operator, and its choice of blocks."""

import torch

from effattn_lite.ops import common
from effattn_lite.ops.block_sparse_attention import block_sparse_attention
from effattn_lite.ops.engines import block_select


def xattention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int = 128,
    stride: int = 8,
    threshold: float = 0.9,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Block-sparse attention where blocks are chosen by sums along antidiagonals of the scores.

    .. math:: a_{ij} = \frac1S \sum_{s<S} S_{iS + S - 1 - s,\ jS + s}, \quad
        m_{IJ} = \sum_{i \in I,\, j \in J} \operatorname{softmax}_{j \le i}(a_i)_j

    An antidiagonal of a tile crosses all its rows and columns, so no column of large scores escapes it; of
    the diagonals an even stride sees those at odd distances t - j alone, since row plus column of a sampled
    score is -1 modulo S. Prefill only: what a block of queries sees depends on all tokens of the block.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch".
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        block_size: tokens in a block, a multiple of the stride.
        stride: S, side of the tiles whose antidiagonals are summed.
        threshold: share of the mass that the chosen blocks reach, > 0; 1 keeps every block.
        scale: of the scores; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1; read on the host.
        return_lse: return the log-sum-exp of each row as well.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32. Gradients flow through the
        attention, not through the choice.

    Raises:
        ValueError: shapes do not fit, or the block size is no multiple of the stride.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256, or block_size / stride no power of two.

    Cost: 2 B H T^2 K / S FLOPs for the choice (the kernel computes the sums twice, and keeps none of them);
        B H n (2 K + 2 V) in products of the attention, n the pairs in chosen blocks.
    Source: Xu et al. 2025, arXiv:2503.16428. As in the released code the first block and the query's own are
        always kept. Differs: a head's threshold is not searched.
    """
    mask = _choose(
        q, k, v, block_size=block_size, stride=stride, threshold=threshold,
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
    block_size: int = 128,
    stride: int = 8,
    threshold: float = 0.9,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Blocks that each block of queries sees, as a mask: sets differ in size.

    Masses are compared with 11 significant bits; of equal ones the lowest block goes first.

    Args: as `xattention`.

    Returns:
        A mask, [B, H, NQ, NK] of bool, NQ = NK = ceil(T / block_size); for packed sequences laid out as
        `block_sparse_attention` says.

    Raises:
        ValueError, TypeError, NotImplementedError: as `xattention`.

    Cost: 2 B H T^2 K / S FLOPs; 4 B H (T / block_size)^2 bytes.
    Source: Xu et al. 2025.
    """
    return _choose(
        q, k, None, block_size=block_size, stride=stride, threshold=threshold,
        scale=scale, cu_seqlens=cu_seqlens, impl=impl,
    )  # fmt: skip


def _choose(q, k, v, *, block_size, stride, threshold, scale, cu_seqlens, impl):
    block_select.check(q, k, v, cu_seqlens, block_size=block_size, stride=stride)
    if block_size % stride:
        raise ValueError(f"block_size is {block_size}, expected a multiple of stride = {stride}")
    n = block_size // stride
    refusal = f"block_size / stride a power of two up to 64, got {n}" if n & (n - 1) or n > 64 else None
    impl = common.choose_impl(impl, q, refusal=block_select.refusal(q) or refusal)
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def choose(q, k):
        see = block_select.visible(q.shape[1], block_size, block_size, q.device)
        if threshold >= 1:
            return see.expand(q.shape[0], q.shape[2], *see.shape)
        mass = block_select.antidiagonal_mass(
            q, k, block_size=block_size, stride=stride, scale=scale, impl=impl
        )
        always = torch.eye(len(see), dtype=torch.bool, device=q.device)
        always[:, :1] = True
        need = threshold * mass.sum(-1, keepdim=True)
        return block_select.top_mass(mass, need, always.expand_as(mass)) & see

    return block_select.per_sequence(choose, q.detach(), k.detach(), cu_seqlens)
