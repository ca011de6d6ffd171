"""InfLLM-V2: the public operator, and its selection of blocks."""

import torch
import torch.nn.functional as F

from effattn_lite.ops import common
from effattn_lite.ops.engines import token_sparse

QUERY_TILE = 64
"""Queries whose weights of spans are held at a time."""


def infllm_v2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int = 64,
    top_k: int = 64,
    init_blocks: int = 1,
    local_blocks: int = 32,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Dense attention's own keys, averaged over short spans, say which blocks a group of heads reads.

    .. math:: \mathcal S(t) = \{j \le t : \lfloor j / B_S \rfloor \in \mathcal I(t)\}, \qquad
        o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    with I(t) as in `select`. There is nothing to learn beside q, k and v, so a model may use dense attention
    on short texts (MiniCPM4 does up to 8,192 tokens) and this on long ones. Gradients flow through the
    attention, none through the selection.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch". The queries are the
            last T of Tk tokens, as decoding needs it.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV, of any ratio; 16 and more fill the kernels' tiles.
        v: values, [B, Tk, HKV, V].
        block_size: B_S, tokens in a block, a multiple of kernel_stride.
        top_k: blocks of a query beside its local ones, the first init_blocks among them.
        init_blocks: first blocks that are always read, at most top_k.
        local_blocks: last blocks that are always read, the own among them, >= 1.
        kernel_size: l, tokens in a span, a multiple of kernel_stride.
        kernel_stride: d, tokens from the beginning of a span to that of the next.
        return_lse: return the log-sum-exp of each row as well; gradients flow through it.
        scale: s, of the spans' weights too; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk; spans and blocks count from
            each start; read on the host.
        impl: "torch", "triton" or "auto"; the selection is torch in all of them.

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; cu_seqlens does not rise from 0 to T.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: B H T n (2 K + 2 V) FLOPs in products, n <= (top_k + local_blocks) B_S keys a query, and that of
        `select`; the gradient 2.5 times the first. The kernels keep a byte a token, key head and block, and 4
        more for the gradient.
    Source: Zhao et al. 2025, arXiv:2509.24663; MiniCPM4, arXiv:2506.07900. Differs: the released kernels
        estimate the softmax's denominator over the spans from spans four times as long; here it is exact.
    """
    options = dict(
        block_size=block_size,
        top_k=top_k,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        scale=scale,
    )
    blocks = select(q, k, **options, cu_seqlens=cu_seqlens)
    sizes = dict(zip(("B", "Tk", "HKV"), k.shape[:3], strict=True))
    common.check_shape("v", v, "B Tk HKV V", sizes, like="k")
    common.check_alike("v", v, q)
    o, lse = token_sparse.attend(
        q, k, v, block_indices=blocks, block_size=block_size, scale=scale, cu_seqlens=cu_seqlens, impl=impl
    )
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int = 64,
    top_k: int = 64,
    init_blocks: int = 1,
    local_blocks: int = 32,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Blocks that the query heads of a key head read: the first, the last, and those the spans point at.

    .. math:: r_t(i) = \sum_{h \in \mathrm{group}} \operatorname{softmax}_i(s\, q_{t,h}^\top \bar k_i), \qquad
        b_t(j) = \max_{i \text{ overlaps } j} r_t(i)

    over spans i that have ended at t; of blocks j the init_blocks first and the local_blocks last come before
    all others.

    Args:
        q, k, block_size, top_k, init_blocks, local_blocks, kernel_size, kernel_stride, scale, cu_seqlens: as
            in `infllm_v2`.

    Returns:
        Block numbers, [B, T, HKV, n], n <= top_k + local_blocks, int32, in any order; -1 where there are no
        more. A tie in float32 goes to the lower block: the sort is stable.

    Raises:
        ValueError, TypeError: as `infllm_v2`.

    Cost: B H T NC (2 K + 6) FLOPs, NC = Tk / d spans, in float64; no more than 64 queries' weights are in
        memory.
    Source: Zhao et al. 2025, arXiv:2509.24663.
    """
    options = block_size, top_k, init_blocks, local_blocks, kernel_size, kernel_stride
    _check(q, k, cu_seqlens, *options)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    # autocast would round the weights to 8 bits
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            return _select(q, k, scale, *options)
        edges = cu_seqlens.tolist()
        parts = [
            _select(q[:, a:b], k[:, a:b], scale, *options) for a, b in zip(edges, edges[1:], strict=False)
        ]
        n = max(part.shape[3] for part in parts)
        return torch.cat([F.pad(part, (0, n - part.shape[3]), value=-1) for part in parts], dim=1)


