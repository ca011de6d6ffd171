r"""A learned gate over blocks of keys: summaries of the blocks, what it should have said, and its loss.

In eager torch alone: a gate costs 1 / block_size of the attention's scores, or less.

A summary joins the largest, the smallest and the mean key of a block, channel by channel, through one matrix,
here in three parts. The truth is the largest weight that attention gives in a block, computed some queries at
a time, so that the attention map is never in memory.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from effattn_lite.ops import common
from effattn_lite.ops.engines import decode


def check(
    sizes: dict[str, int],
    q: torch.Tensor,
    weights: dict[str, torch.Tensor],
    rope_theta: float | None,
    **gates: torch.Tensor | None,
) -> None:
    """Check the gate's weights, and tensors that stand in for q and k in it, against the sizes of q and k."""
    for name, x in gates.items():
        if x is not None:
            common.check_shape(name, x, "B T H K" if name == "q_gate" else "B Tk HKV K", sizes)
            common.check_alike(name, x, q, dtype=False)
    for name, x in weights.items():
        common.check_shape(name, x, "H K M" if name == "w_q" else "HKV K M", sizes, like="q and k")
        common.check_alike(name, x, q, dtype=False)
    if rope_theta is not None and sizes["M"] % 2:
        raise ValueError(f"w_q has M = {sizes['M']} channels, expected an even number to rotate")


def check_choice(threshold: float | None, block_size: int, **number: int | None) -> None:
    """Check that one of the threshold and the other number is given, and that this one is >= 1."""
    ((name, n),) = number.items()
    if (n is None) == (threshold is None):
        given = "neither" if n is None else "both"
        raise ValueError(f"expected exactly one of {name} and threshold, got {given}")
    for word, x in ((name, n), ("block_size", block_size)):
        if x is not None and x < 1:
            raise ValueError(f"{word} is {x}, expected >= 1")


