"""ClusterFormer: the public operator, and its neural clustering."""

from functools import partial

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines import softmax_attention

EPSILON = 1e-6
"""Added to the square of a centroid's length, so that one of zeros is like nothing."""


def clusterformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    x: torch.Tensor,
    centroids: torch.Tensor,
    w: torch.Tensor,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Words are sorted by the cluster that the network puts them in, and attend in blocks of that order.

    .. math:: o_t = \sum_{j:\, 0 \le b_t - b_j \le 1} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j, \qquad
        b_t = \lfloor \operatorname{rank}(t) / n \rfloor, \quad n = \lceil T / M \rceil

    rank is the place after a stable sort by the clusters of `cluster`. A block is as long as a cluster is on
    average, and attends to itself and the block before; the first has none before it and sees the second.
    All words see words behind them: it is for encoders. Gradients flow through the attention; the clustering,
    whose choice is hard, learns by losses of its own (`layers.clusterformer`).

    Args:
        q: queries, [B, T, H, K], float32, bfloat16, float16 or float64.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        x: words, [B, T, D]; all heads share their clusters.
        centroids: C, [B, M, D] or [1, M, D]; with cu_seqlens, [N, M, D] or [1, M, D].
        w: W, [D, D], of the centroids' move.
        return_lse: return the log-sum-exp of each row as well; gradients flow through it.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1, each sorted by itself; read on the host.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes differ.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: 2 B H T n (2 K + 2 V) FLOPs in products, 6 B T M D of the clustering, a sort of T words a text.
    Source: Wang et al. 2022, doi 10.18653/v1/2022.acl-long.170: the sort by clusters learned with the task,
        blocks of queries of T / M words and blocks of keys twice as long. This book's reading: what
        `cluster` says, and that the second half of a block of keys is the block before.
    """
    sizes = _check(x, centroids, w, cu_seqlens)
    for name, tensor, axes in (("q", q, "B T H K"), ("k", k, "B T H K"), ("v", v, "B T H V")):
        common.check_shape(name, tensor, axes, sizes, like="x" if name == "q" else "q")
        common.check_alike(name, tensor, x, like="x")
    if impl == "triton":
        raise NotImplementedError("clusterformer has no kernel; use impl='torch'")
    common.choose_impl(impl, q)
    wide, dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (tensor.to(wide) for tensor in (q, k, v))
        parts = [] if x.shape[0] and x.shape[1] else [(v * q.sum(-1, keepdim=True), q.sum(-1))]
        for span, c in _spans(cu_seqlens, centroids):
            if x[:, span, 0].numel():
                choice = _cluster(x[:, span].detach(), c.detach(), w.detach())[1]
                parts.append(_sequence(q[:, span], k[:, span], v[:, span], choice, sizes["M"], scale))
        o, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return (o.to(dtype), lse) if return_lse else o.to(dtype)


def cluster(
    x: torch.Tensor, *, centroids: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Centroids moved towards the words that are like them, and each word's most similar one.

    .. math:: C' = U X W, \quad U = \operatorname{softmax}_t(D^{-1/2}\, C X^\top), \qquad
        a_t = \operatorname{argmax}_m \cos(x_t, C'_m)

    Args:
        x: words, [B, T, D], T >= 1.
        centroids: C, [B, M, D] or [1, M, D], from the layer before; in the first layer they are random.
        w: W, [D, D].

    Returns:
        C', [B, M, D], float32 (float64 for float64), for the layer behind; it carries gradients to x, C and
        W. And a, [B, T], int64; a tie in float32 goes to the lower cluster.

    Raises:
        ValueError, TypeError: as `clusterformer`.

    Cost: 6 B T M D FLOPs in products, 2 B M D^2 of W.
    Source: Wang et al. 2022, doi 10.18653/v1/2022.acl-long.170: new centroids from normalised similarities to
        the words and a matrix W. This book's reading, since the authors gave no code: that the similarities
        are normalised by a softmax over the words, where W stands, and that the choice is by cosine.
    """
    _check(x, centroids, w, None)
    with torch.autocast(x.device.type, enabled=False):
        return _cluster(x, centroids, w)


