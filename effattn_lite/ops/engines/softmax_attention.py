r"""Online-softmax attention under a pattern: causal or not, a window, sinks, grouped heads, packed sequences.

One operator and its gradient, each computed in eager torch, a block of queries at a time, or by the Triton
kernels of kernels/softmax_attention.py.

A pattern lets the query at position t see key j if `j < sinks` or `lower(t) <= j < upper(t)`, and, when
causal, `j <= t`. The window moves in steps of `grain` tokens: 1 slides, a block size gives block streaming.
"""

from typing import NamedTuple

import torch

from effattn_lite.ops import common

MAX_HEAD = 256
QUERY_BLOCK = 128
"""Queries whose scores the torch implementation holds at a time."""


class Pattern(NamedTuple):
    """Which keys a query sees and how a score is made of a product; the operators' plain arguments."""

    causal: bool
    window: int  # 0: no window
    sinks: int
    grain: int
    softcap: float  # 0: no cap
    scale: float


def lower(t, window: int, grain: int = 1):
    """First position that the window shows to position t; t an integer or a tensor of them."""
    return (t // grain + 1) * grain - window


def upper(t, window: int):
    """First position behind the window of position t, when not causal."""
    return t + window


def keep(x: torch.Tensor, window: int, sinks: int, grain: int = 1) -> torch.Tensor:
    """What of a cache x [B, n, ...] a later token still sees: the sinks, and the window of the next token.

    Whole grains leave, so that what follows the sinks still begins at a multiple of the grain.
    """
    start = lower(x.shape[1], window, grain)
    return x if start <= sinks else torch.cat((x[:, :sinks], x[:, start:]), dim=1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    grain: int = 1,
    sink_logits: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the arguments, choose an implementation, return (o, lse); arguments as in the public op."""
    check(q, k, v, cu_seqlens)
    _check_pattern(q, sink_logits, window, sinks, softcap)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:  # a maximum of scores is the scaled maximum of products only if the scale is >= 0
        q, scale = -q, -scale
    impl = common.choose_impl(impl, q, refusal=_refusal(q, v))
    pattern = Pattern(causal, window or 0, sinks, grain, softcap or 0.0, scale)
    return torch.ops.effattn_lite.softmax_attention(q, k, v, sink_logits, cu_seqlens, *pattern, impl)


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One softmax over disjoint sets of keys, from one over each; parts and result are (o, lse).

    .. math:: o = \sum_i e^{\mathrm{lse}_i - \mathrm{lse}} o_i, \qquad
        \mathrm{lse} = \log \sum_i e^{\mathrm{lse}_i}
    """
    lse = torch.stack([part[1] for part in parts])
    # any finite m will do: a part, or all of them, may have seen nothing
    m = lse.detach().amax(0).nan_to_num(neginf=0.0)
    weight = (lse - m).exp()
    total = weight.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    o = sum(w[..., None] * part[0] for w, part in zip(weight / total, parts, strict=True))
    return o.to(parts[0][0].dtype), (m + total.log()).masked_fill(empty, -torch.inf)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    """Check shapes, heads, devices, dtypes and the edges of packed sequences; raises as `attend` does."""
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B Tk HKV K", sizes)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v has shape {tuple(v.shape)}, expected equal [B, Tk, HKV]"
        )
    common.check_heads(sizes["H"], sizes["HKV"])
    for name, x in (("k", k), ("v", v)):
        common.check_alike(name, x, q)
    if cu_seqlens is not None:
        common.check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
        common.check_alike("cu_seqlens", cu_seqlens, q, dtype=False)
        if sizes["Tk"] != sizes["T"]:
            raise ValueError(
                f"cu_seqlens packs queries and keys alike, but T = {sizes['T']} and Tk = {sizes['Tk']}"
            )


def _check_pattern(q, sink_logits, window, sinks, softcap):
    if sink_logits is not None:
        common.check_shape("sink_logits", sink_logits, "H", {"H": q.shape[2]})
        common.check_alike("sink_logits", sink_logits, q, dtype=False)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected None or >= 1: it counts the token itself")
    if sinks < 0:
        raise ValueError(f"sinks is {sinks}, expected >= 0")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}, expected None or > 0")


