"""Which keys a query of a sparse call sees: a predicate, from which pairs are counted and masks are made.

The same predicate is FlexAttention's mask in `flex` and gives the pairs of `roofline.ideal`; the sets of a
method that selects are those of its `select` on the inputs of the call.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from effattn_lite.ops.engines.vertical_slash import table

__all__ = ["SIDE", "Seen", "seen_of", "tally"]

SIDE = 128
"""Queries, and keys, of a block whose pairs are counted together; FlexAttention's block too."""
AT_ONCE = 2**27
"""Pairs that are looked at together."""


class Seen(NamedTuple):
    """What the queries of a call see.

    see: (b, h, t, j) -> bool, on index tensors that broadcast; h counts query heads.
    causal: no pair with j > t is seen.
    whole: in a block of SIDE x SIDE either nothing is seen, or all that causality lets through.
    more: pairs of further branches, each a softmax of its own, in all batch rows and heads.
    """

    see: Callable
    causal: bool = True
    whole: bool = False
    more: int = 0


def seen_of(name, arguments):
    """What a method's call sees; None for a method that has no entry here.

    Args:
        name: a method, or "block_sparse_attention".
        arguments: all keyword arguments of the call, tensors and options.
    """
    with torch.no_grad():
        return SEEN[name](**arguments) if name in SEEN else None


