"""Sparse Transformer: the public operator, dense attention on rearranged tokens."""

from functools import partial

import torch
from torch.nn.functional import pad

from effattn_lite.ops.common import by_sequence
from effattn_lite.ops.engines.softmax_attention import attend, check, merge

PATTERNS = ("strided", "fixed")


def sparse_transformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: str = "strided",
    stride: int,
    summary: int = 8,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Half of the heads look around, half far back, so that two layers reach every earlier token.

    Heads 0, 2, 4, ... see A(t), heads 1, 3, 5, ... see B(t):

    .. math:: \text{strided:}\quad A(t) = \{j : t - \ell \le j \le t\}, \qquad
        B(t) = \{j \le t : (t - j) \bmod \ell = 0\}

    .. math:: \text{fixed:}\quad A(t) = \{j \le t : \lfloor j/\ell \rfloor = \lfloor t/\ell \rfloor\}, \qquad
        B(t) = \{j \le t : j \bmod \ell \ge \ell - c\}

    Each set is dense attention on tokens in another order: a window; residue classes mod l, which are heads
    of a view; blocks, which are batch rows of a view; and the gathered columns, a sequence of their own.

    Args:
        q: queries, [B, T, H, K], positions already in them; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV.
        v: values, [B, Tk, HKV, V].
        pattern: "strided", for data with a period as images, or "fixed", for data without as text.
        stride: l >= 1, tokens in a period or a block; near sqrt(Tk) both heads cost the same.
        summary: c, last tokens of each block that all later ones see, 1 to l; only in "fixed".
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk; each is run by itself, its
            blocks and classes counted from its start.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V]; with return_lse also lse, [B, T, H]. In the fixed pattern the first l - c tokens of
        heads B see nothing: o = 0, lse = -inf.

    Raises:
        ValueError: shapes do not fit, an unknown pattern, stride < 1, or summary not from 1 to stride.
        TypeError, NotImplementedError: as `softmax_attention`.

    Cost: in products (2 K + 2 V) FLOPs a pair; a head has T l pairs (strided A), T^2 / (2 l) (strided B),
        T l / 2 (fixed A), c T^2 / (2 l) (fixed B). A decoding step of one token reads only its sets.
    Source: Child et al. 2019, arXiv:1904.10509; code https://github.com/openai/sparse_attention. Differs: the
        code's local heads see l tokens, the own included, one fewer than A(t); its fixed heads see A and B in
        one softmax, each head its own columns.
    """
    _check(q, k, v, pattern, stride, summary, cu_seqlens)
    run = partial(attend, scale=scale, impl=impl)
    if q.shape[1]:
        one = partial(_sequence, pattern=pattern, stride=stride, summary=summary, run=run)
        o, lse = by_sequence(one, cu_seqlens, q, k, v)
    else:
        o, lse = run(q, k, v)
    return (o, lse) if return_lse else o


def _check(q, k, v, pattern, stride, summary, cu_seqlens):
    check(q, k, v, cu_seqlens)
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"q has T = {q.shape[1]} and k has Tk = {k.shape[1]}, expected T <= Tk")
    if pattern not in PATTERNS:
        raise ValueError(f"pattern is {pattern!r}, expected one of {PATTERNS}")
    if stride < 1:
        raise ValueError(f"stride is {stride}, expected >= 1")
    if pattern == "fixed" and not 1 <= summary <= stride:
        raise ValueError(f"summary is {summary}, expected 1 to stride = {stride}")


def _sequence(q, k, v, *, pattern, stride, summary, run):
    """One sequence: its even heads, its odd heads, and both together again."""
    (B, T, H, _), Tk, G = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    if G % 2 and G > 1:  # pairs of heads do not line up with the groups
        k, v = k.repeat_interleave(G, dim=2), v.repeat_interleave(G, dim=2)
    # a stride beyond the last token is one that ends with it, less the columns that never come
    beyond = max(stride - Tk, 0)
    stride, summary = stride - beyond, summary - beyond
    kinds = {
        "strided": (partial(run, window=stride + 1), partial(_classes, stride=stride, run=run)),
        "fixed": (
            partial(_blocks, stride=stride, run=run),
            partial(_columns, stride=stride, summary=summary, run=run),
        ),
    }[pattern]
    o = q.new_zeros(B, T, H, v.shape[3])
    lse = q.new_zeros(B, T, H, dtype=torch.promote_types(q.dtype, torch.float32))
    for kind, attend_kind in enumerate(kinds[:H]):
        heads = slice(kind, None, 2)
        shared = slice(None) if G % 2 == 0 else heads
        parts = q[:, :, heads], k[:, :, shared], v[:, :, shared]
        if T == 1:
            j = _keys_of(Tk - 1, kind, pattern, stride, summary, q.device)
            o[:, :, heads], lse[:, :, heads] = run(parts[0], *(x[:, j] for x in parts[1:]), causal=False)
        else:
            o[:, :, heads], lse[:, :, heads] = attend_kind(*parts)
    return o, lse


def _keys_of(t, kind, pattern, stride, summary, device):
    """The set of the last token alone, so that a decoding step reads no other key."""
    if pattern == "strided":
        return slice(t % stride, None, stride) if kind else slice(max(t - stride, 0), None)
    if not kind:
        return slice(t // stride * stride, None)
    j = torch.arange(t + 1, device=device)
    return j[j % stride >= stride - summary]


def _split(q, k, v, stride):
    """Blocks of l tokens, [B, n, l, H, K], filled up with zeros, and how many rows stand before q."""
    front, back = (k.shape[1] - q.shape[1]) % stride, -k.shape[1] % stride
    q, k, v = pad(q, (0, 0, 0, 0, front, back)), pad(k, (0, 0, 0, 0, 0, back)), pad(v, (0, 0, 0, 0, 0, back))
    return *(x.unflatten(1, (x.shape[1] // stride, stride)) for x in (q, k, v)), front


def _classes(q, k, v, *, stride, run):
    """Causal attention in each residue class mod l: in [B, n, l H, K] the classes are more heads."""
    T, H = q.shape[1:3]
    *blocks, front = _split(q, k, v, stride)
    parts = run(*(x.flatten(2, 3) for x in blocks))
    return tuple(x.unflatten(2, (stride, H)).flatten(1, 2)[:, front : front + T] for x in parts)


def _blocks(q, k, v, *, stride, run):
    """Causal attention in each block of l tokens: in [B n, l, H, K] the blocks are batch rows."""
    B, T = q.shape[:2]
    *blocks, front = _split(q, k, v, stride)
    n = blocks[0].shape[1]
    parts = run(*(x[:, x.shape[1] - n :].flatten(0, 1) for x in blocks))
    return tuple(x.unflatten(0, (B, n)).flatten(1, 2)[:, front : front + T] for x in parts)


def _columns(q, k, v, *, stride, summary, run):
    """The last c tokens of each block, gathered, are a sequence of their own; the others ask it too."""
    (B, T, H, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    if summary < 1:
        return q.new_zeros(B, T, H, v.shape[3]), q.new_full((B, T, H), -torch.inf, dtype=wide)
    q, k, v, front = _split(q, k, v, stride)
    k, v = k[:, :, -summary:], v[:, :, -summary:]
    # a column sees the columns up to itself
    last = run(*(x.flatten(1, 2) for x in (q[:, :, -summary:], k, v)))
    last = tuple(x.unflatten(1, (q.shape[1], summary)) for x in last)
    other = _others(q[:, :, : stride - summary], k, v, run=run)
    parts = (torch.cat(x, dim=2).flatten(1, 2) for x in zip(other, last, strict=True))
    return tuple(x[:, front : front + T] for x in parts)


def _others(q, k, v, *, run):
    """Queries [B, nq, n, H, K] that see all c columns [B, nk, c, HKV, K] of each earlier block.

    Row i of c in block b sees, causally, columns up to i of block b - 1; those behind i are missing. Within
    the block, read backwards, they are what lies strictly before: causal attention again.
    """
    (B, nq, n, H, _), (nk, c), V = q.shape, k.shape[1:3], v.shape[4]
    wide = torch.promote_types(q.dtype, torch.float32)
    o, lse = q.new_zeros(B, nq, n, H, V), q.new_full((B, nq, n, H), -torch.inf, dtype=wide)
    skip = int(nq == nk)  # the first block has none before it
    if not n or nq == skip:
        return o, lse
    # the queries of a block as c rows of M heads each: [B, nq, c, H M, K]
    M = -(-n // c)
    rows = pad(q[:, skip:], (0, 0, 0, 0, 0, M * c - n)).unflatten(2, (M, c))
    rows = rows.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
    before = run(rows.flatten(1, 2), k[:, :-1].flatten(1, 2), v[:, :-1].flatten(1, 2))
    before = tuple(x.unflatten(1, (nq - skip, c)) for x in before)
    if c > 1:
        own = (x[:, -1 - nq + skip : -1] for x in (k, v))
        own = (x.flip(2)[:, :, : c - 1].flatten(0, 1) for x in own)
        behind = run(rows.flip(2)[:, :, 1:].flatten(0, 1), *own)
        behind = (x.unflatten(0, (B, nq - skip)).flip(2) for x in behind)
        both = merge([tuple(x[:, :, : c - 1] for x in before), tuple(behind)])
        before = tuple(torch.cat((x, y[:, :, c - 1 :]), dim=2) for x, y in zip(both, before, strict=True))
    # [B, nq, c, H M, ...] -> [B, nq, n, H, ...]
    found = (x.unflatten(3, (H, M)).movedim(4, 2).flatten(2, 3)[:, :, :n] for x in before)
    return tuple(torch.cat((x[:, :skip], y), dim=1) for x, y in zip((o, lse), found, strict=True))
