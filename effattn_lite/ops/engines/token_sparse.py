r"""Softmax attention over chosen blocks of keys, where every token brings its own set of them.

One operator and its gradient, each computed in eager torch, some queries at a time, or by the Triton kernels
of kernels/token_sparse.py.

A set is a row of block numbers, in any order, -1 for none, or a row of a mask. It belongs to all query heads
of a key head, or to one query head. The queries are the last T of Tk tokens, as decoding needs it; with
packed sequences T = Tk, and blocks are counted inside each sequence.
"""

from typing import NamedTuple

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines.block_sparse import chosen

MAX_HEAD = 256
QUERY_TILE = 128
"""Queries whose scores the torch implementation holds at a time."""


class Blocks(NamedTuple):
    """Keys in a block, the mask inside it and the scale; the operators' plain arguments."""

    block_size: int
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
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose an implementation and return (o, lse); the public op checks the arguments.

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K].
        v: values, [B, Tk, HKV, V].
        block_indices: block numbers, [B, T, HKV or H, n], as in the public op; or
        block_mask: chosen or not, [B, HKV or H, T, NK].
        block_size, causal, scale, cu_seqlens, impl: as in the public op.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:  # a maximum of scores is the scaled maximum of products only if the scale is >= 0
        q, scale = -q, -scale
    impl = common.choose_impl(impl, q, refusal=refusal(q, v))
    blocks = Blocks(block_size, causal, scale)
    return torch.ops.effattn_lite.token_sparse(q, k, v, block_indices, block_mask, cu_seqlens, *blocks, impl)


