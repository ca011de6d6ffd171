"""Block-sparse attention: the public operator under every method that selects blocks of keys."""

from functools import partial

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines import block_sparse, token_sparse


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_indices: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    block_size: int = 64,
    query_block_size: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""One softmax over the blocks of keys that were chosen for a block of queries, and over no others.

    .. math:: \mathcal S(t) = \{j : \lfloor j/B_S \rfloor \in \mathcal I(\lfloor t/B_Q \rfloor),\ j \le t\},
        \qquad o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    Exactly one of `block_indices` and `block_mask` gives the sets; with HKV sets, query heads that share
    a key head share its set. NQ = ceil(T / query_block_size), NK = ceil(T / block_size).

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch".
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        block_indices: block numbers, [B, NQ, HKV or H, n], int32 or int64; -1 is none, the order is free, a
            number that comes twice counts once, and a block that holds no token adds nothing.
        block_mask: chosen or not, [B, HKV or H, NQ, NK], bool.
        block_size: B_S, keys in a block, >= 1.
        query_block_size: B_Q, queries that share a set; default block_size; 1: every token has its own.
        causal: see no later token, inside a block too.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1. Blocks are counted inside each sequence.
            The rows of the sets stand one sequence after another, ceil(length / query_block_size) each, and
            further rows are ignored; so T // query_block_size + N rows are always enough. NK is the largest
            number of blocks of a sequence, or more.
        return_lse: return the log-sum-exp of each row as well; gradients flow through it.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).
        A query that sees nothing has o = 0 and lse = -inf.

    Raises:
        ValueError: shapes, devices or ranges do not fit, or not exactly one of the sets is given.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: B H n (2 K + 2 V) FLOPs in products, n the pairs in chosen blocks; the gradient 2.5 times that.
        Beyond inputs and outputs the kernels keep lists of chosen blocks, at most 5 bytes a pair of blocks.
    Source: Guo et al. 2024, Block Sparse Attention, https://github.com/mit-han-lab/Block-Sparse-Attention.
        Differs: blocks of any size, sets from indices too, lse is an output, and differentiable.
    """
    QS = block_size if query_block_size is None else query_block_size
    _check(q, k, v, block_indices, block_mask, block_size, QS, cu_seqlens)
    # a token with a set of its own has no block of queries to share a tile with
    attend = token_sparse.attend if QS == 1 else partial(block_sparse.attend, query_block_size=QS)
    o, lse = attend(
        q,
        k,
        v,
        block_indices=block_indices,
        block_mask=block_mask,
        block_size=block_size,
        causal=causal,
        scale=scale,
        cu_seqlens=cu_seqlens,
        impl=impl,
    )
    return (o, lse) if return_lse else o


def _check(q, k, v, block_indices, block_mask, BS, QS, cu_seqlens):
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B T HKV K", sizes)
    common.check_shape("v", v, "B T HKV V", sizes, like="k")
    common.check_heads(sizes["H"], sizes["HKV"])
    for name, x in (("k", k), ("v", v)):
        common.check_alike(name, x, q)
    for name, size in (("block_size", BS), ("query_block_size", QS)):
        if size < 1:
            raise ValueError(f"{name} is {size}, expected >= 1")
    if cu_seqlens is not None:
        common.check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
        common.check_alike("cu_seqlens", cu_seqlens, q, dtype=False)
    if (block_indices is None) == (block_mask is None):
        given = "neither" if block_mask is None else "both"
        raise ValueError(f"expected exactly one of block_indices and block_mask, got {given}")
    if block_mask is None:
        _check_sets("block_indices", block_indices, "B NQ HS n", (torch.int32, torch.int64), q, sizes)
    else:
        _check_sets("block_mask", block_mask, "B HS NQ NK", (torch.bool,), q, sizes)
    _check_counts(sizes, BS, QS, cu_seqlens)


def _check_sets(name, sets, axes, dtypes, q, sizes):
    common.check_shape(name, sets, axes, sizes)
    common.check_alike(name, sets, q, dtype=False)
    if sets.dtype not in dtypes:
        raise TypeError(f"{name} is {sets.dtype}, expected {' or '.join(map(str, dtypes))}")
    if sizes["HS"] not in (sizes["HKV"], sizes["H"]):
        raise ValueError(f"{name} has {sizes['HS']} heads, expected k's {sizes['HKV']} or q's {sizes['H']}")


def _check_counts(sizes, BS, QS, cu_seqlens):
    """Rows and columns of the sets: ceil(T / block) of them, or as many as the packed sequences need."""
    T = sizes["T"]
    for axis, size, name in (("NQ", QS, "query_block_size"), ("NK", BS, "block_size")):
        found, needed = sizes.get(axis), -(-T // size)
        if found is None:
            continue
        if cu_seqlens is None:
            if found != needed:
                raise ValueError(
                    f"the sets have {axis} = {found}, expected ceil(T / {name}) = {needed} for T = {T}"
                )
        elif not (cu_seqlens.is_cuda or torch.compiler.is_compiling()):
            counts = -(-cu_seqlens.diff() // size)
            needed = int(counts.sum() if axis == "NQ" else counts.max())
            if found < needed:
                raise ValueError(
                    f"the sets have {axis} = {found}, expected at least {needed} for these sequences"
                )
