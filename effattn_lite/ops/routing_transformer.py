"""Routing Transformer: the public operator, the members of its clusters, and how their centroids move."""

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines import softmax_attention

EPSILON = 1e-5
"""Added to the variance of the layer norm."""


def routing_transformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    centroids: torch.Tensor,
    window: int,
    causal: bool = True,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Every cluster calls the w tokens nearest to its centroid together, and they attend to one another.

    .. math:: o_t = \operatorname{mean}_{m:\, t \in \mathcal C_m} \sum_{j \in \mathcal C_m,\, j \le t}
        \operatorname{softmax}_j\bigl(s \operatorname{LN}(q_t)^\top \operatorname{LN}(k_j)\bigr)\, v_j, \qquad
        \mathcal C_m = \operatorname{top}_w\, \mu_m^\top \operatorname{LN}(q_t)

    LN has no scale and no bias, so that all tokens have one length, and the nearest has the largest product.
    A token may be in several clusters, whose outputs are averaged, or in none, and then it gets nothing:
    o = 0. Gradients flow through the attention, none to the centroids.

    When causal, the clusters of the queries choose the keys as well, which fits queries that are the keys
    (pass q twice); else the keys of a cluster are the w nearest of them. Causal says which values a token may
    read: whether it is among the w depends on later tokens.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16, float16 or float64.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        centroids: mu, [H, M, K], any dtype, of one length; `update` moves them.
        window: w >= 1, tokens in a cluster; M = w = sqrt(T) is the cheapest that can hold all tokens.
        causal: see no later token.
        return_lse: return the log of the sum of the denominators of a token's clusters; it has gradients.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1; each has w members in every cluster; read
            on the host.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64). A
        token in no cluster has o = 0 and lse = -inf.

    Raises:
        ValueError: shapes, devices or ranges do not fit.
        TypeError: dtypes differ.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: B H M w^2 (2 K + 2 V) FLOPs in products, half of it when causal, and 2 B H T M K to choose members.
    Source: Roy et al. 2020, arXiv:2003.05997; the mean over clusters is from the authors' code,
        https://github.com/google-research/google-research/tree/master/routing_transformer.
    """
    sizes = _check(q, centroids, window, cu_seqlens)
    for name, x, axes in (("k", k, "B T H K"), ("v", v, "B T H V")):
        common.check_shape(name, x, axes, sizes)
        common.check_alike(name, x, q)
    if impl == "triton":
        raise NotImplementedError("routing_transformer has no kernel; use impl='torch'")
    common.choose_impl(impl, q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide, dtype = torch.promote_types(q.dtype, torch.float32), q.dtype

    def one(q, k, v):
        return _sequence(_norm(q), _norm(k), v, centroids, window, causal, scale)

    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(wide) for x in (q, k, v))
        if q.shape[0] and q.shape[1]:
            o, lse = common.by_sequence(one, cu_seqlens, q, k, v)
        else:
            o, lse = v * (q * k).sum(-1, keepdim=True), (q * k).sum(-1)
    return (o.to(dtype), lse) if return_lse else o.to(dtype)


def members(x: torch.Tensor, *, centroids: torch.Tensor, window: int) -> torch.Tensor:
    r"""Tokens of each cluster: the w that lie nearest to its centroid, as many from every text.

    .. math:: \mathcal C_m = \operatorname{top}_w\, \mu_m^\top \operatorname{LN}(x_t)

    Args:
        x: queries or keys, [B, T, H, K].
        centroids: mu, [H, M, K], any dtype.
        window: w >= 1, tokens in a cluster. A tie in float32 goes to the earlier token: the sort is stable.

    Returns:
        Positions, [B, H, M, min(w, T)], int64, rising.

    Raises:
        ValueError: as `routing_transformer`.

    Cost: 2 B H T M K FLOPs, in float32 or wider, and B H M sorts of T numbers.
    Source: Roy et al. 2020, arXiv:2003.05997.
    """
    _check(x, centroids, window, None)
    with torch.autocast(x.device.type, enabled=False):
        return _members(_norm(x.to(torch.promote_types(x.dtype, torch.float32))), centroids, window)


@torch.no_grad()
def update(centroids: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *, decay: float) -> torch.Tensor:
    r"""Centroids after a step of spherical k-means: a moving average of the tokens nearest to them.

    .. math:: \mu_m \leftarrow \sqrt K\, \frac{\mu'_m}{\lVert \mu'_m \rVert}, \qquad
        \mu'_m = \lambda \mu_m + (1 - \lambda) \operatorname{mean}_{x:\, m(x) = m} \operatorname{LN}(x), \\
        m(x) = \operatorname{argmax}_m\, \mu_m^\top \operatorname{LN}(x)

    Args:
        centroids: mu, [H, M, K]; one that is nearest to no token stays.
        q, k: queries and keys, [B, T, H, K]; the mean is over both, all batch rows and tokens.
        decay: lambda, from 0 to 1.

    Returns:
        The new centroids, [H, M, K], dtype of the old.

    Raises:
        ValueError: shapes do not fit.

    Cost: 8 B H T M K FLOPs.
    Source: Roy et al. 2020, arXiv:2003.05997. Differs: the paper adds the sum of the tokens, which grows with
        the batch; the authors' code divides it by a moving average of their number, and sets no length.
    """
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B T H K", sizes)
    common.check_shape("centroids", centroids, "H M K", sizes)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        old, x = centroids.to(wide), _norm(torch.cat((q, k), dim=1).to(wide))
        nearest = torch.einsum("bthk,hmk->bthm", x, old).float().argmax(-1)
        own = (nearest[..., None] == torch.arange(sizes["M"], device=q.device)).to(wide)  # [B, 2 T, H, M]
        n = own.sum((0, 1))[..., None]
        mean = torch.einsum("bthm,bthk->hmk", own, x) / n.clamp(min=1)
        moved = decay * old + (1 - decay) * mean
        moved = moved * (sizes["K"] / moved.square().sum(-1, keepdim=True)).sqrt()
        return torch.where(n > 0, moved, old).to(centroids.dtype)


def _check(q, centroids, window, cu_seqlens):
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("centroids", centroids, "H M K", sizes)
    common.check_alike("centroids", centroids, q, dtype=False)
    common.check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if window < 1:
        raise ValueError(f"window is {window}, expected >= 1")
    return sizes


def _norm(x):
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


@torch.no_grad()
def _members(x, centroids, window):
    score = torch.einsum("bthk,hmk->bhmt", x, centroids.to(x.dtype))
    # compared in float32, so that rounding of float64 breaks no tie
    best = score.float().sort(dim=-1, descending=True, stable=True)[1]
    return best[..., :window].sort(dim=-1)[0]


def _sequence(q, k, v, centroids, window, causal, scale):
    """o [B, T, H, V] and lse [B, T, H] of one sequence, its queries and keys already normalised."""
    (B, T, H, _), V, M = q.shape, v.shape[3], centroids.shape[1]
    rows = _members(q, centroids, window)
    columns = rows if causal else _members(k, centroids, window)
    # the members stand in the order of the text: a cluster is a short text in a batch of its own
    parts = _gather(q, rows), _gather(k, columns), _gather(v, columns)
    o, lse = softmax_attention.attend(*parts, causal=causal, scale=scale, impl="torch")
    # [B M, w, H, V] -> [B, H, M w, V]
    o, lse = (x.unflatten(0, (B, M)).movedim(3, 1).flatten(2, 3) for x in (o, lse))
    rows = rows.flatten(2)
    n = torch.zeros(B, H, T, dtype=q.dtype, device=q.device).scatter_add(2, rows, torch.ones_like(lse))
    o = q.new_zeros(B, H, T, V).scatter_add(2, rows[..., None].expand(o.shape), o)
    o = o / n.clamp(min=1)[..., None]
    top = q.new_full((B, H, T), -torch.inf).scatter_reduce(2, rows, lse.detach(), "amax")
    l = q.new_zeros(B, H, T).scatter_add(2, rows, (lse - top.gather(2, rows)).exp())
    lse = top + l.masked_fill(n == 0, 1).log()
    return o.transpose(1, 2), lse.transpose(1, 2)


def _gather(x, index):
    """Rows of x [B, T, H, K] at tokens [B, H, M, w], as M batch rows each: [B M, w, H, K]."""
    (B, H, M, w), K = index.shape, x.shape[3]
    x = x.transpose(1, 2).gather(2, index.flatten(2)[..., None].expand(B, H, M * w, K))
    return x.unflatten(2, (M, w)).movedim(1, 3).flatten(0, 1)