def check_tokens(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    """Check that T queries can be the last of Tk tokens, and that T = Tk in packed sequences."""
    (B, T), Tk = q.shape[:2], k.shape[1]
    if T > Tk:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected at least T = {T} tokens as q")
    if cu_seqlens is not None:
        common.check_cu_seqlens(cu_seqlens, B, T)
        common.check_alike("cu_seqlens", cu_seqlens, q, dtype=False)
        if T != Tk:
            raise ValueError(f"cu_seqlens packs queries and keys alike, but T = {T} and Tk = {Tk}")


def packed_blocks(
    cu_seqlens: torch.Tensor, T: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of packed sequences, laid one after another, without reading the edges.

    Returns:
        First token of every block, [T // BS + N], 0 for those that are not there; for every token, [T]: the
        place of its sequence's first block among them, and the number of its own block in the sequence.
    """
    edges = cu_seqlens.long()
    counts = -(-edges.diff() // block_size)
    ends = counts.cumsum(0)
    i = torch.arange(T // block_size + counts.numel(), device=edges.device)
    n = torch.searchsorted(ends, i, right=True).clamp(max=counts.numel() - 1)
    start = torch.where(i < ends[-1], edges[n] + (i - (ends - counts)[n]) * block_size, 0)
    t = torch.arange(T, device=edges.device)
    n = torch.searchsorted(edges, t, right=True) - 1
    return start, (ends - counts)[n], (t - edges[n]) // block_size


def refusal(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels cannot take heads of this width or dtype on this GPU; None if they can."""
    width = max(q.shape[3], v.shape[3])
    if width > MAX_HEAD:
        return f"K <= {MAX_HEAD} and V <= {MAX_HEAD}, got {q.shape[3]} and {v.shape[3]}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        if q.dtype == torch.bfloat16:
            return "a GPU of compute capability 8.0 or later for bfloat16"
        if q.dtype == torch.float32 and width > 128:
            return "K <= 128 and V <= 128 for float32 on a GPU older than compute capability 8.0"
    return None


def _forward(q, k, v, block_indices, block_mask, cu_seqlens, block_size, causal, scale, impl):
    blocks = Blocks(block_size, causal, scale)
    if impl == "triton":
        from effattn_lite.kernels import token_sparse as kernels

        return kernels.forward(q, k, v, block_indices, block_mask, cu_seqlens, blocks)
    o, lse = _empty_outputs(q, v)
    for t, j, sets in _sequences(block_indices, block_mask, cu_seqlens):
        _forward_torch(q[:, t], k[:, j], v[:, j], sets, blocks, o[:, t], lse[:, t])
    return o, lse


def _backward(
    do, dlse, q, k, v, o, lse, block_indices, block_mask, cu_seqlens, block_size, causal, scale, impl
):
    blocks = Blocks(block_size, causal, scale)
    if impl == "triton":
        from effattn_lite.kernels import token_sparse as kernels

        return kernels.backward(do, dlse, q, k, v, o, lse, block_indices, block_mask, cu_seqlens, blocks)
    wide = lse.dtype
    delta = (do.to(wide) * o.to(wide)).sum(-1)  # [B, T, H]
    delta = delta if dlse is None else delta - dlse
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for t, j, sets in _sequences(block_indices, block_mask, cu_seqlens):
        grads = dq[:, t], dk[:, j], dv[:, j]
        _backward_torch(do[:, t], delta[:, t], q[:, t], k[:, j], v[:, j], lse[:, t], sets, blocks, grads)
    return tuple(g.to(x.dtype) for g, x in ((dq, q), (dk, k), (dv, v)))


def _sequences(block_indices, block_mask, cu_seqlens):
    """Each packed sequence, or all that there is: its queries, its keys, its rows of the sets."""
    if cu_seqlens is None:
        yield slice(None), slice(None), (block_indices, block_mask)
        return
    edges = cu_seqlens.tolist()
    for a, b in zip(edges, edges[1:], strict=False):
        indices = None if block_indices is None else block_indices[:, a:b]
        yield slice(a, b), slice(a, b), (indices, None if block_mask is None else block_mask[:, :, a:b])


def _tiles(T, Tk, HKV, sets, blocks, device):
    """Some queries at a time, the keys they see, and which: [B, HKV, 1 or G, tokens, keys] of bool."""
    for i in range(0, T, QUERY_TILE):
        tokens = slice(i, min(i + QUERY_TILE, T))
        end = tokens.stop + Tk - T if blocks.causal else Tk
        t = torch.arange(i, tokens.stop, device=device)[:, None] + (Tk - T)
        j = torch.arange(end, device=device)
        see = chosen(*sets, tokens, -(-end // blocks.block_size))[..., j // blocks.block_size]
        yield tokens, slice(0, end), (see & (j <= t) if blocks.causal else see).unflatten(1, (HKV, -1))


def _scores(q, k, see, scale):
    """Scores of query heads (key head, group), [B, HKV, G, tokens, keys]; unseen ones -inf."""
    # [B, tokens, HKV, G, K] x [B, keys, HKV, K] -> [B, HKV, G, tokens, keys]
    return (torch.einsum("bthgk,bjhk->bhgtj", q, k) * scale).masked_fill(~see, -torch.inf)


def _forward_torch(q, k, v, sets, blocks, o, lse):
    """Fill o [B, T, H, V] and lse [B, T, H] of one sequence."""
    HKV, wide = k.shape[2], lse.dtype
    q, k, v = q.unflatten(2, (HKV, -1)).to(wide), k.to(wide), v.to(wide)
    for t, j, see in _tiles(q.shape[1], k.shape[1], HKV, sets, blocks, q.device):
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
    for t, j, see in _tiles(q.shape[1], k.shape[1], HKV, sets, blocks, q.device):
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
    *tensors, block_size, causal, scale, impl = inputs
    ctx.options = block_size, causal, scale, impl
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, dlse):
    q, k, v, *sets, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = torch.ops.effattn_lite.token_sparse_backward(do, dlse, q, k, v, o, lse, *sets, *ctx.options)
    return *grads, *(None for _ in range(len(sets) + len(ctx.options)))


_SETS = "Tensor? block_indices, Tensor? block_mask, Tensor? cu_seqlens"
_OPTIONS = "int block_size, bool causal, float scale, str impl"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_SETS}, {_OPTIONS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_SETS}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)"
)
common.register("token_sparse", _FORWARD, _forward, _forward_fake)
common.register("token_sparse_backward", _BACKWARD, _backward, _backward_fake)
torch.library.register_autograd("effattn_lite::token_sparse", _gradient, setup_context=_save)
