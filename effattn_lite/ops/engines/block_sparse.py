r"""Softmax attention over chosen blocks of keys: every block of queries brings its own set of them.

One operator and its gradient, each computed in eager torch, some queries at a time, or by the Triton kernels
of kernels/block_sparse.py.

A set is a row of block numbers, in any order, -1 for none, or a row of a mask. With packed sequences the rows
of all sequences stand one after another, and blocks are counted inside each sequence.
"""

from typing import NamedTuple

import torch

from effattn_lite.ops import common

MAX_HEAD = 256
QUERY_TILE = 128
"""Queries whose scores the torch implementation holds at a time."""


class Blocks(NamedTuple):
    """Sizes of the blocks, the mask inside them and the scale; the operators' plain arguments."""

    block_size: int
    query_block_size: int
    causal: bool
    scale: float


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_indices: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    block_size: int,
    query_block_size: int,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose an implementation and return (o, lse); arguments as in the public op, which checks them."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:  # a maximum of scores is the scaled maximum of products only if the scale is >= 0
        q, scale = -q, -scale
    impl = common.choose_impl(impl, q, refusal=_refusal(q, v))
    blocks = Blocks(block_size, query_block_size, causal, scale)
    return torch.ops.effattn_lite.block_sparse(q, k, v, block_indices, block_mask, cu_seqlens, *blocks, impl)


def _refusal(q, v):
    width = max(q.shape[3], v.shape[3])
    if width > MAX_HEAD:
        return f"K <= {MAX_HEAD} and V <= {MAX_HEAD}, got {q.shape[3]} and {v.shape[3]}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        if q.dtype == torch.bfloat16:
            return "a GPU of compute capability 8.0 or later for bfloat16"
        if q.dtype == torch.float32 and width > 128:
            return "K <= 128 and V <= 128 for float32 on a GPU older than compute capability 8.0"
    return None


def _forward(
    q, k, v, block_indices, block_mask, cu_seqlens, block_size, query_block_size, causal, scale, impl
):
    blocks = Blocks(block_size, query_block_size, causal, scale)
    if impl == "triton":
        from effattn_lite.kernels import block_sparse as kernels

        return kernels.forward(q, k, v, block_indices, block_mask, cu_seqlens, blocks)
    o, lse = _empty_outputs(q, v)
    for part, sets in _sequences(block_indices, block_mask, cu_seqlens, blocks):
        _forward_torch(q[:, part], k[:, part], v[:, part], sets, blocks, o[:, part], lse[:, part])
    return o, lse


def _backward(
    do, dlse, q, k, v, o, lse, block_indices, block_mask, cu_seqlens,
    block_size, query_block_size, causal, scale, impl,
):  # fmt: skip
    blocks = Blocks(block_size, query_block_size, causal, scale)
    if impl == "triton":
        from effattn_lite.kernels import block_sparse as kernels

        return kernels.backward(do, dlse, q, k, v, o, lse, block_indices, block_mask, cu_seqlens, blocks)
    wide = lse.dtype
    delta = (do.to(wide) * o.to(wide)).sum(-1)  # [B, T, H]
    delta = delta if dlse is None else delta - dlse
    grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    for p, sets in _sequences(block_indices, block_mask, cu_seqlens, blocks):
        mine = [g[:, p] for g in grads]
        _backward_torch(do[:, p], delta[:, p], q[:, p], k[:, p], v[:, p], lse[:, p], sets, blocks, mine)
    return tuple(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))