def _check(q, k, cu_seqlens, block_size, top_k, init_blocks, local_blocks, kernel_size, kernel_stride):
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B Tk HKV K", sizes)
    common.check_heads(sizes["H"], sizes["HKV"])
    common.check_alike("k", k, q)
    token_sparse.check_tokens(q, k, cu_seqlens)
    for name, n in (("kernel_stride", kernel_stride), ("local_blocks", local_blocks)):
        if n < 1:
            raise ValueError(f"{name} is {n}, expected >= 1")
    if not 0 <= init_blocks <= top_k:
        raise ValueError(f"init_blocks is {init_blocks}, expected 0 to top_k = {top_k}")
    for name, n in (("block_size", block_size), ("kernel_size", kernel_size)):
        if n < 1 or n % kernel_stride:
            raise ValueError(f"{name} is {n}, expected a multiple of kernel_stride = {kernel_stride}")


def _select(q, k, scale, block_size, top_k, init_blocks, local_blocks, size, stride):
    """Blocks of one text, [B, T, HKV, min(top_k + local_blocks, NK)]."""
    (B, T), (Tk, HKV) = q.shape[:2], k.shape[1:3]
    NK, means = -(-Tk // block_size), _means(k, size, stride)
    n, last = min(top_k + local_blocks, NK), torch.arange(means.shape[1], device=q.device) * stride + size - 1
    j, position = torch.arange(NK, device=q.device), torch.arange(Tk - T, Tk, device=q.device)
    chosen = [torch.zeros((B, 0, HKV, n), dtype=torch.int32, device=q.device)]
    for tokens in (slice(a, a + QUERY_TILE) for a in range(0, T, QUERY_TILE)):
        t = position[tokens, None, None]
        # [B, tile, HKV, G, K] x [B, NC, HKV, K] -> [B, tile, HKV, G, NC]
        s = torch.einsum("bthgk,bihk->bthgi", q[:, tokens].double().unflatten(2, (HKV, -1)), means) * scale
        # a row that sees nothing is 0 / 0, and points nowhere
        r = s.masked_fill(last > t[..., None], -torch.inf).softmax(-1).nan_to_num(nan=0.0).sum(3)
        score, own = _block_scores(r, NK, block_size // stride, size // stride), t // block_size
        score = score.float().masked_fill((j < init_blocks) | (j > own - local_blocks), torch.inf)
        best = score.masked_fill(j > own, -torch.inf).sort(dim=-1, descending=True, stable=True)[1][..., :n]
        chosen.append(torch.where(best <= own, best, -1).to(torch.int32))
    return torch.cat(chosen, dim=1)


def _means(k, size, stride):
    """Means of whole spans, [B, NC, HKV, K], float64."""
    if k.shape[1] < size:
        return k.new_zeros((k.shape[0], 0, *k.shape[2:]), dtype=torch.float64)
    # contiguous, so that a sum does not depend on strides
    return k.contiguous().unfold(1, size, stride).mean(-1, dtype=torch.float64)


def _block_scores(r, NK, a, c):
    """Largest weight of the spans a j - c + 1 to a j + a - 1 that overlap block j, [..., NK]."""
    r = F.pad(r, (c - 1, max(0, a * NK + a - r.shape[-1])))
    score = r[..., : a * NK : a]
    for m in range(1, a + c - 1):
        score = torch.maximum(score, r[..., m : m + a * NK : a])
    return score
