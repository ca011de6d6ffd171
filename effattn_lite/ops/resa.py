"""Rectified Sparse Attention: the public operator, its selection of pages, and the rectification."""

import math

import torch

from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.engines import decode, softmax_attention


def resa(
    q: torch.Tensor,
    cache: KVCache | None = None,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    ratio: float = 0.1,
    min_pages: int = 16,
    page_size: int = 16,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""A new token reads pages that its whole group of heads shares; `rectify` mends the cache now and then.

    .. math:: \textstyle\sum_c \max(\bar q_c M_c,\, \bar q_c m_c), \qquad
        \bar q = \tfrac1G \sum_{h \in \mathrm{group}} q_h, \qquad
        n = \max(\lceil \rho\, p \rceil, \min(p, n_{\min}))

    are the score of a page and the number of pages read of p so far; m and M are the smallest and largest
    number of each channel among the page's keys. The newest page is always read. No gradient is defined.

    Args:
        q: queries of the newest token, [B, H, K]; float32 / bfloat16 / float16; float64 with impl="torch".
            With k and v, of the last T of Tk tokens, [B, T, H, K].
        cache: keys and values so far, the newest token's among them; it keeps the pages' bounds. Or
        k, v: keys [B, Tk, HKV, K] and values [B, Tk, HKV, V] of a text, in which every token is read as if it
            had just been written; H is a multiple of HKV.
        ratio: rho, share of the pages that is read, 0 to 1.
        min_pages: fewest pages that are read, where there are so many, >= 1.
        page_size: P, tokens in a page, >= 1.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5. The selection needs none.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1, k and v, T = Tk; pages count from each
            start.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, H, V] or [B, T, H, V], dtype of q; with return_lse also lse, [B, H] or [B, T, H], float32
        (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; neither or both of cache and k, v are given.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: a token reads HKV (2 K p + n P (K + V)) numbers, a page once for all heads of its group.
    Source: Sun et al. 2025, arXiv:2506.04108, and the released code's number of pages.
    """
    _check(ratio, min_pages, page_size)

    def body(q, k, v, features, impl):
        pages = _pages(q, k.shape[1], features, ratio, min_pages, page_size, impl)
        return decode.attend(q, k, v, pages, page_size=page_size, scale=scale, impl=impl)

    o, lse = decode.run(body, ("bounds", page_size, decode.bounds), q, cache, k, v, cu_seqlens, impl)
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    ratio: float = 0.1,
    min_pages: int = 16,
    page_size: int = 16,
    impl: str = "auto",
) -> torch.Tensor:
    """Pages of each query's group of heads: the newest, and the past ones with the largest bounds.

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K].
        ratio, min_pages, page_size, impl: as in `resa`.

    Returns:
        Page numbers, [B, T, HKV, n] int32, n as for the last token: the newest, then the best first; -1 where
        a query reads fewer. A tie in float32 goes to the lower page.

    Raises:
        ValueError, TypeError, NotImplementedError: as `resa`.

    Cost: 2 B Tk HKV K FLOPs for the bounds, 4 K a group and page.
    Source: Sun et al. 2025, arXiv:2506.04108.
    """
    _check(ratio, min_pages, page_size)

    def body(q, k, v, features, impl):
        return (_pages(q, k.shape[1], features, ratio, min_pages, page_size, impl),)

    return decode.run(body, ("bounds", page_size, decode.bounds), q, None, k, k, None, impl)[0]


@torch.no_grad()
def rectify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KVCache,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    r"""The newest n tokens once more, all at once and dense: what sparse reading left in the cache is undone.

    Every n tokens (32 in the paper) they pass through the model again, each layer calling this: their keys
    and values are written anew, and read exactly by causal attention to the whole cache.

    Args:
        q: queries of the newest n tokens, [B, n, H, K].
        k: their keys, [B, n, HKV, K], from a pass that has seen no sparse output.
        v: their values, [B, n, HKV, V].
        cache: it holds these tokens as its newest; they are overwritten.
        scale: default K ** -0.5.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, n, H, V], dtype of q.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit; nothing is overwritten then.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: B H n T (2 K + 2 V) FLOPs in products; the cache of T tokens is read once for all n.
    Source: Sun et al. 2025, arXiv:2506.04108.
    """
    softmax_attention.check(q, k, v, None)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected n = {q.shape[1]} tokens as q")
    cache.rewrite(k, v)
    return softmax_attention.attend(q, cache.k, cache.v, scale=scale, impl=impl)[0]


def _pages(q, Tk, features, ratio, min_pages, page_size, impl):
    own = torch.arange(Tk - q.shape[1], Tk, device=q.device) // page_size  # -1: there is no page yet
    p = -(-Tk // page_size)
    most = max(math.ceil(ratio * p - 1e-9), min(p, min_pages))  # the last query reads most
    mean = q.unflatten(2, (features.shape[2], -1)).to(torch.promote_types(q.dtype, torch.float32)).mean(3)
    best = decode.choose(decode.ends(mean), features, own, most - 1, impl)
    # a product that is whole but for its rounding is not rounded up
    mine = torch.ceil((own + 1).double() * ratio - 1e-9).long().maximum((own + 1).clamp(max=min_pages))
    best = best.where(torch.arange(best.shape[3], device=q.device) < mine[:, None, None] - 1, -1)
    own = own.to(torch.int32)[None, :, None, None].expand(*mean.shape[:3], 1)
    return torch.cat((own, best), dim=-1)


def _check(ratio, min_pages, page_size):
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}, expected 0 to 1")
    for name, n in (("min_pages", min_pages), ("page_size", page_size)):
        if n < 1:
            raise ValueError(f"{name} is {n}, expected >= 1")
