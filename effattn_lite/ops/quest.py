"""Quest: the public operator, and its selection of pages."""

import torch

from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.engines import decode


def quest(
    q: torch.Tensor,
    cache: KVCache | None = None,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    budget: int,
    page_size: int = 16,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""A new token reads only the pages of the cache that can matter to it, by a bound that cannot miss.

    .. math:: \textstyle\sum_c \max(q_c M_c,\, q_c m_c) \ \ge\ \max_{j \in \mathrm{page}} q^\top k_j, \qquad
        o = \sum_{j \in \mathrm{chosen}} \operatorname{softmax}_j(s\, q^\top k_j)\, v_j

    with m and M the smallest and largest number of each channel among the page's keys. Each query head
    chooses for itself; the newest page is always among its pages. No gradient is defined.

    Args:
        q: queries of the newest token, [B, H, K]; float32 / bfloat16 / float16; float64 with impl="torch".
            With k and v, of the last T of Tk tokens, [B, T, H, K].
        cache: keys and values so far, the newest token's among them; it keeps the pages' bounds. Or
        k, v: keys [B, Tk, HKV, K] and values [B, Tk, HKV, V] of a text, in which every token is read as if it
            had just been written; H is a multiple of HKV.
        budget: tokens that a query may read, >= 1, rounded up to whole pages.
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

    Cost: a token reads 2 HKV K numbers a page, and H budget (K + V) of keys and values, each head its own.
    Source: Tang et al. 2024, arXiv:2406.10774. The newest page is always read, as in the released kernels; in
        the released evaluation it competes, and at least 3 pages are read. The paper leaves the first two
        layers dense: that is the caller's.
    """
    _check(budget, page_size)

    def body(q, k, v, features, impl):
        pages = _pages(q, k.shape[1], features, budget, page_size, impl)
        return decode.attend(q, k, v, pages, page_size=page_size, scale=scale, impl=impl)

    o, lse = decode.run(body, ("bounds", page_size, decode.bounds), q, cache, k, v, cu_seqlens, impl)
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor, k: torch.Tensor, *, budget: int, page_size: int = 16, impl: str = "auto"
) -> torch.Tensor:
    """Pages of each query head: the newest, and the past ones with the largest bounds.

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K].
        budget, page_size, impl: as in `quest`.

    Returns:
        Page numbers, [B, T, H, n], n = min(ceil(budget / P), ceil(Tk / P)), int32: the newest, then the best
        first; -1 where the past has no more. A tie in float32 goes to the lower page.

    Raises:
        ValueError, TypeError, NotImplementedError: as `quest`.

    Cost: 2 B Tk HKV K FLOPs for the bounds, 4 K a query and page.
    Source: Tang et al. 2024, arXiv:2406.10774.
    """
    _check(budget, page_size)

    def body(q, k, v, features, impl):
        return (_pages(q, k.shape[1], features, budget, page_size, impl),)

    return decode.run(body, ("bounds", page_size, decode.bounds), q, None, k, k, None, impl)[0]


def _pages(q, Tk, features, budget, page_size, impl):
    own = torch.arange(Tk - q.shape[1], Tk, device=q.device) // page_size  # -1: there is no page yet
    n = min(-(-budget // page_size), -(-Tk // page_size))
    best = decode.choose(decode.ends(q), features, own, n - 1, impl)
    own = own.to(torch.int32)[None, :, None, None].expand(*q.shape[:3], 1)
    return torch.cat((own, best), dim=-1)


def _check(budget, page_size):
    for name, n in (("budget", budget), ("page_size", page_size)):
        if n < 1:
            raise ValueError(f"{name} is {n}, expected >= 1")
