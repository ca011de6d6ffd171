"""Reformer's attention by locality-sensitive hashing: the public operator, and its hashes."""

import torch

from effattn_lite.ops import common
from effattn_lite.ops.engines.softmax_attention import merge

EPSILON = 1e-6
"""Added to the square of a key's length, so that a token of zeros is a key of zeros."""


def reformer(
    q: torch.Tensor,
    v: torch.Tensor,
    *,
    omega: torch.Tensor,
    rounds: int,
    chunk_size: int = 64,
    causal: bool = True,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""A token attends to those that fall into its bucket in any round of hashing, near it in sorted order.

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j\Bigl(
        s\, \frac{q_t^\top q_j}{\lVert q_j \rVert}\Bigr)\, v_j, \\
        \mathcal S(t) = \{j \ne t : h_r(t) = h_r(j),\ 0 \le c_r(t) - c_r(j) \le 1 \text{ for an } r\}

    Each round sorts the tokens by (bucket, position) and cuts the order into chunks of C, c_r(t) the chunk of
    token t; a chunk attends to itself and the one before. A pair that N rounds see counts 1 / N in each, so
    the merged rounds are one softmax over S(t). Where S(t) is empty it is {t}: a token, which would be its
    own best match, attends to itself only then. Gradients flow through the attention, none through the hash.

    Causal says which values a token may read. How the order is cut depends on later tokens: they may change
    which of the earlier ones a token reads, though never bring in what they hold.

    Args:
        q: queries and, over their length, keys, [B, T, H, K], float32, bfloat16, float16 or float64.
        v: values, [B, T, H, V].
        omega: random directions, [H, M, K], any dtype, M / rounds of them a round, so 2 M / rounds buckets.
        rounds: R >= 1, a divisor of M; more rounds miss fewer near tokens.
        chunk_size: C >= 1, tokens in a chunk; the paper has 2 T over the number of buckets.
        causal: see no later token.
        return_lse: return the log-sum-exp of each row as well; gradients flow through it.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1, each sorted by itself; read on the host.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; rounds does not divide M.
        TypeError: dtypes differ.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: 2 R B H T C (2 K + 2 V) FLOPs in products, 2 B H T M K of hashes, R sorts of T tokens, and R^2 B H T
        2 C comparisons of buckets.
    Source: Kitaev et al. 2020, arXiv:2001.04451. Differs: no chunk looks back round the end of the order; the
        authors' code can also let all tokens of the two chunks see each other, whatever their buckets.
    """
    sizes = _check(q, omega, rounds, cu_seqlens)
    common.check_shape("v", v, "B T H V", sizes)
    common.check_alike("v", v, q)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected >= 1")
    if impl == "triton":
        raise NotImplementedError("reformer has no kernel; use impl='torch'")
    common.choose_impl(impl, q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide, dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    bucket = _hash(q, omega, rounds)

    def one(q, v, bucket):
        return _sequence(q, v, bucket, chunk_size, causal, scale)

    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        q, v = q.to(wide), v.to(wide)
        if bucket.numel():
            o, lse = common.by_sequence(one, cu_seqlens, q, v, bucket)
        else:
            o, lse = v * q.sum(-1, keepdim=True), q.sum(-1)
    return (o.to(dtype), lse) if return_lse else o.to(dtype)


def hashes(q: torch.Tensor, *, omega: torch.Tensor, rounds: int) -> torch.Tensor:
    r"""Bucket of each token in each round: the random axis, with its sign, that lies nearest to it.

    .. math:: h(x) = \operatorname{argmax}\,[\Omega x;\, -\Omega x]

    Args:
        q: tokens, [B, T, H, K]; their length does not matter.
        omega: random directions, [H, M, K], any dtype, M / rounds of them a round.
        rounds: R >= 1, a divisor of M. A tie in float32 goes to the lower bucket.

    Returns:
        Bucket numbers, [B, T, H, R], int64, from 0 to 2 M / R - 1.

    Raises:
        ValueError: as `reformer`.

    Cost: 2 B H T M K FLOPs, in float32 or wider.
    Source: Kitaev et al. 2020, arXiv:2001.04451; the paper writes R for the matrix omega.
    """
    _check(q, omega, rounds, None)
    return _hash(q, omega, rounds)


def _check(q, omega, rounds, cu_seqlens):
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("omega", omega, "H M K", sizes)
    common.check_alike("omega", omega, q, dtype=False)
    common.check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    if rounds < 1 or not sizes["M"] or sizes["M"] % rounds:
        raise ValueError(f"rounds is {rounds}, expected a divisor of omega's M = {sizes['M']}")
    return sizes


@torch.no_grad()
def _hash(q, omega, rounds):
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        x = torch.einsum("bthk,hmk->bthm", q.to(wide), omega.to(wide)).unflatten(-1, (rounds, -1))
    # compared in float32, so that rounding of float64 breaks no tie; argmax takes the first of equals
    x = x.float()
    return torch.cat((x, -x), dim=-1).argmax(-1)


def _sequence(q, v, bucket, C, causal, scale):
    """o [B, T, H, V] and lse [B, T, H] of one sequence, bucket [B, T, H, R]."""
    k = q * (q.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    order = bucket.sort(dim=1, stable=True)[1]
    chunk = order.argsort(dim=1) // C  # of a permutation: the place of each token
    rounds = range(bucket.shape[3])
    parts = [_round(q, k, v, bucket, chunk, order[..., r], r, C, causal, scale) for r in rounds]
    o, lse = merge(parts)
    alone = lse.isneginf()
    own = scale * (q * k).sum(-1)
    return torch.where(alone[..., None], v, o), torch.where(alone, own, lse)


def _round(q, k, v, bucket, chunk, order, r, C, causal, scale):
    """One round: chunks of the sorted tokens against themselves and the chunk before, order [B, T, H]."""
    T = q.shape[1]
    i = torch.nn.functional.pad(order, (0, 0, 0, -T % C), value=T).unflatten(1, (-1, C))  # [B, NC, C, H]
    j = torch.cat((torch.nn.functional.pad(i[:, :-1], (0, 0, 0, 0, 1, 0), value=T), i), dim=2)
    # rows behind the last token are some token, and seen by none
    row, column = i.clamp(max=T - 1), j.clamp(max=T - 1)
    # [B, NC, C, H, K] x [B, NC, 2 C, H, K] -> [B, NC, H, C, 2 C]
    s = scale * torch.einsum("bnihk,bnjhk->bnhij", _take(q, row), _take(k, column))
    see = _pairs(i, j, lambda a, b: (b < a if causal else b != a) & (b < T))
    same = [_pairs(_take(x, row), _take(x, column), torch.eq) for x in bucket.unbind(-1)]
    near = [_pairs(_take(x, row), _take(x, column), _near) for x in chunk.unbind(-1)]
    N = sum((a & b).to(s.dtype) for a, b in zip(same, near, strict=True))
    s = (s - N.clamp(min=1).log()).masked_fill(~(see & same[r]), -torch.inf)
    m = s.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    p = (s - m).exp()
    l = p.sum(-1, keepdim=True)
    empty = l == 0
    l = l.masked_fill(empty, 1.0)
    # [B, NC, H, C, 2 C] x [B, NC, 2 C, H, V] -> [B, NC, C, H, V]
    o = torch.einsum("bnhij,bnjhv->bnihv", p / l, _take(v, column)).flatten(1, 2)[:, :T]
    lse = (m + l.log()).masked_fill(empty, -torch.inf)[..., 0].transpose(2, 3).flatten(1, 2)[:, :T]
    back = order.argsort(dim=1)
    return _take(o, back), lse.gather(1, back)


def _take(x, index):
    """Rows of x [B, T, H] or [B, T, H, K] at tokens [B, ..., H]."""
    flat = index.flatten(1, -2)
    if x.ndim == 3:
        return x.gather(1, flat).view(index.shape)
    return x.gather(1, flat[..., None].expand(*flat.shape, x.shape[3])).unflatten(1, index.shape[1:-1])


def _pairs(a, b, function):
    """A function of rows [B, NC, C, H] and columns [B, NC, 2 C, H], [B, NC, H, C, 2 C]."""
    return function(a.transpose(2, 3)[..., None], b.transpose(2, 3)[..., None, :])


def _near(a, b):
    return (a >= b) & (a <= b + 1)