def _sequences(block_indices, block_mask, cu_seqlens, blocks):
    """Each packed sequence, or all that there is: its tokens, and its rows of (block_indices, block_mask)."""
    if cu_seqlens is None:
        yield slice(None), (block_indices, block_mask)
        return
    edges, row = cu_seqlens.tolist(), 0
    for a, b in zip(edges, edges[1:], strict=False):
        rows = slice(row, row - (a - b) // blocks.query_block_size)
        row = rows.stop
        yield (
            slice(a, b),
            (
                None if block_indices is None else block_indices[:, rows],
                None if block_mask is None else block_mask[:, :, rows],
            ),
        )


def chosen(block_indices, block_mask, rows: slice, NK: int) -> torch.Tensor:
    """Some rows of the sets as a mask, [B, HS, rows, NK]; a block with no token in it is left out."""
    if block_mask is not None:
        return block_mask[:, :, rows, :NK]
    index = block_indices[:, rows].transpose(1, 2).long()  # [B, HS, rows, n]
    index = torch.where((index >= 0) & (index < NK), index, NK)
    mask = torch.zeros((*index.shape[:3], NK + 1), dtype=torch.bool, device=index.device)
    return mask.scatter_(3, index, True)[..., :NK]


def _tiles(T, HKV, sets, blocks, device):
    """Some queries at a time, the keys, and who sees whom: [B, HKV, 1 or G, tokens, keys] of bool."""
    BS, QS, causal, _ = blocks
    for i in range(0, T, QUERY_TILE):
        tokens = slice(i, min(i + QUERY_TILE, T))
        end = tokens.stop if causal else T
        t = torch.arange(tokens.start, tokens.stop, device=device)
        j = torch.arange(end, device=device)
        first = i // QS
        mask = chosen(*sets, slice(first, (tokens.stop - 1) // QS + 1), -(-end // BS))
        see = mask[:, :, t // QS - first][..., j // BS]  # [B, HS, tokens, keys]
        yield tokens, slice(0, end), (see & (j <= t[:, None]) if causal else see).unflatten(1, (HKV, -1))


def _scores(q, k, see, scale):
    """Scores of query heads (key head, group), [B, HKV, G, tokens, keys]; unseen ones -inf."""
    # [B, tokens, HKV, G, K] x [B, keys, HKV, K] -> [B, HKV, G, tokens, keys]
    return (torch.einsum("bthgk,bjhk->bhgtj", q, k) * scale).masked_fill(~see, -torch.inf)


def _forward_torch(q, k, v, sets, blocks, o, lse):
    """Fill o [B, T, H, V] and lse [B, T, H] of one sequence."""
    HKV, wide = k.shape[2], lse.dtype
    q, k, v = q.unflatten(2, (HKV, -1)).to(wide), k.to(wide), v.to(wide)
    for t, j, see in _tiles(q.shape[1], HKV, sets, blocks, q.device):
        s = _scores(q[:, t], k[:, j], see, blocks.scale)
        total = torch.logsumexp(s, -1, keepdim=True)  # [B, HKV, G, tokens, 1]
        p = (s - total.nan_to_num(neginf=0.0)).exp()  # a row that sees nothing: exp(-inf - 0) = 0
        # [B, HKV, G, tokens, keys] x [B, keys, HKV, V] -> [B, tokens, HKV, G, V]
        o[:, t] = torch.einsum("bhgtj,bjhv->bthgv", p, v[:, j]).flatten(2, 3)
        lse[:, t] = total.flatten(1, 2).squeeze(-1).transpose(1, 2)


def _backward_torch(do, delta, q, k, v, lse, sets, blocks, grads):
    """Add one sequence's gradients into grads = dq, dk, dv, with the weights computed again from lse."""
    (dq, dk, dv), HKV, wide = grads, k.shape[2], lse.dtype
    k, v = k.to(wide), v.to(wide)
    q, do, delta, lse = (x.unflatten(2, (HKV, x.shape[2] // HKV)).to(wide) for x in (q, do, delta, lse))
    for t, j, see in _tiles(q.shape[1], HKV, sets, blocks, q.device):
        s = _scores(q[:, t], k[:, j], see, blocks.scale)
        p = (s - _row(lse[:, t]).nan_to_num(neginf=0.0)).exp()
        # [B, tokens, HKV, G, V] x [B, keys, HKV, V] -> [B, HKV, G, tokens, keys]
        dp = torch.einsum("bthgv,bjhv->bhgtj", do[:, t], v[:, j])
        ds = blocks.scale * p * (dp - _row(delta[:, t]))
        # [B, HKV, G, tokens, keys] x [B, keys, HKV, K] -> [B, tokens, HKV, G, K]
        dq[:, t] = torch.einsum("bhgtj,bjhk->bthgk", ds, k[:, j]).flatten(2, 3)
        # [B, HKV, G, tokens, keys] x [B, tokens, HKV, G, K] -> [B, keys, HKV, K]
        dk[:, j] += torch.einsum("bhgtj,bthgk->bjhk", ds, q[:, t])
        dv[:, j] += torch.einsum("bhgtj,bthgv->bjhv", p, do[:, t])


def _row(x):
    """[B, tokens, HKV, G] -> [B, HKV, G, tokens, 1]."""
    return x.permute(0, 2, 3, 1)[..., None]


def _empty_outputs(q, v):
    """o [B, T, H, V], and lse [B, T, H] with the tokens of a head side by side in memory."""
    (B, T, H, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    return o, torch.empty((B, H, T), dtype=wide, device=q.device).transpose(1, 2)


def _forward_fake(q, k, v, *_):
    return _empty_outputs(q, v)


def _backward_fake(do, dlse, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx, inputs, output):
    *tensors, ctx.block_size, ctx.query_block_size, ctx.causal, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, dlse):
    q, k, v, *sets, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    options = ctx.block_size, ctx.query_block_size, ctx.causal, ctx.scale, ctx.impl
    grads = torch.ops.effattn_lite.block_sparse_backward(do, dlse, q, k, v, o, lse, *sets, *options)
    return *grads, *(None for _ in range(len(sets) + len(options)))


_SETS = "Tensor? block_indices, Tensor? block_mask, Tensor? cu_seqlens"
_OPTIONS = "int block_size, int query_block_size, bool causal, float scale, str impl"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_SETS}, {_OPTIONS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_SETS}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)"
)
common.register("block_sparse", _FORWARD, _forward, _forward_fake)
common.register("block_sparse_backward", _BACKWARD, _backward, _backward_fake)
torch.library.register_autograd("effattn_lite::block_sparse", _gradient, setup_context=_save)