def summaries(
    k: torch.Tensor, w_max: torch.Tensor, w_min: torch.Tensor, w_avg: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Summaries of blocks of k [B, T, HKV, K], the last one maybe cut, unrotated: [B, NK, HKV, M], as k."""
    pages = blocks(k, block_size)
    parts = zip((w_max, w_min, w_avg), zip(*(pools(x) for x in pages), strict=True), strict=True)
    # [B, NK, HKV, K] x [HKV, K, M] -> [B, NK, HKV, M]
    return sum(torch.einsum("bjhk,hkm->bjhm", torch.cat(x, dim=1), w.to(k.dtype)) for w, x in parts)


def blocks(x: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    """Whole blocks of x [B, T, ...], [B, n, block_size, ...], and apart what is left, if anything is."""
    n = x.shape[1] // block_size
    whole, rest = x[:, : n * block_size].unflatten(1, (n, block_size)), x[:, None, n * block_size :]
    return [whole, rest] if rest.shape[2] else [whole]


def pools(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest, smallest and mean of pages [B, n, size, ...], [B, n, ...] each."""
    return pages.amax(2), pages.amin(2), pages.mean(2)


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float | None) -> torch.Tensor:
    """Turn the channel pairs (i, i + M/2) of x [B, N, H, M] by positions [N]; not at all without theta."""
    if theta is None:
        return x
    a, b = x.chunk(2, dim=-1)
    half = a.shape[-1]
    wave = theta ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = positions.to(x.dtype)[:, None, None] * wave
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@torch.no_grad()
def largest_weights(
    q: torch.Tensor, k: torch.Tensor, *, block_size: int, scale: float | None, tile: int
) -> Iterator[torch.Tensor]:
    """The largest weight of causal attention in each block of keys, for `tile` queries at a time.

    Args:
        q: queries, [B, T, H, K]; rotated, as the attention multiplies them.
        k: keys, [B, T, HKV, K].
        block_size: keys in a block.
        scale: of the scores; default K ** -0.5.
        tile: queries at a time.

    Yields:
        [B, HKV, G, tile, NK], float32 or wider.
    """
    (T, H, K), HKV = q.shape[1:], k.shape[2]
    wide, NK = torch.promote_types(q.dtype, torch.float32), -(-T // block_size)
    scale = K**-0.5 if scale is None else scale
    q, k = q.to(wide).unflatten(2, (HKV, H // HKV)), k.to(wide)
    for i in range(0, T, tile):
        end = min(i + tile, T)
        t, j = torch.arange(i, end, device=q.device), torch.arange(end, device=q.device)
        # [B, tile, HKV, G, K] x [B, end, HKV, K] -> [B, HKV, G, tile, end]
        s = torch.einsum("bthgk,bjhk->bhgtj", q[:, i:end], k[:, :end]) * scale
        p = s.masked_fill(j > t[:, None], -torch.inf).softmax(-1)
        p = F.pad(p, (0, -end % block_size)).unflatten(-1, (-1, block_size)).amax(-1)
        yield F.pad(p, (0, NK - p.shape[-1]))


def divergence(truth: torch.Tensor, scores: torch.Tensor, see: torch.Tensor) -> torch.Tensor:
    """Mean of KL(truth || softmax of the scores that `see` shows) over the rows that have a truth.

    Args:
        truth: rows that sum to 1, or to 0 where there is nothing to learn, [..., NK]; no gradient reaches it.
        scores: [..., NK].
        see: who may be chosen, broadcast to [..., NK].
    """
    # finite, so that a row that sees nothing has no NaN in its gradient
    log_p = scores.masked_fill(~see, torch.finfo(scores.dtype).min).log_softmax(-1)
    truth = truth.detach().to(log_p.dtype)
    some = truth > 0
    terms = truth * (truth.where(some, 1.0).log() - log_p.where(some, 0.0))
    return terms.sum() / some.any(-1).sum().clamp(min=1)


def compress(
    k: torch.Tensor,
    weights: Sequence[torch.Tensor],
    block_size: int,
    theta: float | None,
    first: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Summaries of the whole blocks of k [B, T, HKV, K], rotated; the first block has the number `first`."""
    n = k.shape[1] // block_size
    with torch.autocast(k.device.type, enabled=False):
        x = summaries(k[:, : n * block_size], *weights, block_size)
    return rotate(x, (torch.arange(n, device=k.device) + first) * block_size, theta)


def group_queries(
    q: torch.Tensor, w_q: torch.Tensor, HKV: int, theta: float | None, first: int
) -> torch.Tensor:
    """The gate's query of each key head, [B, T, HKV, M], of q [B, T, H, K]; its first token is at `first`."""
    G = q.shape[2] // HKV
    # [B, T, HKV, G, K] x [HKV, G, K, M] -> [B, T, HKV, M]
    x = torch.einsum("btngk,ngkm->btnm", q.unflatten(2, (HKV, G)), w_q.unflatten(0, (HKV, G)).to(q.dtype))
    return rotate(x, torch.arange(q.shape[1], device=q.device) + first, theta)


def past_blocks(T: int, Tk: int, block_size: int, device) -> torch.Tensor:
    """Which whole blocks lie before the own block of the last T of Tk tokens, [T, Tk // block_size]."""
    own = torch.arange(Tk - T, Tk, device=device) // block_size
    return torch.arange(Tk // block_size, device=device) < own[:, None]


def token_scores(
    q: torch.Tensor, k: torch.Tensor, weights: dict[str, torch.Tensor], block_size: int, theta: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate's scores of q [B, T, H, K] on the blocks of k, [B, HKV, T, P], and which count, [T, P]."""
    T, (Tk, HKV), wide = q.shape[1], k.shape[1:3], torch.promote_types(q.dtype, torch.float32)
    w_q, *others = (weights[name] for name in ("w_q", "w_max", "w_min", "w_avg"))
    with torch.autocast(q.device.type, enabled=False):
        qg = group_queries(q.to(wide), w_q, HKV, theta, Tk - T)
        kg = compress(k.to(wide), others, block_size, theta)
        # [B, T, HKV, M] x [B, P, HKV, M] -> [B, HKV, T, P]
        s = torch.einsum("bthm,bphm->bhtp", qg, kg) * qg.shape[3] ** -0.5
    return s, past_blocks(T, Tk, block_size, q.device)


@torch.no_grad()
def choose_pages(
    q: torch.Tensor,
    w_q: torch.Tensor,
    features: torch.Tensor,
    Tk: int,
    theta: float | None,
    *,
    budget: int | None,
    threshold: float | None,
    block_size: int,
    impl: str,
) -> torch.Tensor:
    """The newest block of each query, and past ones by number or by share.

    Args:
        q: queries before rotation, [B, T, H, K]; of the last T of Tk tokens.
        w_q, theta: as in `group_queries`.
        features: compressed keys, [B, Tk // block_size, HKV, M].
        Tk, block_size: how many tokens there are, and in a block.
        budget: tokens to read, rounded up to whole blocks; or
        threshold: a larger share is read.
        impl: "torch" or "triton", of the products.

    Returns:
        Block numbers, [B, T, HKV, n], int32; -1 for none. Ties in float32 go to the lower block.
    """
    (P, HKV), T = features.shape[1:3], q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        queries = group_queries(q.double(), w_q, HKV, theta, Tk - T).to(features.dtype)
    B, M = queries.shape[0], queries.shape[3]
    own = torch.arange(Tk - T, Tk, device=queries.device) // block_size  # -1: there is no block yet
    if threshold is None:
        best = decode.choose(queries, features, own, -(-budget // block_size) - 1, impl)
    else:
        best, i = [own.new_zeros((B, 0, HKV, P), dtype=torch.int32)], torch.arange(P, device=own.device)
        for t in (slice(a, a + decode.QUERY_TILE) for a in range(0, T, decode.QUERY_TILE)):
            s = torch.ops.effattn_lite.page_scores(queries[:, t], features, impl) * M**-0.5
            # a row without a past is NaN, which is larger than nothing
            share = s.masked_fill(i >= own[t, None, None], -torch.inf).softmax(-1)
            best.append(torch.where(share > threshold, i, -1).to(torch.int32))
        best = torch.cat(best, dim=1)
    own = own.to(torch.int32)[None, :, None, None].expand(B, T, HKV, 1)
    return torch.cat((own, best), dim=-1)
