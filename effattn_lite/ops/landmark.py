"""Landmark attention: the public operator, and its retrieval of blocks."""

import torch
import torch.nn.functional as F

from effattn_lite.ops import common
from effattn_lite.ops.engines import softmax_attention, token_sparse

QUERY_TILE = 128
"""Queries whose scores are held at a time."""


def landmark(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int,
    top_k: int | None = None,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The last token of a block is its landmark: its score is what the block gets, theirs is who gets it.

    .. math:: o_t = \sum_j \operatorname{softmax}_j(s_{tj} + c_{tj})\, v_j, \qquad
        c_{tj} = \begin{cases} 0 & j \text{ in the own block} \\
        s_{t \ell(j)} - \log \sum_{i \in \mathrm{block}(j)} e^{s_{ti}} & j \text{ in a past block}
        \end{cases}

    over the tokens that are no landmarks, of the own block up to t and of chosen past ones; l(j) is the
    landmark of j's block. This is the grouped softmax: a past block as a whole weighs what its landmark would
    among the own tokens. Gradients flow through all scores, none through the choice of top_k.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16 / float64. The queries are the last T of Tk
            tokens, as decoding needs it.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV.
        v: values, [B, Tk, HKV, V]; those of landmarks are never read.
        block_size: tokens in a block, the landmark among them, >= 2; 51 where one follows each 50 tokens.
        top_k: past blocks that a query retrieves, by the products with their landmarks, each head its own;
            None, as in training: all of them.
        return_lse: return as well the log of the denominator in which own tokens and landmarks meet;
            gradients flow through it.
        scale: of the scores s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk; blocks count from each start;
            read on the host.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; cu_seqlens does not rise from 0 to T.
        TypeError: dtypes differ.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: B H T Tk (2 K + 2 V) FLOPs in products, half of it where T = Tk, whatever top_k is: the mask saves
        none; the gradient 2.5 times that. 128 Tk scores a head are in memory.
    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300, with the grouped softmax written as a bias; as in the
        released code an own landmark is left out for itself too. Differs: landmarks stand at fixed places.
    """
    _check(q, k, block_size, top_k, cu_seqlens)
    softmax_attention.check(q, k, v, cu_seqlens)
    if impl == "triton":
        raise NotImplementedError("landmark has no kernel; use impl='torch'")
    common.choose_impl(impl, q)
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def attend(q, k, v):
        blocks = None if top_k is None else _select(q, k, block_size, top_k)
        # autocast would turn the float32 products into bfloat16
        with torch.autocast(q.device.type, enabled=False):
            return torch.ops.effattn_lite.landmark(q, k, v, blocks, block_size, scale)

    o, lse = common.by_sequence(attend, cu_seqlens if q.shape[1] else None, q, k, v)
    return (o, lse) if return_lse else o


def select(q: torch.Tensor, k: torch.Tensor, *, block_size: int, top_k: int) -> torch.Tensor:
    """Past blocks of each query head, those whose landmarks have the largest products with it.

    Args:
        q, k, block_size, top_k: as in `landmark`. A tie in float32 goes to the lower block.

    Returns:
        Block numbers, [B, T, H, min(top_k, Tk // block_size)], int32, the best first; -1 where the past has
        no more.

    Raises:
        ValueError, TypeError: as `landmark`.

    Cost: 2 K FLOPs a query, head and landmark, in float64.
    Source: Mohtashami and Jaggi 2023, arXiv:2305.16300.
    """
    _check(q, k, block_size, top_k, None)
    return _select(q, k, block_size, top_k)


def _check(q, k, block_size, top_k, cu_seqlens):
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B Tk HKV K", sizes)
    common.check_heads(sizes["H"], sizes["HKV"])
    common.check_alike("k", k, q)
    token_sparse.check_tokens(q, k, cu_seqlens)
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}, expected >= 2: a token and its landmark")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected >= 0")


@torch.no_grad()
def _select(q, k, BS, top_k):
    (B, T, H, _), (Tk, HKV) = q.shape, k.shape[1:3]
    marks = k[:, BS - 1 :: BS].double()
    i, own = torch.arange(marks.shape[1], device=q.device), torch.arange(Tk - T, Tk, device=q.device) // BS
    n = min(top_k, marks.shape[1])
    chosen = [torch.zeros((B, 0, H, n), dtype=torch.int32, device=q.device)]
    for t in (slice(a, a + QUERY_TILE) for a in range(0, T, QUERY_TILE)):
        with torch.autocast(q.device.type, enabled=False):
            # [B, tile, HKV, G, K] x [B, P, HKV, K] -> [B, tile, HKV, G, P]
            s = torch.einsum("bthgk,bphk->bthgp", q[:, t].double().unflatten(2, (HKV, -1)), marks)
        past = i < own[t, None, None, None]
        # compared in float32, so that rounding of float64 breaks no tie
        s = s.float().masked_fill(~past, -torch.inf)
        best = s.sort(dim=-1, descending=True, stable=True)[1][..., :n]
        chosen.append(torch.where(best < own[t, None, None, None], best, -1).flatten(2, 3).to(torch.int32))
    return torch.cat(chosen, dim=1)


def _forward(q, k, v, blocks, block_size, scale):
    o, lse = _forward_fake(q, k, v)
    wide = lse.dtype
    for t, end, x in _tiles(q, k, v, blocks, block_size, scale, wide):
        weights, total, *_ = x
        # [B, HKV, G, tile, end] x [B, end, HKV, V] -> [B, tile, HKV, G, V]
        o[:, t] = torch.einsum("bhgtj,bjhv->bthgv", weights, v[:, :end].to(wide)).flatten(2, 3)
        lse[:, t] = total.flatten(1, 2).transpose(1, 2)
    return o, lse


def _backward(do, dlse, q, k, v, o, blocks, block_size, scale):
    r"""Gradients, with w the weights and r those inside a past block:

    .. math:: \delta_j = w_j (do^\top v_j - do^\top o + dlse), \quad ds_{\ell} = \sum_{j \in \mathrm{block}}
        \delta_j, \quad ds_j = \delta_j - r_j\, ds_{\ell(j)}

    and ds_j = delta_j in the own block.
    """
    HKV, BS, wide = k.shape[2], block_size, torch.promote_types(q.dtype, torch.float32)
    grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    dq, dk, dv = grads
    delta = (do.to(wide) * o.to(wide)).sum(-1)
    delta = (delta if dlse is None else delta - dlse).unflatten(2, (HKV, -1)).permute(0, 2, 3, 1)[..., None]
    for t, end, (w, _, inside, near) in _tiles(q, k, v, blocks, BS, scale, wide):
        do_t, q_t = (x[:, t].to(wide).unflatten(2, (HKV, -1)) for x in (do, q))
        # [B, tile, HKV, G, V] x [B, end, HKV, V] -> [B, HKV, G, tile, end]
        ds = w * (torch.einsum("bthgv,bjhv->bhgtj", do_t, v[:, :end].to(wide)) - delta[..., t, :])
        P = end // BS
        past = ds.masked_fill(near, 0)[..., : P * BS].unflatten(-1, (P, BS))[..., :-1]
        mark = past.sum(-1, keepdim=True)
        past = torch.cat((past - inside * mark, mark), dim=-1).flatten(-2)
        ds = ds.where(near, F.pad(past, (0, end - P * BS))) * scale
        # [B, HKV, G, tile, end] x [B, end, HKV, K] -> [B, tile, HKV, G, K]
        dq[:, t] = torch.einsum("bhgtj,bjhk->bthgk", ds, k[:, :end].to(wide)).flatten(2, 3)
        # [B, HKV, G, tile, end] x [B, tile, HKV, G, K] -> [B, end, HKV, K]
        dk[:, :end] += torch.einsum("bhgtj,bthgk->bjhk", ds, q_t)
        dv[:, :end] += torch.einsum("bhgtj,bthgv->bjhv", w, do_t)
    return tuple(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))


def _tiles(q, k, v, blocks, block_size, scale, wide):
    """Some queries t and the number `end` of keys up to them; (weights, lse, weights inside blocks, near)."""
    T, (Tk, HKV) = q.shape[1], k.shape[1:3]
    for i in range(0, T, QUERY_TILE):
        t = slice(i, min(i + QUERY_TILE, T))
        end, sets = Tk - T + t.stop, None if blocks is None else blocks[:, t]
        # [B, tile, HKV, G, K] x [B, end, HKV, K] -> [B, HKV, G, tile, end]
        s = torch.einsum("bthgk,bjhk->bhgtj", q[:, t].to(wide).unflatten(2, (HKV, -1)), k[:, :end].to(wide))
        yield t, end, _weights(s * scale, sets, Tk - T + i, block_size)


def _weights(s, blocks, first, BS):
    """Weights of the keys, [B, HKV, G, tile, end], for queries from `first` on; lse; inside blocks; near."""
    HKV, G, n, end = s.shape[1:]
    t, j, P = (
        torch.arange(first, first + n, device=s.device)[:, None],
        torch.arange(end, device=s.device),
        end // BS,
    )
    near = (j // BS == t // BS) & (j <= t) & (j % BS < BS - 1)
    far = torch.arange(P, device=s.device) < t // BS
    if blocks is not None:
        # [B, tile, H, c] -> [B, H, tile, P], with one column more for none
        index = torch.where(blocks < 0, P, blocks).transpose(1, 2).long()
        mask = torch.zeros((*index.shape[:3], P + 1), dtype=torch.bool, device=s.device)
        far = mask.scatter_(3, index, True)[..., :P].unflatten(1, (HKV, G)) & far
    whole = s[..., : P * BS].unflatten(-1, (P, BS))
    marks = whole[..., -1].masked_fill(~far, -torch.inf)
    total = torch.cat((s.masked_fill(~near, -torch.inf), marks), dim=-1).logsumexp(-1)
    inside = whole[..., :-1].softmax(-1)
    past = inside * (marks - total[..., None]).exp()[..., None]
    past = F.pad(F.pad(past, (0, 1)).flatten(-2), (0, end - P * BS))
    return (s - total[..., None]).masked_fill(~near, -torch.inf).exp() + past, total, inside, near


def _forward_fake(q, k, v, *_):
    (B, T, H, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    return o, torch.empty((B, T, H), dtype=wide, device=q.device)


def _backward_fake(do, dlse, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, blocks, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[0], blocks)
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, dlse):
    q, k, v, o, blocks = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    options = blocks, ctx.block_size, ctx.scale
    return *torch.ops.effattn_lite.landmark_backward(do, dlse, q, k, v, o, *options), None, None, None


_OPTIONS = "Tensor? blocks, int block_size, float scale"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)"
)
common.register("landmark", _FORWARD, _forward, _forward_fake)
common.register("landmark_backward", _BACKWARD, _backward, _backward_fake)
torch.library.register_autograd("effattn_lite::landmark", _gradient, setup_context=_save)
