"""MoBA: the public operator, and its selection of blocks."""

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines import token_sparse

QUERY_TILE = 1024
"""Queries whose scores of blocks are held at a time."""


def moba(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Every query attends to its own block, and to the past blocks whose mean key answers it best.

    .. math:: \mathcal S(t) = \{j \le t : \lfloor j / B_S \rfloor \in \mathcal I(t)\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    with I(t) as in `select`. Gradients flow through the attention, none through the selection.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch". The queries are the
            last T of Tk tokens, as decoding needs it.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV.
        v: values, [B, Tk, HKV, V].
        block_size: BS, tokens in a block, >= 1.
        top_k: blocks of a query, >= 1, its own among them.
        return_lse: return the log-sum-exp of each row as well; gradients flow through it.
        scale: s; default K ** -0.5. The selection needs none.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk; blocks count from each start.
        impl: "torch", "triton" or "auto"; the selection is torch in all of them.

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; cu_seqlens does not rise from 0 to T.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: B H T n (2 K + 2 V) FLOPs in products, n <= top_k BS keys a query, and 2 K a query and block for the
        selection; the gradient 2.5 times the first. The kernels keep a byte a query, head and block, and 4
        more for the gradient; neighbours share a tile, so that dq and o take the blocks of all of them.
    Source: Lu et al. 2025, arXiv:2502.13189.
    """
    sizes = _check(q, k, block_size, top_k, cu_seqlens)
    common.check_shape("v", v, "B Tk HKV V", sizes, like="k")
    common.check_alike("v", v, q)
    blocks = _select(q, k, block_size, top_k, cu_seqlens)
    o, lse = token_sparse.attend(
        q, k, v, block_indices=blocks, block_size=block_size, scale=scale, cu_seqlens=cu_seqlens, impl=impl
    )
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor, k: torch.Tensor, *, block_size: int, top_k: int, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Blocks of each query: its own, and the past ones whose mean key has the largest product with it.

    .. math:: g_t(i) = q_t^\top \operatorname{mean}_{j \in i} k_j, \quad i < \lfloor t / B_S \rfloor, \qquad
        \mathcal I(t) = \{\lfloor t / B_S \rfloor\} \cup \operatorname{top}_{k-1}\, g_t

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K].
        block_size: BS, tokens in a block.
        top_k: blocks of a query, its own among them. A tie in float32 goes to the lower block: the sort is
            stable.
        cu_seqlens: edges of packed sequences, [N + 1]; blocks count from each start.

    Returns:
        Block numbers, [B, T, H, min(top_k, ceil(Tk / BS))], int32: the own one, then the best first; -1 where
        the past has no more.

    Raises:
        ValueError, TypeError: as `moba`.

    Cost: B Tk HKV K FLOPs for the means, 2 K a query and block for the products, in float32; no more than
        1,024 queries' products are in memory.
    Source: Lu et al. 2025, arXiv:2502.13189.
    """
    _check(q, k, block_size, top_k, cu_seqlens)
    return _select(q, k, block_size, top_k, cu_seqlens)


def _check(q, k, block_size, top_k, cu_seqlens):
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B Tk HKV K", sizes)
    common.check_heads(sizes["H"], sizes["HKV"])
    common.check_alike("k", k, q)
    token_sparse.check_tokens(q, k, cu_seqlens)
    for name, n in (("block_size", block_size), ("top_k", top_k)):
        if n < 1:
            raise ValueError(f"{name} is {n}, expected >= 1")
    return sizes


@torch.no_grad()
def _select(q, k, block_size, top_k, cu_seqlens):
    T, Tk, HKV, wide = q.shape[1], k.shape[1], k.shape[2], torch.promote_types(q.dtype, torch.float32)
    t = torch.arange(Tk - T, Tk, device=q.device)
    if cu_seqlens is None:
        NB = Tk // block_size
        mean = k[:, : NB * block_size].unflatten(1, (NB, block_size)).to(wide).mean(2)  # [B, NB, HKV, K]
        first, own = torch.zeros_like(t), t // block_size
    else:
        start, first, own = token_sparse.packed_blocks(cu_seqlens, T, block_size)
        # what lies behind a block's sequence does not matter: a cut block is nobody's past
        j = (start[:, None] + torch.arange(block_size, device=q.device)).clamp(max=max(T - 1, 0))
        mean = k[:, j].to(wide).mean(2)
    past, i = min(top_k, -(-Tk // block_size)) - 1, torch.arange(mean.shape[1], device=q.device)
    none = (q.shape[0], 0, q.shape[2], max(past + 1, 0))
    chosen = [torch.zeros(none, dtype=torch.int32, device=q.device)]
    for tokens in (slice(a, a + QUERY_TILE) for a in range(0, T, QUERY_TILE)):
        # [B, tokens, HKV, G, K] x [B, NB, HKV, K] -> [B, tokens, HKV, G, NB]
        gate = torch.einsum("bthgk,bihk->bthgi", q[:, tokens].to(wide).unflatten(2, (HKV, -1)), mean)
        f, o = (x[tokens, None, None, None] for x in (first, own))
        gate = gate.masked_fill((i < f) | (i >= f + o), -torch.inf)
        # compared in float32, so that rounding of float64 breaks no tie
        best = gate.float().sort(dim=-1, descending=True, stable=True)[1][..., :past]
        best = torch.where((best >= f) & (best < f + o), best - f, -1)
        best = torch.cat((o.expand(*gate.shape[:-1], 1), best), dim=-1)
        chosen.append(best.flatten(2, 3).to(torch.int32))
    return torch.cat(chosen, dim=1)
