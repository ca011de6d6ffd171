r"""Attention of one new token to a cache: to all of it, to chosen pages, or to chosen tokens.

Two operators, each in eager torch or by the Triton kernels of kernels/decode*.py: scores of pages by one
feature vector a page, and attention to a set of pages for every query and head. A token is a page of size 1.
Neither is differentiated.

The queries are the last T of Tk tokens, and none sees a later one: T = 1 decodes, T = Tk is a text in which
every token is read as if it had just been written.
"""

from collections.abc import Callable

import torch

from effattn_lite.ops import common
from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.engines.softmax_attention import check
from effattn_lite.ops.engines.token_sparse import check_tokens, refusal

QUERY_TILE = 128
"""Queries whose scores are held at a time."""
GATHERED = 2**24
"""Numbers that the torch implementation gathers at a time."""


def run(
    body: Callable,
    summary: tuple | None,
    q: torch.Tensor,
    cache: KVCache | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the arguments of a decode method, and call its body on a cache or on a text.

    Args:
        body: (q [B, T, H, K], k, v, features, impl) -> (o, lse).
        summary: name, page size, function of pages and source, as `KVCache.summary` takes them; None: there
            are no features.
        q: [B, H, K] with a cache, [B, T, H, K] with k and v.
        cache, k, v, cu_seqlens, impl: as in the public ops.
    """
    if cache is None:
        if k is None or v is None:
            raise ValueError("neither a cache nor both k and v are given")
        check(q, k, v, cu_seqlens)
        check_tokens(q, k, cu_seqlens)
        impl = common.choose_impl(impl, q, refusal=refusal(q, v))

        def text(q, k, v):
            if summary is None:
                return body(q, k, v, None, impl)
            size, function = summary[1:3]
            n = k.shape[1] // size
            return body(q, k, v, function(k[:, : n * size].unflatten(1, (n, size))), impl)

        return common.by_sequence(text, cu_seqlens if q.shape[1] else None, q, k, v)
    if not (k is None and v is None and cu_seqlens is None):
        raise ValueError("a cache has its own k and v, and packs no sequences: expected neither beside it")
    B, _, HKV, K = cache.k.shape
    sizes = dict(B=B, K=K)
    common.check_shape("q", q, "B H K", sizes, like="the cache")
    common.check_heads(sizes["H"], HKV)
    common.check_alike("q", q, cache.k, like="the cache")
    impl = common.choose_impl(impl, q, refusal=refusal(q[:, None], cache.v))
    features = None if summary is None else cache.summary(*summary)
    o, lse = body(q[:, None], cache.k, cache.v, features, impl)
    return o[:, 0], lse[:, 0]


def bounds(pages: torch.Tensor) -> torch.Tensor:
    """Largest and smallest key of each page [B, P, size, HKV, K], channel by channel: [B, P, HKV, 2 K]."""
    return torch.cat((pages.amax(2), pages.amin(2)), dim=-1)


def ends(q: torch.Tensor) -> torch.Tensor:
    """Positive and negative part of queries, [..., 2 K]: their product with `bounds` bounds every q k."""
    return torch.cat((q.clamp(min=0), q.clamp(max=0)), dim=-1)


@torch.no_grad()
def choose(
    queries: torch.Tensor, features: torch.Tensor, past: torch.Tensor, n: int, impl: str
) -> torch.Tensor:
    """The n pages of highest score among the first `past` of each query, the best first, -1 for none.

    Args:
        queries: [B, T, HS, F]; HS a multiple of HKV.
        features: one vector a page and key head, [B, P, HKV, F].
        past: pages that each query may choose from, [T].
        n: how many.
        impl: "torch" or "triton".

    Returns:
        [B, T, HS, min(n, P)] int32. A tie in float32 goes to the lower page.
    """
    (B, T, HS, _), P = queries.shape, features.shape[1]
    chosen, n = [], min(n, P)
    i = torch.arange(P, device=queries.device)
    for tile in (slice(a, a + QUERY_TILE) for a in range(0, T, QUERY_TILE)) if n > 0 else ():
        s = torch.ops.effattn_lite.page_scores(queries[:, tile], features, impl)
        s = s.masked_fill(i >= past[tile, None, None], -torch.inf)
        chosen.append(_top(s, n))
    empty = queries.new_zeros((B, 0 if chosen else T, HS, max(n, 0)), dtype=torch.int32)
    return torch.cat([empty, *chosen], dim=1)


def _top(s, n):
    """Numbers of the n largest of s [..., P], the largest first, of equals the lowest; -1 for -inf.

    A score and its number in one int64, which orders as the score does, and no two of which are equal: an
    unstable selection so has one result.
    """
    bits = (s + 0.0).view(torch.int32)  # + 0: there is no -0 left
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # order of integers is order of floats
    i = torch.arange(s.shape[-1], device=s.device)
    key = torch.topk((bits.long() << 32) - i, n)[0]
    index = -key & 0xFFFFFFFF
    return torch.where(s.gather(-1, index).isneginf(), -1, index).to(torch.int32)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor | None,
    *,
    page_size: int = 1,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query to its pages, as far as they lie behind it; returns (o, lse).

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K].
        v: values, [B, Tk, HKV, V].
        pages: page numbers, [B, T, HS, n] int32, no number twice, -1 for none; HS sets, each for H / HS
            query heads of one key head. None: the whole cache.
        page_size: tokens in a page.
        bias: added to the scaled score of each listed token, [B, T, HS, n page_size], or None; -log of the
            chance with which it was drawn makes sums over a sample unbiased.
        scale: default K ** -0.5.
        impl: "torch", or "triton", which takes no bias.

    Returns:
        o, [B, T, H, V], dtype of q, and lse, [B, T, H], float32 (float64 for float64); an empty set gives
        o = 0 and lse = -inf.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:  # a maximum of scores is the scaled maximum of products only if the scale is >= 0
        q, scale = -q, -scale
    return torch.ops.effattn_lite.decode(q, k, v, pages, page_size, scale, impl, bias)


def after_prompt(
    rest: Callable,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt: int,
    *,
    scale: float | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full attention for queries of the prompt, a method's own for those after it; returns (o, lse).

    Args:
        rest: the queries after the prompt, the last of Tk tokens, [B, n, H, K] -> (o, lse).
        q, k, v, scale, impl: as in `attend`.
        prompt: tokens that are read before the first is written.
    """
    T, Tk = q.shape[1], k.shape[1]
    n = min(max(prompt - (Tk - T), 0), T)
    end = Tk - T + n
    parts = [attend(q[:, :n], k[:, :end], v[:, :end], None, scale=scale, impl=impl)] if n or not T else []
    parts += [rest(q[:, n:])] if n < T else []
    return tuple(torch.cat(x, dim=1) for x in zip(*parts, strict=True))


def _decode(q, k, v, pages, page_size, scale, impl, bias=None):
    if impl == "triton" and bias is not None:
        raise NotImplementedError("the kernels of decoding add no bias; use impl='torch'")
    if impl == "triton":
        from effattn_lite.kernels import decode as kernels

        return kernels.forward(q, k, v, pages, page_size, scale)
    (B, T), (Tk, HKV, V) = q.shape[:2], v.shape[1:]
    o, lse = _decode_fake(q, k, v)
    HS, n = (HKV, Tk) if pages is None else (pages.shape[2], pages.shape[3] * page_size)
    rows = max(1, GATHERED // max(1, B * HS * n * max(q.shape[3], V)))
    for i in range(0, T, rows):
        t = slice(i, min(i + rows, T))
        sets = None if pages is None else pages[:, t]
        positions = torch.arange(t.start, t.stop, device=q.device) + (Tk - T)
        added = None if bias is None else bias[:, t]
        o[:, t], lse[:, t] = _attend_torch(q[:, t], k, v, sets, page_size, added, scale, positions, lse.dtype)
    return o, lse


def _attend_torch(q, k, v, pages, page_size, bias, scale, t, wide):
    """(o, lse) of some queries at positions t, over gathered keys and values."""
    Tk, HKV = k.shape[1:3]
    if pages is None:
        pages = torch.arange(Tk, device=q.device).expand(1, 1, HKV, Tk)
        page_size = 1
    HS = pages.shape[2]
    j = (pages[..., None].long() * page_size + torch.arange(page_size, device=q.device)).flatten(3)
    see = (j >= 0) & (j <= t[:, None, None])  # [B, T, HS, m]; of page -1 all tokens are negative
    j = j.clamp(0, max(Tk - 1, 0))
    b = torch.arange(k.shape[0], device=q.device)[:, None, None, None]
    h = torch.arange(HS, device=q.device)[:, None] // (HS // HKV)
    if not Tk:  # nothing to gather
        b, j, see = b[..., :0], j[..., :0], see[..., :0]
    # [B, T, HS, G, K] x [B, T, HS, m, K] -> [B, T, HS, G, m]
    s = torch.einsum("bthgk,bthjk->bthgj", q.unflatten(2, (HS, -1)).to(wide), k[b, j, h].to(wide)) * scale
    if bias is not None:
        s = s + bias[..., None, :].to(wide)
    s = s.masked_fill(~see[..., None, :], -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = (s - lse.nan_to_num(neginf=0.0)[..., None]).exp()  # a row that sees nothing: exp(-inf - 0) = 0
    o = torch.einsum("bthgj,bthjv->bthgv", p, v[b, j, h].to(wide))
    return o.flatten(2, 3), lse.flatten(2)


def _page_scores(queries, features, impl):
    if impl == "triton":
        from effattn_lite.kernels import decode as kernels

        return kernels.page_scores(queries, features)
    HKV = features.shape[2]
    # float64: pages of equal keys tie, in whatever order a product is summed
    s = torch.einsum(
        "bthgf,bphf->bthgp", queries.unflatten(2, (HKV, -1)).double(), features.double()
    )  # [B, T, HKV, G, F] x [B, P, HKV, F] -> [B, T, HKV, G, P]
    return s.flatten(2, 3).float()


def _decode_fake(q, k, v, *_):
    B, T, H, _ = q.shape
    lse = torch.empty((B, T, H), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device), lse


def _page_scores_fake(queries, features, impl):
    return torch.empty((*queries.shape[:3], features.shape[1]), dtype=torch.float32, device=queries.device)


common.register(
    "decode",
    "(Tensor q, Tensor k, Tensor v, Tensor? pages, int page_size, float scale, str impl, Tensor? bias=None)"
    " -> (Tensor, Tensor)",
    _decode,
    _decode_fake,
)
common.register(
    "page_scores", "(Tensor queries, Tensor features, str impl) -> Tensor", _page_scores, _page_scores_fake
)
