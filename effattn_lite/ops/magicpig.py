"""MagicPIG: the public operator, its hash tables, and the chance with which a key is drawn."""

import math

import torch

from effattn_lite.ops import common
from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.engines import decode


def magicpig(
    q: torch.Tensor,
    cache: KVCache | None = None,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    planes: torch.Tensor,
    bits: int = 10,
    prompt: int,
    sinks: int = 4,
    window: int = 64,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""A new token reads keys that hashes drew for it, each weighed by how unlikely that was.

    .. math:: s_j = s\, q^\top k_j, \qquad
        o = \frac{\sum_{j \in \mathcal W} e^{s_j} v_j + \sum_{j \in \mathcal D} e^{s_j} v_j / u_j}
        {\sum_{j \in \mathcal W} e^{s_j} + \sum_{j \in \mathcal D} e^{s_j} / u_j}

    W are the sinks and the newest tokens; D, of the others, those that share a bucket with the query in two
    tables or more, of chance u: `probability`. Numerator and denominator average to those of full attention
    over the planes; their quotient does when many are drawn. A token of the prompt reads all before it. No
    gradient is defined.

    Args:
        q: queries of the newest token, [B, H, K]; float32 / bfloat16 / float16; float64 with impl="torch".
            With k and v, of the last T of Tk tokens, [B, T, H, K].
        cache: keys and values so far, the newest token's among them; it keeps the keys' buckets. Or
        k, v: keys [B, Tk, HKV, K] and values [B, Tk, HKV, V] of a text, in which every token is read as if it
            had just been written; H is a multiple of HKV.
        planes: normals of L bits hyperplanes, [L bits, K], any floating dtype, as `draw_planes` makes them;
            L >= 2. A cache hashes its keys anew when another object is given: keep one a layer.
        bits: hyperplanes of a table, 1 to 30.
        prompt: tokens that are read before the first is written, >= 0: the mean of their keys, sinks apart,
            is taken from all keys before they are hashed.
        sinks: first tokens, always read, >= 0.
        window: newest tokens, always read, the token itself among them, >= 1.
        return_lse: return the log of the estimated denominator as well.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1, k and v, T = Tk; each has a prompt of its
            own.
        impl: "auto" or "torch".

    Returns:
        o, [B, H, V] or [B, T, H, V], dtype of q; with return_lse also lse, [B, H] or [B, T, H], float32
        (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; neither or both of cache and k, v are given.
        TypeError: dtypes differ.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: a token reads HKV L buckets a key, and H (K + V) a token that was drawn or is always read, of which
        the longest list of all heads decides: its length is waited for.
    Source: Chen et al. 2024, arXiv:2410.16179, and the released code. There tables list keys by bucket on the
        CPU, tokens written after the prompt are always read, and 1e-4 is added to u.
    """
    _check(q, planes, bits, prompt, sinks, window)
    if impl == "triton":
        raise NotImplementedError("magicpig has no kernel; use impl='auto' or impl='torch'")

    def body(q, k, v, _, impl):
        def rest(q):
            mean, buckets = _tables(cache, k, planes, bits, prompt, sinks)
            return _sampled(q, k, v, mean, buckets, planes, bits, sinks, window, scale)

        return decode.after_prompt(rest, q, k, v, prompt, scale=scale, impl=impl)

    o, lse = decode.run(body, None, q, cache, k, v, cu_seqlens, impl)
    return (o, lse) if return_lse else o


def draw_planes(tables: int, bits: int, K: int, *, seed: int = 0) -> torch.Tensor:
    """Normals of random hyperplanes, `bits` for each hash table.

    Args:
        tables: L.
        bits: hyperplanes of a table.
        K: key dimension.
        seed: the same seed, the same planes.

    Returns:
        planes, [L bits, K] float32, on the CPU, normal.

    Cost: none beside the numbers themselves.
    Source: Charikar 2002, random hyperplanes; Chen et al. 2024, arXiv:2410.16179, with L = 150, bits = 10.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tables * bits, K, generator=generator, device="cpu")


def probability(cosine: torch.Tensor, *, bits: int, tables: int) -> torch.Tensor:
    r"""Chance that a key shares its bucket with the query in two tables or more.

    .. math:: p = 1 - \tfrac1\pi \arccos \cos(q, k), \qquad
        u = 1 - (1 - p^b)^L - L\, p^b (1 - p^b)^{L - 1}

    Args:
        cosine: of query and centred key, any shape.
        bits: b, hyperplanes of a table.
        tables: L >= 2.

    Returns:
        u, of the same shape and dtype.

    Cost: 15 FLOPs an entry.
    Source: Chen et al. 2024, arXiv:2410.16179. Written so that small chances keep their digits.
    """
    p = 1 - torch.arccos(cosine.clamp(-1, 1)) / math.pi
    x = (p**bits).clamp(max=1 - torch.finfo(p.dtype).eps / 2)
    return -torch.expm1((tables - 1) * torch.log1p(-x) + torch.log1p((tables - 1) * x))


def _hashes(x, planes, bits):
    """Bucket of vectors [..., K] float64 in each table, [..., L]."""
    side = (torch.einsum("...k,mk->...m", x, planes.to(x)) > 0).unflatten(-1, (-1, bits))
    buckets = (side.int() << torch.arange(bits, device=x.device, dtype=torch.int32)).sum(-1)
    return buckets.to(torch.int16 if bits < 16 else torch.int32)


def _centred(k, mean):
    """Keys less their mean, in float64; what is left of a key at the mean is zero, not rounding."""
    left = k.double() - mean
    size, of = (x.square().sum(-1, keepdim=True).sqrt() for x in (left, k.double()))
    return torch.where(size > 1e-6 * of, left, 0.0)


def _tables(cache, k, planes, bits, prompt, sinks):
    """The mean key of the prompt, [B, 1, HKV, K], and the buckets of all keys, [B, Tk, HKV, L]."""

    def average(keys):
        return keys.double().mean(1, keepdim=True)

    def hashed(keys):
        return _hashes(_centred(keys, mean), planes, bits)

    if cache is None:
        mean = average(k[:, sinks:prompt]) if prompt > sinks else k.new_zeros((), dtype=torch.float64)
        return mean, hashed(k)
    # planes -> mean -> buckets: each is made anew when the one before it is another
    mean, source = k.new_zeros((), dtype=torch.float64), planes
    if prompt > sinks:
        mean = source = cache.spans("prompt mean", (sinks, prompt), average, planes)[0]
    return mean, cache.summary(f"buckets {bits}", 1, lambda pages: hashed(pages[:, :, 0]), source)


@torch.no_grad()
def _sampled(q, k, v, mean, buckets, planes, bits, sinks, window, scale):
    """(o, lse) of queries behind the prompt, some at a time."""
    (B, T, H, K), Tk = q.shape, k.shape[1]
    rows, parts = max(1, decode.GATHERED // max(1, B * H * Tk * K)), []
    for i in range(0, T, rows):
        tile, end = q[:, i : i + rows], Tk - T + min(i + rows, T)
        tokens, bias = _drawn(tile, k[:, :end], mean, buckets[:, :end], planes, bits, sinks, window)
        parts.append(
            decode.attend(tile, k[:, :end], v[:, :end], tokens, bias=bias, scale=scale, impl="torch")
        )
    return tuple(torch.cat(x, dim=1) for x in zip(*parts, strict=True))


def _drawn(q, k, mean, buckets, planes, bits, sinks, window):
    """Tokens that are always read or drawn, [B, T, H, n] int32 with -1 for none, and -log u of each."""
    (B, T, H, _), (_, Tk, HKV, L) = q.shape, buckets.shape
    h = torch.arange(H, device=q.device)[:, None] // (H // HKV)
    mine, kept = _hashes(q.double(), planes, bits), buckets.transpose(1, 2)[:, None, h[:, 0]]
    same = torch.zeros((B, T, H, Tk), dtype=torch.int16, device=q.device)
    for i in range(L):
        same += mine[..., i, None] == kept[..., i]  # [B, T, H, 1], [B, 1, H, Tk]
    t, j = torch.arange(Tk - T, Tk, device=q.device)[:, None, None], torch.arange(Tk, device=q.device)
    exact = (j < sinks) | (j > t - window)
    tokens = torch.where((exact | (same >= 2)) & (j <= t), j, Tk).sort(dim=-1)[0]
    if not torch.compiler.is_compiling() and tokens.numel():
        tokens = tokens[..., : int((tokens < Tk).sum(-1).max())]
    j = tokens.clamp(max=Tk - 1)
    b = torch.arange(B, device=q.device)[:, None, None, None]
    left = _centred(k[b, j, h], mean if mean.ndim == 0 else mean[b, 0, h])  # [B, T, H, n, K]
    sizes = q.double().square().sum(-1, keepdim=True).sqrt() * left.square().sum(-1).sqrt()
    cosine = torch.einsum("bthk,bthjk->bthj", q.double(), left) / torch.where(sizes > 0, sizes, 1.0)
    u = probability(cosine, bits=bits, tables=L)
    u = torch.where((j < sinks) | (j > t - window) | (tokens == Tk), 1.0, u)
    return torch.where(tokens < Tk, tokens, -1).int(), -u.log()


def _check(q, planes, bits, prompt, sinks, window):
    if not 1 <= bits <= 30:
        raise ValueError(f"bits is {bits}, expected 1 to 30")
    for name, n, least in (("prompt", prompt, 0), ("sinks", sinks, 0), ("window", window, 1)):
        if n < least:
            raise ValueError(f"{name} is {n}, expected >= {least}")
    common.check_shape("planes", planes, "M K", {"K": q.shape[-1]})
    common.check_alike("planes", planes, q, dtype=False)
    if not planes.is_floating_point():
        raise TypeError(f"planes is {planes.dtype}, expected a floating dtype")
    if planes.shape[0] % bits or planes.shape[0] < 2 * bits:
        raise ValueError(f"planes has {planes.shape[0]} rows, expected L bits = L {bits} with L >= 2")