def _check(x, centroids, w, cu_seqlens):
    sizes = {}
    common.check_shape("x", x, "B T D", sizes)
    common.check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    n = sizes["B"] if cu_seqlens is None else len(cu_seqlens) - 1
    if centroids.ndim != 3 or centroids.shape[0] not in (1, n) or centroids.shape[2] != sizes["D"]:
        raise ValueError(
            f"centroids has shape {tuple(centroids.shape)}, expected [1 or {n}, M, D = {sizes['D']}] as x"
        )
    if not centroids.shape[1]:
        raise ValueError(f"centroids has shape {tuple(centroids.shape)}, expected M >= 1")
    sizes["M"] = centroids.shape[1]
    common.check_shape("w", w, "D D", sizes, like="x")
    for name, tensor in (("centroids", centroids), ("w", w)):
        common.check_alike(name, tensor, x, dtype=False, like="x")
    return sizes


def _spans(cu_seqlens, centroids):
    """Slices of the token axis, one a sequence, each with its centroids."""
    if cu_seqlens is None:
        return [(slice(None), centroids)]
    edges = cu_seqlens.tolist()
    spans = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    each = centroids.expand(len(spans), *centroids.shape[1:]).split(1)
    return list(zip(spans, each, strict=True))


def _cluster(x, centroids, w):
    wide = torch.promote_types(x.dtype, torch.float32)
    x, centroids, w = (tensor.to(wide) for tensor in (x, centroids, w))
    centroids = centroids.expand(x.shape[0], *centroids.shape[1:])
    u = (torch.einsum("bmd,btd->bmt", centroids, x) / x.shape[2] ** 0.5).softmax(-1)
    moved = torch.einsum("bmt,btd->bmd", u, x) @ w
    # a word's own length changes all its similarities alike
    unit = moved * (moved.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    # compared in float32, so that rounding of float64 breaks no tie; argmax takes the first of equals
    return moved, torch.einsum("btd,bmd->btm", x, unit).float().argmax(-1)


def _sequence(q, k, v, choice, M, scale):
    """o [B, T, H, V] and lse [B, T, H] of one sequence, choice [B, T]."""
    order = choice.sort(dim=1, stable=True)[1]
    parts = _blocks(*(_take(x, order) for x in (q, k, v)), -(-q.shape[1] // M), scale)
    back = order.argsort(dim=1)
    return tuple(_take(x, back) for x in parts)


def _blocks(q, k, v, n, scale):
    """Sorted words in blocks of n, which are batch rows; the last one, if cut short, by itself."""
    B, whole = q.shape[0], q.shape[1] // n
    attend = partial(softmax_attention.attend, causal=False, scale=scale, impl="torch")
    if whole < 2:
        return attend(q, k, v)
    own = torch.arange(whole, device=q.device).clamp(min=1)
    q_blocks, *kv = (x[:, : whole * n].unflatten(1, (whole, n)) for x in (q, k, v))
    kv = (torch.cat((x[:, own - 1], x[:, own]), dim=2) for x in kv)  # [B, whole, 2 n, H, K]
    parts = attend(*(x.flatten(0, 1) for x in (q_blocks, *kv)))
    parts = tuple(x.unflatten(0, (B, whole)).flatten(1, 2) for x in parts)
    if whole * n == q.shape[1]:
        return parts
    last = attend(q[:, whole * n :], *(x[:, (whole - 1) * n :] for x in (k, v)))
    return tuple(torch.cat(x, dim=1) for x in zip(parts, last, strict=True))


def _take(x, index):
    """Rows of x [B, T, ...] at tokens [B, T]."""
    return x.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(x.shape))
