"""Longformer: the public operator, a window of the softmax kernels with global rows and columns around it."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import pad

from effattn_lite.ops import common
from effattn_lite.ops.engines.softmax_attention import attend


def longformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_global: torch.Tensor | None = None,
    k_global: torch.Tensor | None = None,
    v_global: torch.Tensor | None = None,
    window: int,
    dilation: int | Sequence[int] = 1,
    global_tokens: Sequence[int] | torch.Tensor = (0,),
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Every token sees a window around it; a few global tokens see all, and are seen by all.

    .. math:: \mathcal S_h(t) = \{j : |t - j| \le \tfrac w2 r_h,\ r_h \mid t - j\} \cup \mathcal G, \qquad
        o_t = \sum_{j \in \mathcal S_h(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j

    .. math:: o_t = \sum_j \operatorname{softmax}_j(s\, \bar q_t^\top \bar k_j)\, \bar v_j
        \quad\text{for } t \in \mathcal G

    Global tokens ask with projections of their own, a bar; towards the others they are keys like any. The
    window is the work of a kernel; global keys outside of it join its softmax by their scores.

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        q_global: queries of the second projections, [B, T, H, K]; only rows of global tokens are read.
            Default q.
        k_global: keys that global tokens see, [B, T, HKV, K]; default k.
        v_global: values that global tokens see, [B, T, HKV, V]; default v.
        window: w, even, >= 2; w / 2 tokens on each side are seen, and the token itself.
        dilation: r >= 1, distance between the seen tokens of a window; one number, or one for each head.
        global_tokens: positions, counted in each sequence, the same in every batch row, those that do not
            exist left out; or which tokens are global, [B, T], bool: to count them waits for the device.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1; each is run by itself.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V]; with return_lse also lse, [B, T, H].

    Raises:
        ValueError: shapes do not fit, window is odd or < 2, a dilation < 1, not as many as heads, or global
            positions that are negative or come twice.
        TypeError, NotImplementedError: as `softmax_attention`.

    Cost: B H T (w + 2 n) (2 K + 2 V) FLOPs in products, n global tokens. Positions 0, ..., n - 1 without
        dilation are one launch for all columns; otherwise scores of all columns stand in memory, 4 B H T n
        bytes.
    Source: Beltagy et al. 2020, arXiv:2004.05150; the paper writes d for r; code
        https://github.com/allenai/longformer. Differs: texts of unlike lengths are packed, not
        filled up and masked.
    """
    second = tuple(own if x is None else x for x, own in ((q_global, q), (k_global, k), (v_global, v)))
    dilation = _check(q, k, v, second, window, dilation, global_tokens, cu_seqlens)
    masked = isinstance(global_tokens, torch.Tensor)
    run = partial(attend, scale=scale, impl=impl)
    one = partial(
        _sequence,
        global_tokens=() if masked else tuple(global_tokens),
        window=window,
        dilation=dilation,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        run=run,
    )
    if q.shape[1]:
        mask = (global_tokens,) if masked else ()
        o, lse = common.by_sequence(one, cu_seqlens, q, k, v, *second, *mask)
    else:
        o, lse = run(q, k, v)
    return (o, lse) if return_lse else o


def _check(q, k, v, second, window, dilation, global_tokens, cu_seqlens):
    """Check every argument; returns the dilations of all heads."""
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B T HKV K", sizes)
    common.check_shape("v", v, "B T HKV V", sizes, like="k")
    common.check_heads(sizes["H"], sizes["HKV"])
    for name, x, axes in zip("qkv", second, ("B T H K", "B T HKV K", "B T HKV V"), strict=True):
        common.check_shape(f"{name}_global", x, axes, sizes, like=name)
    names = ("k", "v", "q_global", "k_global", "v_global")
    for name, x in zip(names, (k, v, *second), strict=True):
        common.check_alike(name, x, q)
    if cu_seqlens is not None:
        common.check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
        common.check_alike("cu_seqlens", cu_seqlens, q, dtype=False)
    if window < 2 or window % 2:
        raise ValueError(f"window is {window}, expected an even number >= 2: half of it lies on each side")
    dilations = (dilation,) * sizes["H"] if isinstance(dilation, int) else tuple(dilation)
    if len(dilations) != sizes["H"] or min(dilations, default=1) < 1:
        raise ValueError(f"dilation is {dilation}, expected one number >= 1, or {sizes['H']}, as q has heads")
    _check_tokens(global_tokens, q, sizes)
    return dilations


def _check_tokens(global_tokens, q, sizes):
    if isinstance(global_tokens, torch.Tensor):
        common.check_shape("global_tokens", global_tokens, "B T", sizes)
        common.check_alike("global_tokens", global_tokens, q, dtype=False)
        if global_tokens.dtype != torch.bool:
            raise TypeError(f"global_tokens is {global_tokens.dtype}, expected bool, or a tuple of positions")
    elif len({*global_tokens}) != len(global_tokens) or min(global_tokens, default=0) < 0:
        raise ValueError(f"global_tokens is {tuple(global_tokens)}, expected distinct positions >= 0")


