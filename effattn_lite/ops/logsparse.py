"""LogSparse attention: the public operator, a few diagonals of the score matrix in plain torch."""

import torch
from torch.nn.functional import pad

from effattn_lite.ops.common import choose_impl
from effattn_lite.ops.engines.softmax_attention import check


def logsparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    local: int = 1,
    restart: int | None = None,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""See the past on a logarithmic scale: the last tokens, then ones twice as far away each time.

    .. math:: \mathcal D = \{0, \dots, c - 1\} \cup \{c - 1 + 2^i : i \ge 0\}, \qquad
        \mathcal S(t) = \{t - d \ge 0 : d \in \mathcal D\}

    With `restart` only distances below L_sub are taken of these, and all are repeated every L_sub tokens. The
    distances are the same for every token, so each is one diagonal: a product of q with shifted keys.

    Args:
        q: queries, [B, T, H, K], positions already in them; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K]; H is a multiple of HKV.
        v: values, [B, Tk, HKV, V].
        local: c >= 1 last tokens that are all seen, the query's own included; 1 is the plain LogSparse set.
        restart: L_sub >= local, tokens after which the pattern starts again; None: never.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1 and T = Tk.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, V]; with return_lse also lse, [B, T, H].

    Raises:
        ValueError: shapes do not fit, local < 1, or restart < local.
        TypeError: dtypes differ.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: B H T n (2 K + 2 V) FLOPs in products, n distances: about c + log2 Tk, times Tk / L_sub with
        restart. About log2 T such layers reach every earlier token.
    Source: Li et al. 2019, arXiv:1907.00235.
    """
    check(q, k, v, cu_seqlens)
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"q has T = {q.shape[1]} and k has Tk = {k.shape[1]}, expected T <= Tk")
    if local < 1:
        raise ValueError(f"local is {local}, expected >= 1: it counts the token itself")
    if restart is not None and restart < local:
        raise ValueError(f"restart is {restart}, expected None or >= local = {local}")
    if impl == "triton":
        raise NotImplementedError("logsparse has no kernel; use impl='torch'")
    choose_impl(impl, q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, lse = _diagonals(q, k, v, _distances(k.shape[1], local, restart), scale, cu_seqlens)
    return (o, lse) if return_lse else o


def _distances(T, local, restart):
    """The distances below T, in rising order; 0 is always one, even of no token."""
    period = restart or max(T, local)
    near = [*range(min(local, T)), *(local - 1 + 2**i for i in range(T.bit_length()))]
    return sorted({0, *(m + d for m in range(0, T, period) for d in near if d < period and m + d < T)})


def _diagonals(q, k, v, distances, scale, cu_seqlens):
    """Scores of one diagonal after another, a softmax over them, and a sum of shifted values."""
    (B, T, H, _), (Tk, HKV), V, dtype = q.shape, k.shape[1:3], v.shape[3], q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = q.unflatten(2, (HKV, H // HKV)).to(wide), k.to(wide), v.to(wide)
    # query t, from the first that has a key so far back, and that key
    spans = [(max(d - (Tk - T), 0), max(Tk - T - d, 0), Tk - d) for d in distances]
    scores = []
    for t, a, b in spans:
        s = scale * torch.einsum("bthgk,bthk->bthg", q[:, t:], k[:, a:b])
        scores.append(pad(s, (0, 0, 0, 0, t, 0), value=-torch.inf))
    s = torch.stack(scores, dim=-1)  # [B, T, HKV, G, n]
    if cu_seqlens is not None:
        token, edges = torch.arange(T, device=q.device), cu_seqlens.long()
        seen = token - edges[torch.searchsorted(edges, token, right=True) - 1]
        far = torch.tensor(distances, device=q.device) > seen[:, None]
        s = s.masked_fill(far[:, None, None], -torch.inf)
    p, lse = s.softmax(-1), s.logsumexp(-1).flatten(2)
    o = q.new_zeros(B, T, HKV, H // HKV, V)
    for i, (t, a, b) in enumerate(spans):
        o[:, t:] += p[:, t:, ..., i, None] * v[:, a:b, :, None]
    return o.flatten(2, 3).to(dtype), lse