def _refusal(q, v):
    if max(q.shape[3], v.shape[3]) > MAX_HEAD:
        return f"K <= {MAX_HEAD} and V <= {MAX_HEAD}, got {q.shape[3]} and {v.shape[3]}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        if q.dtype == torch.bfloat16:
            return "a GPU of compute capability 8.0 or later for bfloat16"
        if q.dtype == torch.float32 and max(q.shape[3], v.shape[3]) > 128:
            return "K <= 128 and V <= 128 for float32 on a GPU older than compute capability 8.0"
    return None


def _forward(q, k, v, sink_logits, cu_seqlens, causal, window, sinks, grain, softcap, scale, impl):
    pattern = Pattern(causal, window, sinks, grain, softcap, scale)
    if impl == "triton":
        from effattn_lite.kernels import softmax_attention as kernels

        return kernels.forward(q, k, v, sink_logits, cu_seqlens, pattern)
    o, lse = _empty_outputs(q, v)
    for part in _sequences(cu_seqlens):
        _forward_torch(q[:, part], k[:, part], v[:, part], sink_logits, pattern, o[:, part], lse[:, part])
    return o, lse


def _backward(
    do, dlse, q, k, v, o, lse, sink_logits, cu_seqlens, causal, window, sinks, grain, softcap, scale, impl
):
    pattern = Pattern(causal, window, sinks, grain, softcap, scale)
    if impl == "triton":
        from effattn_lite.kernels import softmax_attention as kernels

        dq, dk, dv, delta = kernels.backward(do, dlse, q, k, v, o, lse, cu_seqlens, pattern)
    else:
        wide = lse.dtype
        delta = (do.to(wide) * o.to(wide)).sum(-1)  # [B, T, H]
        delta = delta if dlse is None else delta - dlse
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        for p in _sequences(cu_seqlens):
            grads = dq[:, p], dk[:, p], dv[:, p]
            _backward_torch(do[:, p], delta[:, p], q[:, p], k[:, p], v[:, p], lse[:, p], pattern, grads)
        dq, dk, dv = (g.to(x.dtype) for g, x in ((dq, q), (dk, k), (dv, v)))
    if sink_logits is None:
        return dq, dk, dv, q.new_empty(0)
    # a learned sink is a key whose value is 0: its weight is all that it adds to the row
    weight = (sink_logits.to(lse.dtype) - lse.nan_to_num(neginf=torch.inf)).exp()  # [B, T, H]
    return dq, dk, dv, -(weight * delta).sum((0, 1)).to(sink_logits.dtype)


def _sequences(cu_seqlens):
    """Slices of the token axis, one a packed sequence; all of it when nothing is packed."""
    if cu_seqlens is None:
        return [slice(None)]
    edges = cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def _tiles(T, Tk, pattern, device):
    """Blocks of queries, each with the keys any of them sees: (rows, keys, [rows, keys] of bool)."""
    for i in range(0, T, QUERY_BLOCK):
        rows = slice(i, min(i + QUERY_BLOCK, T))
        t = torch.arange(rows.start, rows.stop, device=device)[:, None] + (Tk - T)
        first, last = rows.start + Tk - T, rows.stop - 1 + Tk - T
        start, end = 0, last + 1 if pattern.causal else Tk
        if pattern.window:
            start = max(lower(first, pattern.window, pattern.grain), 0)
            end = min(end, max(upper(last, pattern.window), pattern.sinks))
        end = max(min(end, Tk), 0)
        start = min(start, end)
        j = torch.arange(end, device=device)
        j = torch.cat((j[: min(pattern.sinks, start)], j[start:]))
        see = torch.ones(t.shape[0], j.shape[0], dtype=torch.bool, device=device)
        if pattern.window:
            see = (j >= lower(t, pattern.window, pattern.grain)) & (j < upper(t, pattern.window))
            see = see | (j < pattern.sinks)
        yield rows, j, see & (j <= t) if pattern.causal else see


def _scores(q, k, see, pattern):
    """Scores of query heads (key head, group) on gathered keys, [B, HKV, G, rows, keys]; unseen ones -inf."""
    # [B, rows, HKV, G, K] x [B, keys, HKV, K] -> [B, HKV, G, rows, keys]
    s = torch.einsum("bthgk,bjhk->bhgtj", q, k) * pattern.scale
    if pattern.softcap:
        s = pattern.softcap * torch.tanh(s / pattern.softcap)
    return s.masked_fill(~see, -torch.inf)


