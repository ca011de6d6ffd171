"""NSA: the public operator, its summaries and its selection of blocks."""

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines import nsa as engine
from effattn_lite.ops.engines import softmax_attention, token_sparse


def nsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g_cmp: torch.Tensor,
    g_slc: torch.Tensor,
    g_win: torch.Tensor,
    block_size: int = 64,
    top_n: int = 16,
    window: int = 512,
    cmp_size: int = 64,
    cmp_stride: int = 64,
    k_cmp: torch.Tensor | None = None,
    v_cmp: torch.Tensor | None = None,
    k_win: torch.Tensor | None = None,
    v_win: torch.Tensor | None = None,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Three readers of one text: one skims summaries, one rereads blocks they point at, one looks around.

    .. math:: o_t = g^{\mathrm{cmp}}_t\, o^{\mathrm{cmp}}_t + g^{\mathrm{slc}}_t\, o^{\mathrm{slc}}_t
        + g^{\mathrm{win}}_t\, o^{\mathrm{win}}_t

    Each o is softmax attention: to summaries of whole spans, to the blocks of `select`, to the last W tokens.
    Gradients flow through all three, none through the selection.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch". The queries are the
            last T of Tk tokens, as decoding needs it.
        k: keys of the selected branch, [B, Tk, HKV, K]; H is a multiple of HKV, of any ratio.
        v: values of the selected branch, [B, Tk, HKV, V].
        g_cmp: gate of the summaries, [B, T, H], any number, usually in [0, 1].
        g_slc: gate of the selected blocks.
        g_win: gate of the window.
        block_size: B_S, tokens in a selected block, a multiple of cmp_stride.
        top_n: blocks of a query, >= 3: the first, its own and the one before it are always among them.
        window: W >= 1, tokens that the near branch sees, the own included.
        cmp_size: l, tokens in a span, a multiple of cmp_stride.
        cmp_stride: d, tokens from the beginning of a span to that of the next; 32/16 in the paper.
        k_cmp: summaries of keys, [B, NC, HKV, K], NC = (Tk - l) // d + 1; default the means of k.
        v_cmp: summaries of values, [B, NC, HKV, V]; default the means of v.
        k_win: keys of the near branch, [B, Tw, HKV, K], those of the last Tw tokens: all, or at least
            T + W - 1; default k.
        v_win: values of the near branch, [B, Tw, HKV, V]; default v.
        return_lse: return the log-sum-exp of the selected branch as well; gradients flow through it.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk. Spans and blocks are counted in
            each; given summaries stand one sequence after another, and further rows are ignored.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).
        A query before the end of the first span has no summary: that branch adds 0.

    Raises:
        ValueError: shapes, devices or ranges do not fit; cu_seqlens does not rise from 0 to T.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: B H T n (2 K + 2 V) FLOPs in products, n <= t / d + top_n B_S + W keys for query t, and 2 K t / d
        for the selection, which computes the scores of spans again; the gradient 2.5 times the first. The
        kernels keep a byte a token, key head and block, and 4 more for the gradient.
    Source: Yuan et al. 2025, arXiv:2502.11089. Differs: means where the paper learns an MLP, which is the
        layer's; the sum over spans counts from 0.
    """
    sizes, spans = _check(q, k, block_size, top_n, cmp_size, cmp_stride, cu_seqlens, scale)
    common.check_shape("v", v, "B Tk HKV V", sizes, like="k")
    common.check_alike("v", v, q)
    if window < 1:
        raise ValueError(f"window is {window}, expected >= 1: it counts the token itself")
    for name, x in (("g_cmp", g_cmp), ("g_slc", g_slc), ("g_win", g_win)):
        common.check_shape(name, x, "B T H", sizes)
        common.check_alike(name, x, q, dtype=False)
    k_win, v_win = k if k_win is None else k_win, v if v_win is None else v_win
    for name, x, axes in (("k_win", k_win, "B Tw HKV K"), ("v_win", v_win, "B Tw HKV V")):
        common.check_shape(name, x, axes, sizes, like="k and v")
        common.check_alike(name, x, q)
    if sizes["Tw"] != sizes["Tk"] and not sizes["T"] + window - 1 <= sizes["Tw"] < sizes["Tk"]:
        least = min(sizes["T"] + window - 1, sizes["Tk"])
        raise ValueError(f"k_win has {sizes['Tw']} tokens, expected {least} to Tk = {sizes['Tk']}")
    k_cmp = _summaries("k_cmp", k, k_cmp, "B NC HKV K", sizes, spans, cu_seqlens)
    v_cmp = _summaries("v_cmp", v, v_cmp, "B NC HKV V", sizes, spans, cu_seqlens)
    how = dict(cu_seqlens=cu_seqlens, impl=impl)
    q = -q if spans.scale < 0 else q
    spans = spans._replace(scale=abs(spans.scale))
    o_cmp, lse_cmp = engine.skim(q, k_cmp, v_cmp, spans, **how)
    blocks = engine.point(q, k_cmp, lse_cmp, spans, block_size=block_size, top_n=top_n, **how)
    o_slc, lse = token_sparse.attend(
        q, k, v, block_indices=blocks, block_size=block_size, scale=spans.scale, **how
    )
    o_win, _ = softmax_attention.attend(q, k_win, v_win, window=window, scale=spans.scale, **how)
    o = sum(g[..., None] * x.to(lse.dtype) for g, x in ((g_cmp, o_cmp), (g_slc, o_slc), (g_win, o_win)))
    return (o.to(q.dtype), lse) if return_lse else o.to(q.dtype)


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int = 64,
    top_n: int = 16,
    cmp_size: int = 64,
    cmp_stride: int = 64,
    k_cmp: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    r"""Blocks that the query heads of a key head read: the first, the last two, and those summaries point at.

    .. math:: p^{\mathrm{slc}}[j] = \sum_{m=0}^{a-1} \sum_{n=0}^{c-1} p^{\mathrm{cmp}}[a j + m - n], \qquad
        a = B_S / d, \quad c = l / d

    A span counts for a block with the number of strides that they share; heads of a group are added up.

    Args:
        q, k, block_size, top_n, cmp_size, cmp_stride, k_cmp, scale, cu_seqlens, impl: as in `nsa`.

    Returns:
        Block numbers, [B, T, HKV, min(top_n, ceil(Tk / B_S))], int32, in any order; -1 where there are no
        more. A tie in float32 goes to the lower block.

    Raises:
        ValueError, TypeError, NotImplementedError: as `nsa`.

    Cost: B H T NC (2 K + 4) FLOPs for lse, and again for the weights; the kernels keep no more than top_n
        weights a query.
    Source: Yuan et al. 2025, arXiv:2502.11089, with tokens counted from 0.
    """
    sizes, spans = _check(q, k, block_size, top_n, cmp_size, cmp_stride, cu_seqlens, scale)
    k_cmp = _summaries("k_cmp", k, k_cmp, "B NC HKV K", sizes, spans, cu_seqlens)
    q = -q if spans.scale < 0 else q
    spans, how = spans._replace(scale=abs(spans.scale)), dict(cu_seqlens=cu_seqlens, impl=impl)
    _, lse = engine.skim(q.detach(), k_cmp.detach(), k_cmp.detach(), spans, **how)
    return engine.point(q, k_cmp, lse, spans, block_size=block_size, top_n=top_n, **how)


def compress(
    x: torch.Tensor, *, cmp_size: int = 64, cmp_stride: int = 64, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Means of whole spans of l tokens that begin every d tokens.

    Args:
        x: keys or values, [B, T, HKV, K].
        cmp_size: l.
        cmp_stride: d.
        cu_seqlens: edges of packed sequences, [N + 1]; no span crosses one.

    Returns:
        [B, NC, HKV, K], NC = (T - l) // d + 1; packed, T // d rows, of which the last may mean nothing.

    Cost: B NC HKV K l FLOPs, in float32.
    Source: Yuan et al. 2025, arXiv:2502.11089, with the mean for their MLP.
    """
    return windows(x, cmp_size, cmp_stride, cu_seqlens).mean(2, dtype=_wide(x)).to(x.dtype)


