"""ClusterKV: the public operator, its clustering of keys, and its selection of tokens."""

from itertools import pairwise

import torch

from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.engines import decode

NEVER = 2**62
"""A rank behind all others."""


def clusterkv(
    q: torch.Tensor,
    cache: KVCache | None = None,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    budget: int,
    prompt: int,
    every: int = 320,
    sinks: int = 16,
    cluster_size: int = 80,
    iterations: int = 10,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Keys that point alike form clusters, and a new token reads those whose centres answer it best.

    .. math:: \mu_c = \operatorname{mean}_{c(j) = c} k_j, \qquad
        o = \sum_{j \in \mathcal S} \operatorname{softmax}_j(s\, q^\top k_j)\, v_j

    where S are the sinks, the clusters with the largest q mu, one after another until the budget is spent
    (the last is cut), and the tokens that are in no cluster yet. The prompt is clustered at once, and then
    every so many tokens, each span by itself; a token of the prompt reads all before it. Each query head
    chooses for itself. No gradient is defined.

    Args:
        q: queries of the newest token, [B, H, K]; float32 / bfloat16 / float16; float64 with impl="torch".
            With k and v, of the last T of Tk tokens, [B, T, H, K].
        cache: keys and values so far, the newest token's among them; it keeps the clusters. Or
        k, v: keys [B, Tk, HKV, K] and values [B, Tk, HKV, V] of a text, in which every token is read as if it
            had just been written; H is a multiple of HKV.
        budget: clustered tokens that a query may read, >= 0; the others of S come on top.
        prompt: tokens that are read before the first is written, >= 0: the first span, behind the sinks.
        every: tokens in each span after it, >= 1.
        sinks: first tokens, in no cluster and always read, >= 0.
        cluster_size: tokens in a cluster on average, >= 1.
        iterations: rounds of k-means, >= 0.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5. The selection needs none.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1, k and v, T = Tk; each has a prompt of its
            own.
        impl: "auto" or "torch"; "auto" attends by the kernels of decoding on a GPU.

    Returns:
        o, [B, H, V] or [B, T, H, V], dtype of q; with return_lse also lse, [B, H] or [B, T, H], float32
        (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; neither or both of cache and k, v are given.
        TypeError: dtypes differ.
        NotImplementedError: impl="triton"; clusters and their choice have no kernel.

    Cost: a span of n keys, 4 HKV n C K FLOPs a round for its C = n / cluster_size clusters; a token reads
        HKV K numbers a cluster, and H (K + V) a token of S.
    Source: Liu et al. 2024, arXiv:2412.03213, and the released code, whose budget counts the sinks. Differs:
        the first centres are keys at even distances. The first two layers stay dense: that is the caller's.
        The defaults of every and sinks are unverified.
    """
    options = _check(budget, prompt, every, sinks, cluster_size, iterations)
    if impl == "triton":
        raise NotImplementedError("clusterkv's clusters have no kernel; use impl='auto' or impl='torch'")

    def body(q, k, v, _, impl):
        def rest(q):
            edges = _edges(k.shape[1], prompt, every, sinks)
            tokens = _chosen(q, k.shape[1], edges, _made(cache, k, edges, options), budget)
            tokens = torch.cat((tokens, *_exact(q, k.shape[1], edges, sinks)), dim=-1)
            return decode.attend(q, k, v, tokens, scale=scale, impl=impl)

        return decode.after_prompt(rest, q, k, v, prompt, scale=scale, impl=impl)

    o, lse = decode.run(body, None, q, cache, k, v, cu_seqlens, impl)
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    budget: int,
    prompt: int,
    every: int = 320,
    sinks: int = 16,
    cluster_size: int = 80,
    iterations: int = 10,
) -> torch.Tensor:
    """Clustered tokens of each query head, those of the best clusters first.

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K].
        budget, prompt, every, sinks, cluster_size, iterations: as in `clusterkv`.

    Returns:
        Token numbers, [B, T, H, n] int32, n = min(budget, clustered tokens); -1 where a query knows no more.
        A tie in float32 goes to the lower cluster, inside one to the earlier token: the sorts are stable.

    Raises:
        ValueError, TypeError: as `clusterkv`.

    Cost: that of `cluster` for each span, and 2 K FLOPs a query and cluster.
    Source: Liu et al. 2024, arXiv:2412.03213.
    """
    options = _check(budget, prompt, every, sinks, cluster_size, iterations)

    def body(q, k, v, _, impl):
        edges = _edges(k.shape[1], prompt, every, sinks)
        return (_chosen(q, k.shape[1], edges, _made(None, k, edges, options), budget),)

    return decode.run(body, None, q, None, k, k, None, "torch")[0]


@torch.no_grad()
def cluster(
    k: torch.Tensor, *, cluster_size: int = 80, iterations: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""K-means of keys by the cosine: what points alike belongs together, however long it is.

    .. math:: c(j) = \arg\max_c \frac{k_j^\top \mu_c}{\|k_j\| \|\mu_c\|}, \qquad
        \mu_c = \operatorname{mean}_{c(j) = c}\, k_j

    Args:
        k: keys, [B, n, HKV, K], n >= 1.
        cluster_size: keys in a cluster on average; C = ceil(n / cluster_size).
        iterations: rounds of both steps.

    Returns:
        Centres, [B, C, HKV, K] float64, and the cluster of each key, [B, n, HKV] int64. A tie in float32 goes
        to the lower cluster; an empty cluster keeps its centre.

    Cost: 4 n C K FLOPs a round and key head, in products; n C numbers a key head at a time.
    Source: Liu et al. 2024, arXiv:2412.03213.
    """
    n, C = k.shape[1], -(-k.shape[1] // cluster_size)
    k = k.double()
    centres, unit = k[:, (2 * torch.arange(C, device=k.device) + 1) * n // (2 * C)], _direction(k)
    for i in range(iterations + 1):
        own = torch.einsum("bjhk,bchk->bjhc", unit, _direction(centres)).float().argmax(-1)
        if i < iterations:
            member = (own[..., None] == torch.arange(C, device=k.device)).double()
            count = member.sum(1).transpose(1, 2)[..., None]  # [B, C, HKV, 1]
            total = torch.einsum("bjhc,bjhk->bchk", member, k)
            centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return centres, own


def _direction(x):
    length = x.square().sum(-1, keepdim=True).sqrt()
    return x / torch.where(length > 0, length, 1.0)


def _edges(Tk, prompt, every, sinks):
    """Where spans begin and end; a query knows those that end up to its own position."""
    return [sinks] * (prompt > sinks) + list(range(max(prompt, sinks), Tk, every))


def _made(cache, k, edges, options):
    """Centres and clusters of each span, of a cache kept in it."""

    def function(keys):
        return cluster(keys, **dict(options))

    if cache is None:
        return [function(k[:, a:b]) for a, b in pairwise(edges)]
    return cache.spans(f"clusters {options}", edges, function)


def _chosen(q, Tk, edges, made, budget):
    """Tokens of the best clusters, [B, T, H, n] int32."""
    (B, T, H, _), ends = q.shape, edges[1:]
    if not ends or not T:
        return torch.zeros((B, T, H, 0), dtype=torch.int32, device=q.device)
    sizes = [centres.shape[1] for centres, _ in made]
    centres = torch.cat([x for x, _ in made], dim=1)
    own = torch.cat([x + sum(sizes[:i]) for i, (_, x) in enumerate(made)], dim=1)
    G = H // own.shape[2]
    own = own.repeat_interleave(G, dim=2).transpose(1, 2)[:, None]  # [B, 1, H, n]
    end = torch.tensor([b for b, n in zip(ends, sizes, strict=True) for _ in range(n)], device=q.device)
    chosen, t = [], torch.arange(Tk - T, Tk, device=q.device)[:, None, None]
    for tile in (slice(i, i + decode.QUERY_TILE) for i in range(0, T, decode.QUERY_TILE)):
        # [B, T, HKV, G, K] x [B, C, HKV, K] -> [B, T, H, C]
        s = torch.einsum("bthgk,bchk->bthgc", q[:, tile].unflatten(2, (-1, G)).double(), centres).flatten(
            2, 3
        )
        known = end <= t[tile]
        order = s.float().masked_fill(~known, -torch.inf).sort(dim=-1, descending=True, stable=True)[1]
        rank = order.argsort(dim=-1).masked_fill(~known, NEVER)
        rank = rank.gather(3, own.expand(-1, s.shape[1], -1, -1))  # of each token's cluster
        rank, best = rank.sort(dim=-1, stable=True)
        chosen.append(torch.where(rank < NEVER, best + edges[0], -1)[..., :budget].to(torch.int32))
    return torch.cat(chosen, dim=1)


def _exact(q, Tk, edges, sinks):
    """Lists of the sinks, and of the tokens since the newest span that a query knows: [B, T, H, n] int32."""
    (B, T, H, _), ends = q.shape, [0, *edges[1:]]
    # the longest stretch between two edges that a query lies in
    room = max([0] + [b - a for a, b in pairwise([*ends, Tk]) if b > Tk - T])
    t, ends = torch.arange(Tk - T, Tk, device=q.device), torch.tensor(ends, device=q.device)
    last = ends[torch.searchsorted(ends, t, right=True) - 1].to(torch.int32)[:, None]
    pending = last + torch.arange(room, device=q.device, dtype=torch.int32)
    first = torch.arange(min(sinks, Tk), device=q.device, dtype=torch.int32).expand(T, -1)
    first = first.masked_fill(first >= last, -1)  # those are pending themselves
    return [x[None, :, None].expand(B, -1, H, -1) for x in (first, pending)]


def _check(budget, prompt, every, sinks, cluster_size, iterations):
    """Ranges; what clusters depend on beside keys and edges."""
    lowest = dict(budget=0, prompt=0, every=1, sinks=0, cluster_size=1, iterations=0)
    given = dict(zip(lowest, (budget, prompt, every, sinks, cluster_size, iterations), strict=True))
    for name, n in given.items():
        if n < lowest[name]:
            raise ValueError(f"{name} is {n}, expected >= {lowest[name]}")
    return tuple((name, given[name]) for name in ("cluster_size", "iterations"))
