r"""Which blocks of keys a block of queries wants: estimates of the weights, and choices among them.

Three estimates, each a torch operator, computed in eager torch or by the Triton kernels of
kernels/block_select.py: means of blocks and how alike their tokens are, sums along antidiagonals of the
scores, sums of the last queries' weights along columns and diagonals. The choices are plain torch.

All choices compare with 11 significant bits, so that rounding breaks no tie; of equals the first goes first.
"""

import torch
import torch.nn.functional as F

from effattn_lite.ops import common

MAX_HEAD = 256
ROWS = 128
"""Rows of weights that the torch implementation holds at a time."""


def check(q, k, v=None, cu_seqlens=None, **positive: int) -> None:
    """Check q [B, T, H, K], k [B, T, HKV, K] and v [B, T, HKV, V], and numbers that must be >= 1."""
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B T HKV K", sizes)
    if v is not None:
        common.check_shape("v", v, "B T HKV V", sizes, like="k")
    common.check_heads(sizes["H"], sizes["HKV"])
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            common.check_alike(name, x, q)
    if cu_seqlens is not None:
        common.check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
        common.check_alike("cu_seqlens", cu_seqlens, q, dtype=False)
    for name, n in positive.items():
        if n < 1:
            raise ValueError(f"{name} is {n}, expected >= 1")


def refusal(q: torch.Tensor) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if q.shape[3] > MAX_HEAD:
        return f"K <= {MAX_HEAD}, got {q.shape[3]}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8 and q.dtype == torch.bfloat16:
        return "a GPU of compute capability 8.0 or later for bfloat16"
    return None