def windows(x: torch.Tensor, size: int, stride: int, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Spans of x [B, T, HKV, K], laid out as `compress` says, [B, NC, l, HKV, K]."""
    T, x = x.shape[1], x.contiguous()  # so that a sum does not depend on strides
    if cu_seqlens is None:
        if T < size:
            return x.new_empty((x.shape[0], 0, size, *x.shape[2:]))
        return x.unfold(1, size, stride).movedim(-1, 2)
    edges = cu_seqlens.long()
    counts = engine.count(edges.diff(), size, stride)
    ends = counts.cumsum(0)
    i = torch.arange(T // stride, device=x.device)
    n = torch.searchsorted(ends, i, right=True).clamp(max=counts.numel() - 1)
    start = torch.where(i < ends[-1], edges[n] + (i - (ends - counts)[n]) * stride, 0)
    j = start[:, None] + torch.arange(size, device=x.device)
    return x[:, j.clamp(max=max(T - 1, 0))]


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _check(q, k, block_size, top_n, size, stride, cu_seqlens, scale):
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B Tk HKV K", sizes)
    common.check_heads(sizes["H"], sizes["HKV"])
    common.check_alike("k", k, q)
    token_sparse.check_tokens(q, k, cu_seqlens)
    if top_n < 3:
        raise ValueError(f"top_n is {top_n}, expected >= 3: the first and the last two blocks are in it")
    if stride < 1:
        raise ValueError(f"cmp_stride is {stride}, expected >= 1")
    for name, n in (("block_size", block_size), ("cmp_size", size)):
        if n < 1 or n % stride:
            raise ValueError(f"{name} is {n}, expected a multiple of cmp_stride = {stride}")
    scale = sizes["K"] ** -0.5 if scale is None else scale
    return sizes, engine.Spans(size, stride, sizes["Tk"], scale)


def _summaries(name, x, given, axes, sizes, spans, cu_seqlens):
    """Given summaries, checked, or the means of x."""
    if given is None:
        return compress(x, cmp_size=spans.size, cmp_stride=spans.stride, cu_seqlens=cu_seqlens)
    common.check_shape(name, given, axes, {n: s for n, s in sizes.items() if n != "NC"}, like="q, k and v")
    common.check_alike(name, given, x, like="k")
    found, needed = given.shape[1], engine.count(sizes["Tk"], spans.size, spans.stride)
    if cu_seqlens is None and found != needed:
        raise ValueError(f"{name} has {found} spans, expected (Tk - cmp_size) // cmp_stride + 1 = {needed}")
    if cu_seqlens is not None and not (cu_seqlens.is_cuda or torch.compiler.is_compiling()):
        needed = int(engine.count(cu_seqlens.diff(), spans.size, spans.stride).sum())
        if found < needed:
            raise ValueError(f"{name} has {found} spans, expected at least {needed} for these sequences")
    return given
