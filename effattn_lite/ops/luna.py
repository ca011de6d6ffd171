"""Luna: one attention packs the text into M vectors, another unpacks them at every token."""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_heads, check_shape, choose_impl


def luna(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    c: torch.Tensor,
    p: torch.Tensor,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Pack keys and values by M queries of their own, then attend to those; all tokens see all.

    .. math:: O = \operatorname{softmax}(s\, Q (A K)^\top)\, (A V), \qquad
        A = \operatorname{softmax}(D^{-1/2}\, P C^\top)

    Args:
        q: queries, [B, T, H, K], float32, bfloat16, float16 or float64.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        c: what the packing queries look at, [B, T, HKV, D]; H is a multiple of HKV, a pack head serves
            H / HKV heads.
        p: packing queries, [B, M, HKV, D], or [N, M, HKV, D] for packed sequences.
        scale: s, of the second attention; default K ** -0.5.
        return_lse: return lse as well; gradients flow through it.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too; with
            p [1, M, HKV, D] all are packed by the same queries.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], of the M scores of the second
        attention, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: B T M (2 HKV D + H (4 K + 4 V)) FLOPs in products. No state: a new token changes every packed key.
    Source: Ma et al. 2021, arXiv:2106.01540. Differs: keys and values are projected before they are packed;
    packing and projecting commute, so with one pack head this is the authors' code.
    """
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    tokens = (("k", k, "H K"), ("v", v, "H V"), ("c", c, "HKV D"))
    for name, x, axes in tokens:
        check_shape(name, x, f"B T {axes}", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    edges = [0, sizes["T"]] if cu_seqlens is None else cu_seqlens.tolist()
    if cu_seqlens is not None and p.shape[0] == 1:
        p = p.expand(len(edges) - 1, *p.shape[1:])
    sizes["N"] = sizes["B"] if cu_seqlens is None else len(edges) - 1
    check_shape("p", p, "N M HKV D", sizes)
    for name, x in (("k", k), ("v", v), ("c", c), ("p", p)):
        check_alike(name, x, q)
    check_heads(sizes["H"], sizes["HKV"])
    if impl == "triton":
        raise NotImplementedError("luna has no kernel; use impl='torch'")
    choose_impl(impl, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide, dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, c, p = (x.to(wide) for x in (q, k, v, c, p))
        parts = []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            queries = p if cu_seqlens is None else p[n : n + 1]
            parts.append(_attend(*(x[:, first:last] for x in (q, k, v, c)), queries, scale))
        o, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return (o.to(dtype), lse) if return_lse else o.to(dtype)


def weights(p: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    r"""How every packing query spreads over the text, :math:`A = \operatorname{softmax}(D^{-1/2} P C^\top)`.

    Args:
        p: packing queries, [B, M, H, D].
        c: what they look at, [B, T, H, D].

    Returns:
        A, [B, M, H, T]; rows sum to 1.

    Cost: 2 B H M T D FLOPs in products.
    Source: Ma et al. 2021, arXiv:2106.01540.
    """
    return (c.shape[-1] ** -0.5 * torch.einsum("bmhd,bjhd->bmhj", p, c)).softmax(-1)


def _attend(q, k, v, c, p, scale):
    A = weights(p, c).repeat_interleave(q.shape[2] // c.shape[2], dim=2)
    keys = torch.einsum("bmhj,bjhk->bmhk", A, k)
    values = torch.einsum("bmhj,bjhv->bmhv", A, v)
    x = scale * torch.einsum("bthk,bmhk->bthm", q, keys)
    return torch.einsum("bthm,bmhv->bthv", x.softmax(-1), values), x.logsumexp(-1)
