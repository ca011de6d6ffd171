"""RetrievalAttention: the public operator, its search for keys, and the graph that queries draw."""

from typing import NamedTuple

import torch

from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.engines import decode
from effattn_lite.ops.engines.softmax_attention import check, merge


class Graph(NamedTuple):
    """An index of the first n keys of a text.

    `near` holds the neighbours of each key, [B, HKV, n, degree] int32, the nearest first, -1 for none;
    `count` the queries that each key answers, [B, HKV, n] int32: searches start where it is largest.
    """

    near: torch.Tensor
    count: torch.Tensor


def retrieval_attention(
    q: torch.Tensor,
    cache: KVCache | None = None,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    budget: int,
    sinks: int = 128,
    window: int = 512,
    graph: Graph | None = None,
    beam: int = 32,
    starts: int = 8,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""A new token searches its keys as a vector database; sinks and newest tokens it reads without a search.

    .. math:: \mathcal R = \operatorname{top}_n\ q^\top k_j, \qquad
        o = \frac{e^{\ell_W} o_W + e^{\ell_R} o_R}{e^{\ell_W} + e^{\ell_R}}

    with attention o and its log-sum-exp over what is always read, W, and over what was retrieved, R, apart.
    The search is exact, or along a graph that `build` makes of the prompt. Each query head retrieves for
    itself. No gradient is defined.

    Args:
        q: queries of the newest token, [B, H, K]; float32 / bfloat16 / float16; float64 with impl="torch".
            With k and v, of the last T of Tk tokens, [B, T, H, K].
        cache: keys and values so far, the newest token's among them. Or
        k, v: keys [B, Tk, HKV, K] and values [B, Tk, HKV, V] of a text, in which every token is read as if it
            had just been written; H is a multiple of HKV.
        budget: n, tokens to retrieve, >= 0.
        sinks: first tokens, always read, >= 0.
        window: newest tokens, always read, the token itself among them, >= 1.
        graph: index of the first tokens, from `build`; those behind it are always read. None: search exactly.
        beam: best keys so far whose neighbours are looked at, >= 1.
        starts: keys at which a search begins, >= 1.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5. The search needs none.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1, k and v, T = Tk; without a graph.
        impl: "auto" or "torch"; "auto" searches exactly and attends by the kernels of decoding on a GPU.

    Returns:
        o, [B, H, V] or [B, T, H, V], dtype of q; with return_lse also lse, [B, H] or [B, T, H], float32
        (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; neither or both of cache and k, v are given.
        TypeError: dtypes differ.
        NotImplementedError: impl="triton"; the search along a graph has no kernel.

    Cost: a token reads HKV K numbers a key to search exactly, or H K a key that the search along a graph
        looks at, and H (K + V) a token of W and R.
    Source: Liu et al. 2024, arXiv:2409.10516. There the index and the retrieved part stay on the CPU, the
        rest on the GPU; here both lie where the cache does. The defaults of sinks and window are
        unverified.
    """
    options = _check(budget, sinks, window, beam, starts)
    if impl == "triton":
        raise NotImplementedError("retrieval_attention has no kernel; use impl='auto' or impl='torch'")
    if graph is not None and cu_seqlens is not None:
        raise ValueError("a graph indexes one sequence, but cu_seqlens packs several: expected one of them")

    def body(q, k, v, _, impl):
        found = _found(q, k, graph, options, impl)
        known = k.shape[1] if graph is None else graph.near.shape[2]
        parts = [_always(q, k.shape[1], known, sinks, window), *([found] if found.shape[3] else [])]
        return merge([decode.attend(q, k, v, tokens, scale=scale, impl=impl) for tokens in parts])

    o, lse = decode.run(body, None, q, cache, k, v, cu_seqlens, impl)
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    budget: int,
    sinks: int = 128,
    window: int = 512,
    graph: Graph | None = None,
    beam: int = 32,
    starts: int = 8,
    impl: str = "auto",
) -> torch.Tensor:
    """Retrieved tokens of each query head: the largest products that the search finds.

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K].
        budget, sinks, window, graph, beam, starts, impl: as in `retrieval_attention`.

    Returns:
        Token numbers, [B, T, H, n] int32, n <= budget, the best first; -1 where there are no more. A tie in
        float32 goes to the earlier token.

    Raises:
        ValueError, TypeError: as `retrieval_attention`.

    Cost: 2 K FLOPs a query and key that is looked at.
    Source: Liu et al. 2024, arXiv:2409.10516.
    """
    options = _check(budget, sinks, window, beam, starts)

    def body(q, k, v, _, impl):
        return (_found(q, k, graph, options, impl),)

    return decode.run(body, None, q, None, k, k, None, impl)[0]


@torch.no_grad()
def build(q: torch.Tensor, k: torch.Tensor, *, links: int = 32, degree: int = 16, sinks: int = 128) -> Graph:
    r"""An index of keys that queries have drawn: keys wanted by the same query are neighbours.

    Queries are no keys: they lie elsewhere, and the keys nearest to one need not be near each other. So every
    query of the prompt is linked to the keys that answer it best, and then left out: two keys are as near as
    the number of queries that both answer.

    Args:
        q: queries of the prompt, [B, T, H, K].
        k: its keys, [B, n, HKV, K]; all query heads of a key head draw the same graph.
        links: keys that a query is linked to, >= 1.
        degree: neighbours that a key keeps, >= 1.
        sinks: first tokens, not in the index, >= 0.

    Returns:
        The graph; ties go to the earlier key: the sorts are stable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ranges do not fit.

    Cost: 2 B H T n K FLOPs in products, a sort of n numbers a query and of n a key; n^2 numbers a key head.
    Source: Liu et al. 2024, arXiv:2409.10516, after RoarGraph, Chen et al. 2024, arXiv:2408.08933. Differs:
        neighbours are ranked by the queries they share; RoarGraph prunes by distances, and adds edges so that
        every key can be reached.
    """
    check(q, k, k, None)
    for name, x, least in (("links", links, 1), ("degree", degree, 1), ("sinks", sinks, 0)):
        if x < least:
            raise ValueError(f"{name} is {x}, expected >= {least}")
    (B, n, HKV, _), H = k.shape, q.shape[2]
    near = k.new_full((B, HKV, n, min(degree, n)), -1, dtype=torch.int32)
    count = k.new_zeros((B, HKV, n), dtype=torch.int32)
    for b, h in ((b, h) for b in range(B) for h in range(HKV) if n > sinks):
        heads = slice(h * H // HKV, (h + 1) * H // HKV)
        # [T, G, K] x [n, K] -> [T G, n]
        s = torch.einsum("tgk,jk->tgj", q[b, :, heads].double(), k[b, sinks:, h].double()).flatten(0, 1)
        linked = s.float().sort(dim=-1, descending=True, stable=True)[1][:, :links] + sinks
        wanted = torch.zeros(s.shape[0], n, dtype=torch.float32, device=k.device).scatter_(1, linked, 1.0)
        together = wanted.T @ wanted
        count[b, h] = together.diagonal().int()
        shared, order = together.fill_diagonal_(0).sort(dim=-1, descending=True, stable=True)
        keep = slice(near.shape[3])
        near[b, h] = torch.where(shared[:, keep] > 0, order[:, keep], -1).int()
    return Graph(near, count)


def _found(q, k, graph, options, impl):
    """Retrieved tokens, [B, T, H, n] int32."""
    T, Tk, sinks = q.shape[1], k.shape[1], options["sinks"]
    past = torch.arange(Tk - T, Tk, device=q.device) - options["window"] + 1  # tokens that may be retrieved
    if graph is None:
        best = decode.choose(q, k[:, sinks:], past - sinks, options["budget"], impl)
        return torch.where(best >= 0, best + sinks, -1)
    _check_graph(graph, k)
    s = _search(q, k, graph, options["beam"], options["starts"])[..., :-1]
    j = torch.arange(s.shape[3], device=q.device)
    s = s.masked_fill((j < sinks) | (j >= past[:, None, None]), -torch.inf)
    s, best = (x[..., : options["budget"]] for x in s.sort(dim=-1, descending=True, stable=True))
    return torch.where(s.isneginf(), -1, best).int()


@torch.no_grad()
def _search(q, k, graph, beam, starts):
    """Products with the keys looked at, [B, T, H, n + 1]; -inf for others, and in the last column."""
    (B, T, H, _), (_, HKV, n, _) = q.shape, graph.near.shape
    b, h = torch.arange(B, device=q.device)[:, None, None, None], torch.arange(H, device=q.device)[:, None]
    h = h // (H // HKV)
    s = torch.full((B, T, H, n + 1), -torch.inf, device=q.device)
    done = torch.zeros_like(s, dtype=torch.bool)
    many, new = (x[:, None, :, :starts] for x in graph.count.sort(dim=-1, descending=True, stable=True))
    new = torch.where(many > 0, new, n).repeat_interleave(H // HKV, dim=2).expand(B, T, -1, -1)
    while bool((new < n).any()):
        # [B, T, H, K] x [B, T, H, m, K] -> [B, T, H, m]
        products = torch.einsum("bthk,bthmk->bthm", q.double(), k[b, new.clamp(max=n - 1), h].double())
        s.scatter_(3, new, products.float().masked_fill(new == n, -torch.inf))
        top, best = (x[..., :beam] for x in s.sort(dim=-1, descending=True, stable=True))
        fresh = ~top.isneginf() & ~done.gather(3, best)
        done.scatter_(3, best, fresh | done.gather(3, best))  # what was not looked at stays open
        new = graph.near[b, h, best.clamp(max=n - 1)].long()  # [B, T, H, beam, degree]
        new = new.masked_fill(~fresh[..., None] | (new < 0), n).flatten(3)
        new = new.masked_fill(~s.gather(3, new).isneginf(), n)
    return s


def _always(q, Tk, known, sinks, window):
    """Lists of the sinks and of what no search covers, [B, T, H, n] int32."""
    B, T, H, _ = q.shape
    start = (torch.arange(Tk - T, Tk, device=q.device) - window + 1).clamp(min=0, max=known)[:, None]
    newest = start + torch.arange(Tk - max(min(Tk - window, known), 0), device=q.device)
    first = torch.arange(min(sinks, Tk), device=q.device).expand(T, -1)
    first = first.masked_fill(first >= start, -1)  # those are among the newest
    return torch.cat((first, newest), dim=-1).int()[None, :, None].expand(B, -1, H, -1)


def _check(budget, sinks, window, beam, starts):
    lowest = dict(budget=0, sinks=0, window=1, beam=1, starts=1)
    options = dict(zip(lowest, (budget, sinks, window, beam, starts), strict=True))
    for name, n in options.items():
        if n < lowest[name]:
            raise ValueError(f"{name} is {n}, expected >= {lowest[name]}")
    return options


def _check_graph(graph, k):
    B, Tk, HKV, _ = k.shape
    shape = tuple(graph.near.shape)
    if len(shape) != 4 or shape[:2] != (B, HKV) or shape[2] > Tk or tuple(graph.count.shape) != shape[:3]:
        raise ValueError(
            f"graph has neighbours of shape {shape}, expected [B, HKV, n <= {Tk}, degree] = ({B}, {HKV}, ...)"
        )
    if graph.near.device != k.device:
        raise ValueError(f"graph is on {graph.near.device}, expected {k.device} as k")
