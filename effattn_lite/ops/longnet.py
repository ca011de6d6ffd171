"""LongNet's dilated attention: the public operator, dense attention on every r-th token of each segment."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import pad

from effattn_lite.ops.common import by_sequence
from effattn_lite.ops.engines.softmax_attention import attend, check, merge


def longnet(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    segments: Sequence[int] = (2048, 4096, 8192, 16384, 32768),
    dilations: Sequence[int] = (1, 2, 4, 6, 12),
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Several views of the text at once: near tokens all, far ones thinned out, in one softmax.

    Pattern i cuts the text into segments of w_i tokens; head h keeps tokens h mod r_i, h mod r_i + r_i, ...
    of each, and they attend causally to one another. The outputs are mixed by their softmax's denominators:

    .. math:: o = \sum_i \alpha_i\, o_i, \qquad
        \alpha_i = \frac{e^{\mathrm{lse}_i}}{\sum_j e^{\mathrm{lse}_j}}

    which is one softmax in which a pair counts as often as patterns hold it. Where w and r grow by the same
    factor, the cost of all patterns is a geometric series.

    Args:
        q: queries, [B, T, H, K], positions already in them; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV.
        v: values, [B, Tk, HKV, V].
        segments: w_i >= 1, tokens in a segment of pattern i.
        dilations: r_i >= 1, distance between kept tokens, as many as segments.
        return_lse: return the log-sum-exp of each row as well, over all patterns.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk; each is run by itself, its
            segments counted from its start.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V]; with return_lse also lse, [B, T, H]. A token that no pattern keeps in a head, where
        no dilation is 1, has o = 0 and lse = -inf there.

    Raises:
        ValueError: shapes do not fit, segments and dilations differ in number, are none or not >= 1.
        TypeError, NotImplementedError: as `softmax_attention`.

    Cost: B H T (K + V) sum_i w_i / r_i^2 FLOPs in products; each pattern writes an output of all tokens.
    Source: Ding et al. 2023, arXiv:2307.02486; code https://github.com/microsoft/torchscale. Differs: the
        code gives H / r neighbouring heads the same first token, and stops the gradient of the weights alpha;
        here heads take turns, and the gradient is that of the formula.
    """
    check(q, k, v, cu_seqlens)
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"q has T = {q.shape[1]} and k has Tk = {k.shape[1]}, expected T <= Tk")
    segments, dilations = tuple(segments), tuple(dilations)
    if len(segments) != len(dilations) or not segments:
        raise ValueError(f"segments is {segments} and dilations is {dilations}, expected equally many, >= 1")
    if min(segments + dilations) < 1:
        raise ValueError(f"segments is {segments} and dilations is {dilations}, expected numbers >= 1")
    run = partial(attend, scale=scale, impl=impl)
    if q.shape[1]:
        one = partial(_sequence, segments=segments, dilations=dilations, run=run)
        o, lse = by_sequence(one, cu_seqlens, q, k, v)
    else:
        o, lse = run(q, k, v)
    return (o, lse) if return_lse else o


def _sequence(q, k, v, *, segments, dilations, run):
    """One sequence: a part (o, lse) from each pattern, merged."""
    G = q.shape[2] // k.shape[2]
    wide = [x.repeat_interleave(G, dim=2) if G > 1 and max(dilations) > 1 else x for x in (k, v)]
    pairs = zip(segments, dilations, strict=True)
    parts = [_pattern(q, *((k, v) if r == 1 else wide), w, r, run) for w, r in pairs]
    return merge(parts) if len(parts) > 1 else parts[0]


def _pattern(q, k, v, w, r, run):
    """One pattern: the rest of a begun segment, whole segments as batch rows, and the last one, cut short."""
    T, Tk = q.shape[1], k.shape[1]
    first = Tk - T
    edge = min(-(-first // w) * w, Tk)
    last = max(Tk // w * w, edge)
    parts = []
    # keys from a, queries from b, both up to c, in n segments
    for a, b, c, n in (
        (first // w * w, first, edge, 1),
        (edge, edge, last, (last - edge) // w),
        (last, last, Tk, 1),
    ):
        if b < c:
            q_part = q[:, b - first : c - first].unflatten(1, (n, (c - b) // n))
            k_part, v_part = (x[:, a:c].unflatten(1, (n, (c - a) // n)) for x in (k, v))
            parts.append(_segments(q_part, k_part, v_part, r, run))
    return tuple(torch.cat(x, dim=1) for x in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]


def _segments(q, k, v, r, run):
    """Queries [B, n, l, H, K], the last of segments of keys [B, n, lk, H, K], to o [B, n l, H, V] and lse."""
    (B, n, length, H, _), Tk = q.shape, k.shape[2]
    front, back = (Tk - length) % r, -Tk % r
    q, k, v = (_dilate(x, r, f, back).flatten(0, 1) for x, f in ((q, front), (k, 0), (v, 0)))
    o, lse = run(q, k, v)
    o, lse = (_restore(x.unflatten(0, (B, n)), r) for x in (o, lse[..., None]))
    o, lse = (x[:, :, front : front + length] for x in (o, lse))
    # what lies between the kept tokens has seen nothing
    position = torch.arange(Tk - length, Tk, device=q.device)[:, None]
    kept = position % r == torch.arange(H, device=q.device) % r
    lse = lse[..., 0].masked_fill(~kept, -torch.inf)
    return o.flatten(1, 2), lse.flatten(1, 2)


def _dilate(x, r, front, back):
    """Every r-th token of [B, n, l, H, K], filled up to multiples of r; head h begins at token h mod r."""
    H = x.shape[3]
    x = pad(x, (0, 0, 0, -H % r, front, back))
    x = x.unflatten(3, (x.shape[3] // r, r)).unflatten(2, (x.shape[2] // r, r))
    # [B, n, m, r, H / r, r, K] -> [B, n, m, H / r, K, r]: of r heads, head i takes token i
    return x.diagonal(dim1=3, dim2=5).transpose(-1, -2).flatten(3, 4)[:, :, :, :H]


def _restore(x, r):
    """The inverse of `_dilate`, with zeros between the kept tokens: [B, n, m, H, V] -> [B, n, m r, H, V]."""
    H = x.shape[3]
    x = pad(x, (0, 0, 0, -H % r)).unflatten(3, (-(-H // r), r)).transpose(-1, -2)
    return torch.diag_embed(x, dim1=3, dim2=5).flatten(4, 5).flatten(2, 3)[:, :, :, :H]