def _sequence(
    q, k, v, q_global, k_global, v_global, mask=None, *, global_tokens, window, dilation, scale, run
):
    """One sequence: windows, then the columns of global tokens, then their rows."""
    index, valid = _positions(q, mask, global_tokens)
    n = index.shape[1]
    # the kernels know keys at the start that every query sees
    sinks = n if {*dilation} <= {1} and mask is None and sorted(global_tokens)[:n] == [*range(n)] else 0
    o, lse = _windows(q, k, v, window, dilation, partial(run, causal=False, sinks=sinks))
    if not n:
        return o, lse
    if not sinks:
        far = _far(index, valid, window, dilation, q.shape[1])
        o, lse = _join(o, lse, q, _rows(k, index), _rows(v, index), far, scale)
    rows, total = run(_rows(q_global, index), k_global, v_global, causal=False)
    if mask is not None:
        rows = torch.where(valid[..., None, None], rows, _rows(o, index))
        total = torch.where(valid[..., None], total, _rows(lse[..., None], index)[..., 0])
    at = index[..., None].expand_as(total)
    return o.scatter(1, at[..., None].expand_as(rows), rows), lse.scatter(1, at, total)


def _positions(q, mask, global_tokens):
    """Global positions of each batch row, [B, n], distinct, and which of them count, [B, n]."""
    B, T = q.shape[:2]
    if mask is None:
        index = torch.tensor([t for t in global_tokens if t < T], dtype=torch.int64, device=q.device)
        index = index.expand(B, len(index))
        return index, torch.ones_like(index, dtype=torch.bool)
    # rows have as many as the one with the most; those to spare are tokens that are not global
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    n = int(mask.sum(1).max()) if B else 0
    return order[:, :n], mask.gather(1, order)[:, :n]


def _rows(x, index):
    """Of x [B, T, H, K] the tokens index [B, n], [B, n, H, K]."""
    return torch.take_along_dim(x, index[..., None, None], dim=1)


def _windows(q, k, v, window, dilation, run):
    """Attention to the windows: a residue class mod r is a sequence of its own, with a window of w."""
    if len({*dilation}) == 1:
        return _classes(q, k, v, dilation[0], partial(run, window=window // 2 + 1))
    G = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, dim=2) for x in (k, v))
    kinds = [(r, [h for h, own in enumerate(dilation) if own == r]) for r in sorted({*dilation})]
    parts = [_windows(*(x[:, :, h] for x in (q, k, v)), window, [r], run) for r, h in kinds]
    back = torch.tensor([h for _, heads in kinds for h in heads], device=q.device).argsort()
    return tuple(torch.cat(x, dim=2)[:, :, back] for x in zip(*parts, strict=True))


def _classes(q, k, v, r, run):
    """Attention in each residue class mod r: in [B, T / r, r H, K] the classes are more heads."""
    (T, H), parts = q.shape[1:3], []
    if r == 1:
        return run(q, k, v)
    # the first T mod r classes have a token more
    for n, classes in ((-(-T // r), slice(0, T % r or r)), (T // r, slice(T % r or r, r))):
        if n and classes.start < classes.stop:
            blocks = (pad(x, (0, 0, 0, 0, 0, max(n * r - T, 0)))[:, : n * r] for x in (q, k, v))
            part = run(*(x.unflatten(1, (n, r))[:, :, classes].flatten(2, 3) for x in blocks))
            part = (part[0], part[1][..., None])
            parts.append([pad(x, (0, 0, 0, 0, 0, -(-T // r) - n)).unflatten(2, (-1, H)) for x in part])
    o, lse = (torch.cat(x, dim=2).flatten(1, 2) for x in zip(*parts, strict=True))
    return o[:, :T], lse[:, :T, :, 0]


def _far(index, valid, window, dilation, T):
    """Which global keys lie outside of which windows, [B, T, H, n], or [B, T, 1, n] if heads are alike."""
    away = (torch.arange(T, device=index.device)[:, None] - index[:, None]).abs()[:, :, None]  # [B, T, 1, n]
    alike = len({*dilation}) == 1
    r = torch.tensor(dilation[:1] if alike else dilation, device=index.device)[:, None]
    return ((away > window // 2 * r) | (away % r != 0)) & valid[:, None, None]


def _join(o, lse, q, k, v, see, scale):
    """Let the rows of one softmax see n more keys, [B, n, HKV, K], where `see` [B, T, H, n] says so."""
    HKV, wide, dtype = k.shape[2], lse.dtype, o.dtype
    # [B, T, HKV, G, K] x [B, n, HKV, K] -> [B, T, HKV, G, n]
    s = scale * torch.einsum("bthgk,bjhk->bthgj", q.unflatten(2, (HKV, -1)).to(wide), k.to(wide))
    s = s.flatten(2, 3).masked_fill(~see, -torch.inf)
    # a window holds its own token, so m is finite
    m = torch.maximum(lse, s.amax(-1)).detach()
    near, p = (lse - m).exp(), (s - m[..., None]).exp()
    total = near + p.sum(-1)
    # [B, T, HKV, G, n] x [B, n, HKV, V] -> [B, T, HKV, G, V]
    more = torch.einsum("bthgj,bjhv->bthgv", p.unflatten(2, (HKV, -1)), v.to(wide)).flatten(2, 3)
    return ((near[..., None] * o + more) / total[..., None]).to(dtype), m + total.log()
