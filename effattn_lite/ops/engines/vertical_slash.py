"""Softmax attention over columns and diagonals of the scores: a head sees some keys, and some distances.

In eager torch, some queries at a time, or by the Triton kernel of kernels/vertical_slash.py. Forward only.
"""

import torch

from effattn_lite.ops import common

MAX_HEAD = 256
QUERY_TILE = 128
"""Queries whose scores the torch implementation holds at a time."""


def attend(
    q, k, v, columns, diagonals, *, scale=None, cu_seqlens=None, impl="auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose an implementation and return (o, lse); arguments are checked by the public op.

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, HKV, K].
        v: values, [B, T, HKV, V].
        columns: keys that every later query sees, [B or N, H, nv], integers; others than 0 to T - 1 are none.
        diagonals: distances t - j that every query sees, [B or N, H, ns], likewise.
        scale: of the scores; default K ** -0.5.
        cu_seqlens: edges of N packed sequences, with B = 1; read on the host.
        impl: "torch", "triton" or "auto".

    Raises:
        NotImplementedError: impl="triton" with K or V over 256; any gradient.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:  # a maximum of scores is the scaled maximum of products only if the scale is >= 0
        q, scale = -q, -scale
    impl = common.choose_impl(impl, q, refusal=_refusal(q, v))
    run = torch.ops.effattn_lite.vertical_slash
    if cu_seqlens is None:
        return run(q, k, v, columns, diagonals, scale, impl)
    edges = cu_seqlens.tolist()
    o, lse = zip(
        *(
            run(q[:, a:b], k[:, a:b], v[:, a:b], columns[n : n + 1], diagonals[n : n + 1], scale, impl)
            for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
        ),
        strict=True,
    )
    return torch.cat(o, 1), torch.cat(lse, 1)


def _refusal(q, v):
    width = max(q.shape[3], v.shape[3])
    if width > MAX_HEAD:
        return f"K <= {MAX_HEAD} and V <= {MAX_HEAD}, got {q.shape[3]} and {v.shape[3]}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        if q.dtype == torch.bfloat16:
            return "a GPU of compute capability 8.0 or later for bfloat16"
        if q.dtype == torch.float32 and width > 128:
            return "K <= 128 and V <= 128 for float32 on a GPU older than compute capability 8.0"
    return None


def table(index: torch.Tensor, T: int) -> torch.Tensor:
    """Sets of numbers [B, H, n] as a table of 0 and 1, [B, H, T] of uint8; numbers outside are left out."""
    index = torch.where((index >= 0) & (index < T), index, T).long()
    found = torch.zeros((*index.shape[:2], T + 1), dtype=torch.uint8, device=index.device)
    return found.scatter_(2, index, 1)[..., :T]


def _forward(q, k, v, columns, diagonals, scale, impl):
    T, HKV = q.shape[1], k.shape[2]
    vertical, slash = table(columns, T), table(diagonals, T)
    if impl == "triton":
        from effattn_lite.kernels import vertical_slash as kernels

        return kernels.forward(q, k, v, vertical, slash, scale)
    o, lse = _empty_outputs(q, v)
    wide = lse.dtype
    q, k, v = q.unflatten(2, (HKV, q.shape[2] // HKV)).to(wide), k.to(wide), v.to(wide)
    for a in range(0, T, QUERY_TILE):
        end = min(a + QUERY_TILE, T)
        t = torch.arange(a, end, device=q.device)[:, None]
        delta = t - torch.arange(end, device=q.device)
        see = (vertical[:, :, None, :end] | slash[:, :, delta.clamp(min=0)]).bool() & (delta >= 0)
        # [B, tokens, HKV, G, K] x [B, keys, HKV, K] -> [B, HKV, G, tokens, keys]
        s = torch.einsum("bthgk,bjhk->bhgtj", q[:, a:end], k[:, :end]) * scale
        s = s.masked_fill(~see.unflatten(1, (HKV, -1)), -torch.inf)
        total = torch.logsumexp(s, -1, keepdim=True)
        p = (s - total.nan_to_num(neginf=0.0)).exp()  # a row that sees nothing: exp(-inf - 0) = 0
        # [B, HKV, G, tokens, keys] x [B, keys, HKV, V] -> [B, tokens, HKV, G, V]
        o[:, a:end] = torch.einsum("bhgtj,bjhv->bthgv", p, v[:, :end]).flatten(2, 3).to(o.dtype)
        lse[:, a:end] = total.flatten(1, 2).squeeze(-1).transpose(1, 2)
    return o, lse


def _empty_outputs(q, v):
    """o [B, T, H, V], and lse [B, T, H] with the tokens of a head side by side in memory."""
    (B, T, H, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    return o, torch.empty((B, H, T), dtype=wide, device=q.device).transpose(1, 2)


def _fake(q, k, v, *_):
    return _empty_outputs(q, v)


def _gradient(ctx, *_):
    raise NotImplementedError("attention on columns and diagonals has no gradient")


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor diagonals, float scale, str impl) "
    "-> (Tensor, Tensor)"
)
common.register("vertical_slash", _SCHEMA, _forward, _fake)
torch.library.register_autograd("effattn_lite::vertical_slash", _gradient)