def tally(seen, q):
    """Pairs seen in each block of SIDE queries and SIDE keys, [B, H, NB, NB] int32, for q [B, T, H, K].

    Every pair is looked at, some 1e8 at a time: 16 heads at T = 32,768 have 1.7e10.
    """
    (B, T, H, _), device = q.shape, q.device
    b, h = torch.arange(B, device=device)[:, None, None, None], torch.arange(H, device=device)[:, None, None]
    rows, j, parts = max(1, AT_ONCE // (B * H * T * SIDE)) * SIDE, torch.arange(T, device=device), []
    for a in range(0, T, rows):
        t = torch.arange(a, min(a + rows, T), device=device)[:, None]
        see = seen.see(b, h, t, j).expand(B, H, len(t), T)
        see = (
            F.pad(see, (0, -T % SIDE, 0, -len(t) % SIDE)).unflatten(3, (-1, SIDE)).sum(-1, dtype=torch.int32)
        )
        parts.append(see.unflatten(2, (-1, SIDE)).sum(3, dtype=torch.int32))
    return torch.cat(parts, dim=2)


def _from_mask(mask, query_block_size, block_size, *, causal=True):
    """Sets of blocks of queries, [B, HS, NQ, NK] of bool, each for H / HS heads."""

    def of(heads):
        group = heads // mask.shape[1]

        def see(b, h, t, j):
            found = mask[b, h // group, t // query_block_size, j // block_size]
            return found & (j <= t) if causal else found

        return Seen(see, causal, query_block_size % SIDE == 0 and block_size % SIDE == 0)

    return of


def _from_index(index, block_size, T, heads):
    """Sets of tokens, block numbers [B, T, HS, n], -1 for none."""
    NK = -(-T // block_size)
    chosen = torch.zeros((*index.shape[:3], NK + 1), dtype=torch.bool, device=index.device)
    chosen.scatter_(3, index.long().where(index >= 0, NK), True)
    group = heads // index.shape[2]
    return Seen(lambda b, h, t, j: chosen[b, t, h // group, j // block_size] & (j <= t))


def _select(name, *tensors, **options):
    return importlib.import_module(f"effattn_lite.ops.{name}").select(*tensors, **options)


def _block_sparse_attention(q, k, v, *, block_mask, block_size):
    return _from_mask(block_mask, block_size, block_size)(q.shape[2])


def _flexprefill(q, k, v, *, block_size=128, **options):
    mask = _select("flexprefill", q, k, block_size=block_size, **options)
    return _from_mask(mask, block_size, block_size)(q.shape[2])


def _xattention(q, k, v, *, block_size=128, **options):
    mask = _select("xattention", q, k, block_size=block_size, **options)
    return _from_mask(mask, block_size, block_size)(q.shape[2])


def _spargeattn(q, k, v, *, query_block_size=128, block_size=64, skip=None, **options):
    # pairs of the first filter; whose product with values the second leaves out is not foreseen
    sizes = dict(query_block_size=query_block_size, block_size=block_size)
    return _from_mask(_select("spargeattn", q, k, **sizes, **options), **sizes)(q.shape[2])


def _bigbird(q, k, v, *, block_size=64, **options):
    mask = _select("bigbird", *q.shape[1:3], block_size=block_size, **options, device=q.device)
    return _from_mask(mask.expand(q.shape[0], -1, -1, -1), block_size, block_size, causal=False)(q.shape[2])


def _moba(q, k, v, *, block_size, top_k):
    index = _select("moba", q, k, block_size=block_size, top_k=top_k)
    return _from_index(index, block_size, *q.shape[1:3])


def _infllm_v2(q, k, v, *, block_size=64, **options):
    return _from_index(
        _select("infllm_v2", q, k, block_size=block_size, **options), block_size, *q.shape[1:3]
    )


def _nsa(q, k, v, *, block_size=64, window=512, cmp_size=64, cmp_stride=64, **options):
    """The selected blocks; the window and the spans that have ended are further branches."""
    B, T, H, _ = q.shape
    index = _select(
        "nsa", q, k, block_size=block_size, cmp_size=cmp_size, cmp_stride=cmp_stride, **_no_gates(options)
    )
    t = torch.arange(T)
    spans = ((t + 1 - cmp_size) // cmp_stride + 1).clamp(min=0)
    more = B * H * int(((t + 1).clamp(max=window) + spans).sum())
    return _from_index(index, block_size, T, H)._replace(more=more)


def _no_gates(options):
    return {name: x for name, x in options.items() if not name.startswith("g_")}


def _minference(q, k, v, **options):
    columns, diagonals = (table(x, q.shape[1]).bool() for x in _select("minference", q, k, **options))
    return Seen(lambda b, h, t, j: (columns[b, h, j] | diagonals[b, h, (t - j).clamp(min=0)]) & (j <= t))


def _sparse_transformer(q, k, v, *, pattern="strided", stride, summary=8):
    def strided(b, h, t, j):
        return (j <= t) & torch.where(h % 2 == 0, t - j <= stride, (t - j) % stride == 0)

    def fixed(b, h, t, j):
        return (j <= t) & torch.where(h % 2 == 0, j // stride == t // stride, j % stride >= stride - summary)

    return Seen({"strided": strided, "fixed": fixed}[pattern])


def _longnet(
    q, k, v, *, segments=(2048, 4096, 8192, 16384, 32768), dilations=(1, 2, 4, 6, 12)
):  # fmt: skip
    def see(b, h, t, j):
        found = j < 0
        for w, r in zip(segments, dilations, strict=True):
            found = found | ((t // w == j // w) & (t % w % r == h % r) & (j % w % r == h % r))
        return found & (j <= t)

    return Seen(see)


def _logsparse(q, k, v, *, local=1, restart=None):
    d = torch.arange(q.shape[1], device=q.device)
    d = d % restart if restart else d
    far = d - (local - 1)  # a power of 2
    distances = (d < local) | ((far > 0) & (far & (far - 1) == 0))
    return Seen(lambda b, h, t, j: distances[(t - j).clamp(min=0)] & (j <= t))


def _longformer(q, k, v, *, window, dilation=1, global_tokens=(0,), **_):
    (T, H), device = q.shape[1:3], q.device
    rate = torch.tensor([dilation] * H if isinstance(dilation, int) else dilation, device=device)
    everywhere = torch.zeros(T, dtype=torch.bool, device=device)
    everywhere[[t for t in global_tokens if t < T]] = True

    def see(b, h, t, j):
        away, r = (t - j).abs(), rate[h]
        return ((away <= window // 2 * r) & (away % r == 0)) | everywhere[t] | everywhere[j]

    return Seen(see, causal=False)


SEEN = {
    "block_sparse_attention": _block_sparse_attention,
    "sparse_transformer": _sparse_transformer,
    "longnet": _longnet,
    "logsparse": _logsparse,
    "minference": _minference,
    "flexprefill": _flexprefill,
    "xattention": _xattention,
    "spargeattn": _spargeattn,
    "moba": _moba,
    "nsa": _nsa,
    "infllm_v2": _infllm_v2,
    "bigbird": _bigbird,
    "longformer": _longformer,
}
"""Method -> what a call with these arguments sees."""
