r"""Attention to summaries of spans, and the blocks that its weights point at.

Two operators, the first with a gradient, each computed in eager torch, some queries at a time, or by the
Triton kernels of kernels/nsa.py.

A span is l tokens, the i-th begins at token i d; a query sees it once its last token has come. The queries
are the last T of Tk tokens. With packed sequences T = Tk, spans and blocks are counted inside each sequence,
and the summaries of all sequences stand one after another.
"""

from typing import NamedTuple

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines.token_sparse import refusal

QUERY_TILE = 128
"""Queries whose scores the torch implementation holds at a time."""


class Spans(NamedTuple):
    """l and d, tokens before the last query and with it, and the scale; the operators' plain arguments."""

    size: int
    stride: int
    tokens: int
    scale: float


def skim(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Spans,
    *,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [B, T, H, K] to summaries k [B, NC, HKV, K], v [B, NC, HKV, V]: o and lse."""
    impl = common.choose_impl(impl, q, refusal=refusal(q, v))
    return torch.ops.effattn_lite.nsa(q, k, v, cu_seqlens, *spans, impl)


def point(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    spans: Spans,
    *,
    block_size: int,
    top_n: int,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The top_n blocks that the weights of summaries, q k - lse, point at, [B, T, HKV, n] of int32.

    The first and the last two blocks are among them; a tie in float32 goes to the lower block; -1: no more.
    """
    impl = common.choose_impl(impl, q, refusal=refusal(q, k))
    q, k, lse = q.detach(), k.detach(), lse.detach()
    return torch.ops.effattn_lite.nsa_select(q, k, lse, cu_seqlens, *spans, block_size, top_n, impl)


def count(T, spans_size: int, stride: int):
    """Whole spans in T tokens; T an integer or a tensor of them."""
    whole = (T - spans_size) // stride + 1
    return whole.clamp(min=0) if isinstance(T, torch.Tensor) else max(whole, 0)


def _forward(q, k, v, cu_seqlens, size, stride, tokens, scale, impl):
    spans = Spans(size, stride, tokens, scale)
    if impl == "triton":
        from effattn_lite.kernels import nsa as kernels

        return kernels.forward(q, k, v, cu_seqlens, spans)
    o, lse = _empty_outputs(q, v)
    HKV, wide = k.shape[2], lse.dtype
    grouped, k, v = q.unflatten(2, (HKV, -1)).to(wide), k.to(wide), v.to(wide)
    for t, i, see, _ in _tiles(q.shape[1], cu_seqlens, spans, q.device):
        s = _scores(grouped[:, t], k[:, i], see, scale)
        total = torch.logsumexp(s, -1, keepdim=True)  # [B, HKV, G, tokens, 1]
        p = (s - total.nan_to_num(neginf=0.0)).exp()
        # [B, HKV, G, tokens, spans] x [B, spans, HKV, V] -> [B, tokens, HKV, G, V]
        o[:, t] = torch.einsum("bhgti,bihv->bthgv", p, v[:, i]).flatten(2, 3)
        lse[:, t] = total.flatten(1, 2).squeeze(-1).transpose(1, 2)
    return o, lse


def _backward(do, dlse, q, k, v, o, lse, cu_seqlens, size, stride, tokens, scale, impl):
    spans = Spans(size, stride, tokens, scale)
    if impl == "triton":
        from effattn_lite.kernels import nsa as kernels

        return kernels.backward(do, dlse, q, k, v, o, lse, cu_seqlens, spans)
    wide, HKV = lse.dtype, k.shape[2]
    delta = (do.to(wide) * o.to(wide)).sum(-1)  # [B, T, H]
    delta = delta if dlse is None else delta - dlse
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    kw, vw = k.to(wide), v.to(wide)
    qg, do, delta, lse = (x.unflatten(2, (HKV, x.shape[2] // HKV)).to(wide) for x in (q, do, delta, lse))
    for t, i, see, _ in _tiles(q.shape[1], cu_seqlens, spans, q.device):
        s = _scores(qg[:, t], kw[:, i], see, scale)
        p = (s - _row(lse[:, t]).nan_to_num(neginf=0.0)).exp()
        # [B, tokens, HKV, G, V] x [B, spans, HKV, V] -> [B, HKV, G, tokens, spans]
        dp = torch.einsum("bthgv,bihv->bhgti", do[:, t], vw[:, i])
        ds = scale * p * (dp - _row(delta[:, t]))
        dq[:, t] = torch.einsum("bhgti,bihk->bthgk", ds, kw[:, i]).flatten(2, 3)
        # [B, HKV, G, tokens, spans] x [B, tokens, HKV, G, K] -> [B, spans, HKV, K]
        dk[:, i] += torch.einsum("bhgti,bthgk->bihk", ds, qg[:, t])
        dv[:, i] += torch.einsum("bhgti,bthgv->bihv", p, do[:, t])
    return tuple(g.to(x.dtype) for g, x in ((dq, q), (dk, k), (dv, v)))


def _select(q, k, lse, cu_seqlens, size, stride, tokens, scale, block_size, top_n, impl):
    spans = Spans(size, stride, tokens, scale)
    if impl == "triton":
        from effattn_lite.kernels import nsa as kernels

        return kernels.select(q, k, lse, cu_seqlens, spans, block_size, top_n)
    HKV, wide, best = k.shape[2], lse.dtype, _empty_blocks(q, k, tokens, block_size, top_n).fill_(-1)
    q, k, lse = q.unflatten(2, (HKV, -1)).to(wide), k.to(wide), lse.unflatten(2, (HKV, -1))
    for t, i, see, place in _tiles(q.shape[1], cu_seqlens, spans, q.device):
        s = _scores(q[:, t], k[:, i], see, scale)
        p = (s - _row(lse[:, t]).nan_to_num(neginf=0.0)).exp().sum(2)  # [B, HKV, tokens, spans]
        own = place[:, None] // block_size
        j = torch.arange(int(place[-1]) // block_size + 1, device=q.device)
        score = importance(p, j.numel(), block_size, size, stride)
        score = score.masked_fill((j == 0) | (j > own - 2), torch.inf).masked_fill(j > own, -torch.inf)
        # compared in float32, so that rounding of float64 breaks no tie
        first = score.float().sort(dim=-1, descending=True, stable=True)[1][..., :top_n]
        first = torch.where(first <= own, first, -1)
        best[:, t, :, : first.shape[-1]] = first.transpose(1, 2).to(torch.int32)
    return best


def importance(p: torch.Tensor, NK: int, block_size: int, size: int, stride: int) -> torch.Tensor:
    """Weight of NK blocks from weights p [..., NC] of spans: a span counts for each stride that it shares."""
    a, c = block_size // stride, size // stride
    p = torch.nn.functional.pad(p, (c - 1, a * NK + c))
    parts = (p[..., c - 1 + m - n :: a][..., :NK] for m in range(a) for n in range(c))
    # the same order in every block: equal weights give equal sums
    return sum(parts, torch.zeros_like(p[..., :NK]))


def _tiles(T, cu_seqlens, spans, device):
    """Some queries at a time: (tokens, spans, [tokens, spans] of bool: seen, places of the tokens)."""
    edges, before = [0, T] if cu_seqlens is None else cu_seqlens.tolist(), 0
    for a, b in zip(edges, edges[1:], strict=False):
        for t in range(a, b, QUERY_TILE):
            tokens = slice(t, min(t + QUERY_TILE, b))
            place = torch.arange(t - a, tokens.stop - a, device=device)
            if cu_seqlens is None:
                place = place + (spans.tokens - T)
            i = torch.arange(count(int(place[-1]) + 1, spans.size, spans.stride), device=device)
            see = i * spans.stride + spans.size - 1 <= place[:, None]
            yield tokens, slice(before, before + i.numel()), see, place
        before += count(b - a, spans.size, spans.stride)


def _scores(q, k, see, scale):
    """Scores of query heads (key head, group), [B, HKV, G, tokens, spans]; unseen ones -inf."""
    # [B, tokens, HKV, G, K] x [B, spans, HKV, K] -> [B, HKV, G, tokens, spans]
    return (torch.einsum("bthgk,bihk->bhgti", q, k) * scale).masked_fill(~see, -torch.inf)


def _row(x):
    """[B, tokens, HKV, G] -> [B, HKV, G, tokens, 1]."""
    return x.permute(0, 2, 3, 1)[..., None]


def _empty_outputs(q, v):
    """o [B, T, H, V], and lse [B, T, H] with the tokens of a head side by side in memory."""
    (B, T, H, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    return o, torch.empty((B, H, T), dtype=wide, device=q.device).transpose(1, 2)


def _empty_blocks(q, k, tokens, block_size, top_n):
    shape = (*q.shape[:2], k.shape[2], min(top_n, -(-tokens // block_size)))
    return torch.empty(shape, dtype=torch.int32, device=q.device)


def _forward_fake(q, k, v, *_):
    return _empty_outputs(q, v)


def _backward_fake(do, dlse, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _select_fake(q, k, lse, cu_seqlens, size, stride, tokens, scale, block_size, top_n, impl):
    return _empty_blocks(q, k, tokens, block_size, top_n)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, dlse):
    q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = torch.ops.effattn_lite.nsa_backward(do, dlse, q, k, v, o, lse, cu_seqlens, *ctx.options)
    return *grads, *(None for _ in range(1 + len(ctx.options)))


_OPTIONS = "Tensor? cu_seqlens, int size, int stride, int tokens, float scale"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, str impl) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS}, str impl) "
    "-> (Tensor, Tensor, Tensor)"
)
_SELECT = f"(Tensor q, Tensor k, Tensor lse, {_OPTIONS}, int block_size, int top_n, str impl) -> Tensor"
common.register("nsa", _FORWARD, _forward, _forward_fake)
common.register("nsa_backward", _BACKWARD, _backward, _backward_fake)
common.register("nsa_select", _SELECT, _select, _select_fake)
torch.library.register_autograd("effattn_lite::nsa", _gradient, setup_context=_save)