def per_sequence(choose, q, k, cu_seqlens):
    """Masks [B, H, NQ, NK] that `choose(q, k)` gives for each packed sequence, their rows end to end."""
    if cu_seqlens is None:
        return choose(q, k)
    edges = cu_seqlens.tolist()
    masks = [choose(q[:, a:b], k[:, a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    NK = max(mask.shape[3] for mask in masks)
    return torch.cat([F.pad(mask, (0, NK - mask.shape[3])) for mask in masks], 2)


def visible(T: int, QS: int, BS: int, device) -> torch.Tensor:
    """Whether some query of a block of QS sees some key of a block of BS, [NQ, NK]."""
    i = torch.arange(-(-T // QS), device=device)[:, None]
    return torch.arange(-(-T // BS), device=device) * BS < (i + 1) * QS


def order(mass: torch.Tensor) -> torch.Tensor:
    """Indices of each row of masses >= 0, the largest first."""
    # the sum carries into the 10 bits of the fraction that are kept: it rounds
    rank = (mass.float().contiguous().view(torch.int32) + 4096) >> 13
    return torch.argsort(rank, dim=-1, descending=True, stable=True)


def place(mass: torch.Tensor) -> torch.Tensor:
    """Place of each entry in its row, 0 for the largest."""
    index = order(mass)
    return torch.zeros_like(index).scatter(
        -1, index, torch.arange(index.shape[-1], device=index.device).expand_as(index)
    )


def fewest(mass: torch.Tensor, share: float) -> torch.Tensor:
    """How many of the largest entries of a row hold a share of its mass 1."""
    if share >= 1:
        return torch.full(mass.shape[:-1], mass.shape[-1], device=mass.device)
    mass = mass.sort(-1, descending=True).values
    return (mass.cumsum(-1) - mass < share).sum(-1)


def top_mass(mass: torch.Tensor, need: torch.Tensor | float, always: torch.Tensor | None = None):
    """The fewest entries of each row, `always` first, whose mass reaches `need`, as a mask."""
    first = mass if always is None else mass.masked_fill(always, torch.inf)
    index = order(first)
    mass = mass.gather(-1, index)
    take = mass.cumsum(-1) - mass < need
    chosen = torch.zeros_like(take).scatter(-1, index, take)
    return chosen if always is None else chosen | always


def top_cdf(p: torch.Tensor, threshold: float) -> torch.Tensor:
    """The largest of each row, added up while they stay within the threshold, at least one, as a mask."""
    index = order(p)
    take = p.gather(-1, index).cumsum(-1) <= threshold
    take = take | (torch.arange(p.shape[-1], device=p.device) == 0)
    return torch.zeros_like(take).scatter(-1, index, take)


def top_k(mass: torch.Tensor, n: int, always: int = 0) -> torch.Tensor:
    """The n largest of each row as ascending indices, its first `always` entries among them."""
    near = torch.arange(mass.shape[-1], device=mass.device) < always
    return order(mass.masked_fill(near, torch.inf))[..., :n].sort(-1).values


def block_means(x, block_size: int, *, centre=None, impl: str):
    """Means of the blocks of x [B, T, H, K], and the mean cosine of all pairs of tokens in a block.

    Args:
        x: queries or keys.
        block_size: BS; the last block may be cut short.
        centre: subtracted from every token, [B, H, K]. A token that all but vanishes counts as 0.
        impl: "torch" or "triton".

    Returns:
        Means, [B, H, NB, K], and mean cosines, [B, H, NB], float32 or wider.
    """
    return torch.ops.effattn_lite.block_means(x, centre, block_size, impl)


def antidiagonal_mass(q, k, *, block_size: int, stride: int, scale: float, impl: str) -> torch.Tensor:
    """Mass of each pair of blocks, [B, H, NQ, NQ]: a softmax over antidiagonal sums, added up in blocks."""
    return torch.ops.effattn_lite.antidiagonal_mass(q, k, block_size, stride, scale, impl)


def last_query_sums(q, k, *, last: int, scale: float, impl: str):
    """Weights of the last queries, added up by key, [B, H, T], and by distance, [B, H, T]."""
    return torch.ops.effattn_lite.last_query_sums(q, k, last, scale, impl)


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _block_means(x, centre, block_size, impl):
    if impl == "triton":
        from effattn_lite.kernels import block_select as kernels

        return kernels.block_means(x, centre, block_size)
    wide = _wide(x)
    means, alike = _block_means_fake(x, centre, block_size, impl)
    for i in range(means.shape[2]):
        part = x[:, i * block_size : (i + 1) * block_size].to(wide)
        full = part.norm(dim=-1, keepdim=True)
        if centre is not None:
            part = part - centre[:, None]
        length = part.norm(dim=-1, keepdim=True)
        # a centred token that is mere rounding has no direction
        live = length > (0 if centre is None else full / 1024)
        unit = torch.where(live, part / torch.where(live, length, 1), 0)
        means[:, :, i], alike[:, :, i] = part.mean(1), unit.mean(1).square().sum(-1)
    return means, alike


def _block_means_fake(x, centre, block_size, impl):
    (B, _, H, K), NB = x.shape, -(-x.shape[1] // block_size)
    return tuple(x.new_empty(shape, dtype=_wide(x)) for shape in ((B, H, NB, K), (B, H, NB)))


def _antidiagonal_mass(q, k, block_size, stride, scale, impl):
    if impl == "triton":
        from effattn_lite.kernels import block_select as kernels

        return kernels.antidiagonal_mass(q, k, block_size, stride, scale)
    T, S, HKV, n = q.shape[1], stride, k.shape[2], block_size // stride
    R, mass = -(-T // S), torch.zeros_like(_antidiagonal_mass_fake(q, k, block_size, stride, scale, impl))
    q, k = (F.pad(x.to(mass.dtype), (0, 0, 0, 0, 0, R * S - T)).unflatten(1, (R, S)) for x in (q, k))
    q = q.flip(2).unflatten(3, (HKV, q.shape[3] // HKV))
    rows = -(-ROWS // n) * n
    for i in range(0, R, rows):
        end = min(i + rows, R)
        # [B, rows, S, HKV, G, K] x [B, R, S, HKV, K] -> [B, HKV, G, rows, R]
        a = torch.einsum("bishgk,bjshk->bhgij", q[:, i:end], k[:, :end]).flatten(1, 2) * (scale / S)
        j = torch.arange(end, device=q.device)
        a = a.masked_fill(j > j[i:, None], -torch.inf).softmax(-1)
        a = F.pad(a, (0, -end % n, 0, -end % n)).unflatten(3, (-1, n)).unflatten(2, (-1, n)).sum((3, 5))
        mass[:, :, i // n : i // n + a.shape[2], : a.shape[3]] = a
    return mass


def _antidiagonal_mass_fake(q, k, block_size, stride, scale, impl):
    NQ = -(-q.shape[1] // block_size)
    return q.new_empty((q.shape[0], q.shape[2], NQ, NQ), dtype=_wide(q))


def _last_query_sums(q, k, last, scale, impl):
    if impl == "triton":
        from effattn_lite.kernels import block_select as kernels

        return kernels.last_query_sums(q, k, last, scale)
    (B, T, H, _), HKV, wide = q.shape, k.shape[2], _wide(q)
    L = min(last, T)
    q, k = q[:, T - L :].to(wide), k.to(wide)
    t, j = torch.arange(T - L, T, device=q.device)[:, None], torch.arange(T, device=q.device)
    columns, diagonals = _last_query_sums_fake(q, k, last, scale, impl)
    for h in range(H):  # a head at a time, since weights take L T numbers each
        # [B, L, K] x [B, T, K] -> [B, L, T]
        s = torch.einsum("btk,bjk->btj", q[:, :, h], k[:, :, h * HKV // H]) * scale
        p = s.masked_fill(j > t, -torch.inf).softmax(-1)
        slanted = p.gather(2, (t - j).clamp(min=0).expand(B, L, T)).masked_fill(j > t, 0)
        columns[:, h], diagonals[:, h] = p.sum(1), slanted.sum(1)
    return columns, diagonals


def _last_query_sums_fake(q, k, last, scale, impl):
    # q may have been cut to the last queries; k has all tokens
    shape = (q.shape[0], q.shape[2], k.shape[1])
    return tuple(q.new_empty(shape, dtype=_wide(q)) for _ in range(2))


common.register(
    "block_means",
    "(Tensor x, Tensor? centre, int block_size, str impl) -> (Tensor, Tensor)",
    _block_means,
    _block_means_fake,
)
common.register(
    "antidiagonal_mass",
    "(Tensor q, Tensor k, int block_size, int stride, float scale, str impl) -> Tensor",
    _antidiagonal_mass,
    _antidiagonal_mass_fake,
)
common.register(
    "last_query_sums",
    "(Tensor q, Tensor k, int last, float scale, str impl) -> (Tensor, Tensor)",
    _last_query_sums,
    _last_query_sums_fake,
)