def _forward_torch(q, k, v, sink_logits, pattern, o, lse):
    """Fill o [B, T, H, V] and lse [B, T, H] of one sequence."""
    HKV, wide = k.shape[2], lse.dtype
    q, k, v = q.unflatten(2, (HKV, q.shape[2] // HKV)).to(wide), k.to(wide), v.to(wide)
    for rows, j, see in _tiles(q.shape[1], k.shape[1], pattern, q.device):
        s = _scores(q[:, rows], k[:, j], see, pattern)
        total = torch.logsumexp(s, -1, keepdim=True)  # [B, HKV, G, rows, 1]
        if sink_logits is not None:
            total = torch.logaddexp(total, sink_logits.to(wide).view(HKV, -1, 1, 1))
        p = (s - total.nan_to_num(neginf=0.0)).exp()  # a row that sees nothing: exp(-inf - 0) = 0
        # [B, HKV, G, rows, keys] x [B, keys, HKV, V] -> [B, rows, HKV, G, V]
        o[:, rows] = torch.einsum("bhgtj,bjhv->bthgv", p, v[:, j]).flatten(2, 3)
        lse[:, rows] = total.flatten(1, 2).squeeze(-1).transpose(1, 2)


def _backward_torch(do, delta, q, k, v, lse, pattern, grads):
    """Add one sequence's gradients into grads = dq, dk, dv, with the weights computed again from lse."""
    (dq, dk, dv), HKV, wide = grads, k.shape[2], lse.dtype
    k, v = k.to(wide), v.to(wide)
    q, do, delta, lse = (x.unflatten(2, (HKV, x.shape[2] // HKV)).to(wide) for x in (q, do, delta, lse))
    for rows, j, see in _tiles(q.shape[1], k.shape[1], pattern, q.device):
        s = _scores(q[:, rows], k[:, j], see, pattern)
        p = (s - _row(lse[:, rows]).nan_to_num(neginf=0.0)).exp()
        # [B, rows, HKV, G, V] x [B, keys, HKV, V] -> [B, HKV, G, rows, keys]
        dp = torch.einsum("bthgv,bjhv->bhgtj", do[:, rows], v[:, j])
        ds = pattern.scale * p * (dp - _row(delta[:, rows]))
        if pattern.softcap:
            ds = ds * (1 - (s.masked_fill(~see, 0.0) / pattern.softcap).square())
        # [B, HKV, G, rows, keys] x [B, keys, HKV, K] -> [B, rows, HKV, G, K]
        dq[:, rows] = torch.einsum("bhgtj,bjhk->bthgk", ds, k[:, j]).flatten(2, 3)
        # [B, HKV, G, rows, keys] x [B, rows, HKV, G, K] -> [B, keys, HKV, K]; a key head serves G query heads
        dk.index_add_(1, j, torch.einsum("bhgtj,bthgk->bjhk", ds, q[:, rows]))
        dv.index_add_(1, j, torch.einsum("bhgtj,bthgv->bjhv", p, do[:, rows]))


def _row(x):
    """[B, rows, HKV, G] -> [B, HKV, G, rows, 1]."""
    return x.permute(0, 2, 3, 1)[..., None]


def _empty_outputs(q, v):
    """o [B, T, H, V], and lse [B, T, H] with the tokens of a head side by side in memory."""
    (B, T, H, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    return o, torch.empty((B, H, T), dtype=wide, device=q.device).transpose(1, 2)


def _forward_fake(q, k, v, *_):
    return _empty_outputs(q, v)


def _backward_fake(do, dlse, q, k, v, o, lse, sink_logits, *_):
    dsink = q.new_empty(0) if sink_logits is None else torch.empty_like(sink_logits)
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), dsink


def _save(ctx, inputs, output):
    q, k, v, sink_logits, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, sink_logits, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, dlse):
    q, k, v, o, lse, sink_logits, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = torch.ops.effattn_lite.softmax_attention_backward(
        do, dlse, q, k, v, o, lse, sink_logits, cu_seqlens, *ctx.options
    )
    dsink = None if sink_logits is None else grads[3]
    return *grads[:3], dsink, *(None for _ in range(1 + len(ctx.options)))


_OPTIONS = "bool causal, int window, int sinks, int grain, float softcap, float scale, str impl"
_FORWARD = (
    f"(Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? cu_seqlens, {_OPTIONS}) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? sink_logits, "
    f"Tensor? cu_seqlens, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
common.register("softmax_attention", _FORWARD, _forward, _forward_fake)
common.register("softmax_attention_backward", _BACKWARD, _backward, _backward_fake)
torch.library.register_autograd("effattn_lite::softmax_attention", _gradient, setup_context=_save)
