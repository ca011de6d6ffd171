"""Linformer: attention to M learned mixtures of the text's keys and values."""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl


def linformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    e: torch.Tensor,
    f: torch.Tensor,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Project keys and values along the text onto M rows, then attend to those; all tokens see all.

    .. math:: o_t = \sum_m \operatorname{softmax}_m(s\, q_t^\top \bar k_m)\, \bar v_m, \qquad
        \bar k_m = \sum_j E_{jm} k_j, \quad \bar v_m = \sum_j F_{jm} v_j

    Args:
        q: queries, [B, T, H, K], float32, bfloat16, float16 or float64.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        e: projection of the keys, [L, M], of texts of at most L tokens; shorter ones take its first rows.
        f: projection of the values, [L, M].
        scale: s; default K ** -0.5.
        return_lse: return lse as well; gradients flow through it.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too; each
            begins with the first row of e and f.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], of the M scores, float32 (float64
        for float64).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit; the text is longer than L.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: B H T M (4 K + 4 V) FLOPs in products. No state: a new token changes every projected key.
    Source: Wang et al. 2020, arXiv:2006.04768. Differs: the paper writes n for L, k for M and E^T for e.
    """
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    for name, x, axes in (("k", k, "B T H K"), ("v", v, "B T H V"), ("e", e, "L M"), ("f", f, "L M")):
        check_shape(name, x, axes, sizes)
        check_alike(name, x, q)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if impl == "triton":
        raise NotImplementedError("linformer has no kernel; use impl='torch'")
    choose_impl(impl, q)
    edges = [0, sizes["T"]] if cu_seqlens is None else cu_seqlens.tolist()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide, dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, e, f = (x.to(wide) for x in (q, k, v, e, f))
        parts = [
            _attend(*(x[:, a:b] for x in (q, k, v)), e, f, scale)
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        o, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return (o.to(dtype), lse) if return_lse else o.to(dtype)


def _attend(q, k, v, e, f, scale):
    T, rows = q.shape[1], e.shape[0]
    if rows < T:
        raise ValueError(f"e has {rows} rows, expected at least the text's T = {T}")
    keys = torch.einsum("bjhk,jm->bmhk", k, e[:T])
    values = torch.einsum("bjhv,jm->bmhv", v, f[:T])
    x = scale * torch.einsum("bthk,bmhk->bthm", q, keys)
    return torch.einsum("bthm,bmhv->bthv", x.softmax(-1), values), x.logsumexp(-1)
