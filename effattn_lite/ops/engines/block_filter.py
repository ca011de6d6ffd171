r"""Softmax attention over chosen blocks that leaves a product with the values out where it adds nothing.

A block's weights are at most exp(m_loc - m) of the largest weight so far, in every row. Where that is at most
exp(skip) in all rows of a warp, a quarter of a block of queries, the warp does not multiply them with the
values; the softmax's denominator counts them all the same. In eager torch, or by kernels/block_filter.py.
"""

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines.block_sparse import Blocks

MAX_HEAD = 256
QUERY_TILE = 128
"""Queries whose scores the torch implementation holds at a time, if a block has no more."""


def attend(
    q, k, v, mask, *, block_size: int, query_block_size: int, skip: float, scale=None, cu_seqlens=None, impl
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose an implementation and return (o, lse); arguments are checked by the public op.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K].
        v: values, [B, T, HKV, V].
        mask: chosen blocks, [B, H, NQ, NK] of bool; rows of packed sequences end to end.
        block_size, query_block_size: keys, and queries, in a block.
        skip: largest m_loc - m, in nats, at which a product is left out.
        scale: of the scores; default K ** -0.5.
        cu_seqlens: edges of packed sequences, read on the host.
        impl: "torch", "triton" or "auto".

    Raises:
        NotImplementedError: impl="triton" with sizes that the kernel does not take; any gradient.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:  # a maximum of scores is the scaled maximum of products only if the scale is >= 0
        q, scale = -q, -scale
    impl = common.choose_impl(impl, q, refusal=_refusal(q, v, block_size, query_block_size))
    options = block_size, query_block_size, skip, scale, impl
    if cu_seqlens is None:
        return torch.ops.effattn_lite.block_filter(q, k, v, mask, *options)
    parts, row, edges = [], 0, cu_seqlens.tolist()
    for a, b in zip(edges, edges[1:], strict=False):
        rows = slice(row, row - (a - b) // query_block_size)
        row, NK = rows.stop, -(-(b - a) // block_size)
        parts.append(
            torch.ops.effattn_lite.block_filter(
                q[:, a:b], k[:, a:b], v[:, a:b], mask[:, :, rows, :NK].contiguous(), *options
            )
        )
    o, lse = zip(*parts, strict=True)
    return torch.cat(o, 1), torch.cat(lse, 1)


def _refusal(q, v, BS, QS):
    width = max(q.shape[3], v.shape[3])
    if width > MAX_HEAD:
        return f"K <= {MAX_HEAD} and V <= {MAX_HEAD}, got {q.shape[3]} and {v.shape[3]}"
    if QS & (QS - 1) or not 4 <= QS <= 256:
        return f"query_block_size a power of two from 4 to 256, got {QS}"
    old = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8
    if old and q.dtype == torch.bfloat16:
        return "a GPU of compute capability 8.0 or later for bfloat16"
    # a tile holds a whole block, its sides rounded up to powers of two
    size = q.element_size() << (BS - 1).bit_length() + (width - 1).bit_length()
    most = 2**14 if old else 2**15
    if BS > 128 or size > most:
        return f"block_size <= 128 and {most} bytes of a block's keys at most, got {BS} and {size}"
    return None


def _forward(q, k, v, mask, block_size, query_block_size, skip, scale, impl):
    if impl == "triton":
        from effattn_lite.kernels import block_filter as kernels

        return kernels.forward(q, k, v, mask, Blocks(block_size, query_block_size, True, scale), skip)
    o, lse = _empty_outputs(q, v)
    QS, BS, HKV, wide = query_block_size, block_size, k.shape[2], lse.dtype
    T, tile = q.shape[1], -(-QUERY_TILE // QS) * QS
    q, k, v = q.unflatten(2, (HKV, q.shape[2] // HKV)).to(wide), k.to(wide), v.to(wide)
    j = torch.arange(T, device=q.device)
    for a in range(0, T, tile):
        t = j[a : a + tile]
        end = a + len(t)
        see = mask[:, :, t // QS][..., j[:end] // BS] & (j[:end] <= t[:, None])
        # [B, tokens, HKV, G, K] x [B, keys, HKV, K] -> [B, H, tokens, keys]
        s = (torch.einsum("bthgk,bjhk->bhgtj", q[:, t], k[:, :end]) * scale).flatten(1, 2)
        s = s.masked_fill(~see, -torch.inf)
        total = torch.logsumexp(s, -1, keepdim=True)
        p = (s - total.nan_to_num(neginf=0.0)).exp()  # a row that sees nothing: exp(-inf - 0) = 0
        p = p.masked_fill(~_kept(s, QS, BS, skip)[..., j[:end] // BS], 0.0).unflatten(1, (HKV, -1))
        # [B, HKV, G, tokens, keys] x [B, keys, HKV, V] -> [B, tokens, HKV, G, V]
        o[:, t] = torch.einsum("bhgtj,bjhv->bthgv", p, v[:, :end]).flatten(2, 3).to(o.dtype)
        lse[:, t] = total.squeeze(-1).transpose(1, 2)
    return o, lse


def _kept(s, QS, BS, skip):
    """Which products with a block's values are formed, [B, H, tokens, blocks]; tokens of whole blocks."""
    rows, (n, keys) = max(QS // 4, 1), s.shape[2:]
    local = torch.nn.functional.pad(s, (0, -keys % BS), value=-torch.inf).unflatten(3, (-1, BS)).amax(-1)
    gap = local - local.cummax(3).values.clamp(min=-1e30)
    # number of each token's warp; a block of queries has its own
    t = torch.arange(n, device=s.device)
    warp = t // QS * -(-QS // rows) + t % QS // rows
    top = gap.new_full((*gap.shape[:2], n // QS * -(-QS // rows) + -(-QS // rows), gap.shape[3]), -torch.inf)
    index = warp[:, None].expand(gap.shape)
    return top.scatter_reduce(2, index, gap, "amax")[:, :, warp] > skip


def _empty_outputs(q, v):
    """o [B, T, H, V], and lse [B, T, H] with the tokens of a head side by side in memory."""
    (B, T, H, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    return o, torch.empty((B, H, T), dtype=wide, device=q.device).transpose(1, 2)


def _fake(q, k, v, *_):
    return _empty_outputs(q, v)


def _gradient(ctx, *_):
    raise NotImplementedError("attention with a filter in its softmax has no gradient; use skip=-inf")


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor mask, int block_size, int query_block_size, float skip, "
    "float scale, str impl) -> (Tensor, Tensor)"
)
common.register("block_filter", _SCHEMA, _forward, _fake)
torch.library.register_autograd("effattn_lite::block_filter", _gradient)
