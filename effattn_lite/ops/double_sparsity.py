"""DoubleSparsity: the public operator, its offline calibration, and its selection of tokens."""

from collections.abc import Sequence

import torch

from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.engines import decode
from effattn_lite.ops.engines.softmax_attention import check


def double_sparsity(
    q: torch.Tensor,
    cache: KVCache | None = None,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    channels: torch.Tensor | Sequence[int],
    budget: int,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""A few channels of all keys choose the tokens that a new token reads: sparse in channels and in tokens.

    .. math:: \hat s_j = q_{[\mathcal C]}^\top k_{j[\mathcal C]}, \qquad
        o = \sum_{j \in \operatorname{top}_n \hat s} \operatorname{softmax}_j(s\, q^\top k_j)\, v_j

    Each query head chooses for itself. No gradient is defined.

    Args:
        q: queries of the newest token, [B, H, K]; float32 / bfloat16 / float16; float64 with impl="torch".
            With k and v, of the last T of Tk tokens, [B, T, H, K].
        cache: keys and values so far, the newest token's among them; it keeps the labels, the chosen channels
            side by side. Or
        k, v: keys [B, Tk, HKV, K] and values [B, Tk, HKV, V] of a text, in which every token is read as if it
            had just been written; H is a multiple of HKV.
        channels: the set C, [HKV, r] int64 on q's device, as `calibrate` finds it, or r integers for all
            heads. A cache makes its labels anew when another object is given: keep one a layer.
        budget: n, tokens that a query reads, >= 1.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5. The selection needs none.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1, k and v, T = Tk.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, H, V] or [B, T, H, V], dtype of q; with return_lse also lse, [B, H] or [B, T, H], float32
        (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; neither or both of cache and k, v are given.
        TypeError: dtypes differ, or the kernels do not take them; channels are no integers.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: a token reads HKV r numbers a key, and H budget (K + V) of keys and values, each head its own.
    Source: Yang et al. 2024, arXiv:2408.07092. Differs: channels belong to a key head, not to each of its
        query heads, so that a label is kept once; labels keep the cache's dtype, the released code can take
        4 bits.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget}, expected >= 1")
    keys = k if cache is None else cache.k
    source, summary = channels, None
    if keys is not None:
        channels = _channels(channels, q, keys)
        summary = ("labels", 1, lambda pages: _labels(pages[:, :, 0], channels), source)

    def body(q, k, v, features, impl):
        tokens = _tokens(q, k.shape[1], channels, features, budget, impl)
        return decode.attend(q, k, v, tokens, scale=scale, impl=impl)

    o, lse = decode.run(body, summary, q, cache, k, v, cu_seqlens, impl)
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    channels: torch.Tensor | Sequence[int],
    budget: int,
    impl: str = "auto",
) -> torch.Tensor:
    """Tokens of each query head: those up to it whose labels answer its own best.

    Args:
        q: queries, [B, T, H, K]; the last T of Tk tokens.
        k: keys, [B, Tk, HKV, K].
        channels, budget, impl: as in `double_sparsity`.

    Returns:
        Token numbers, [B, T, H, min(budget, Tk)] int32, the best first; -1 where there are no more. A tie in
        float32 goes to the earlier token.

    Raises:
        ValueError, TypeError, NotImplementedError: as `double_sparsity`.

    Cost: 2 r FLOPs a query and token.
    Source: Yang et al. 2024, arXiv:2408.07092.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget}, expected >= 1")
    channels = _channels(channels, q, k)
    summary = ("labels", 1, lambda pages: _labels(pages[:, :, 0], channels))

    def body(q, k, v, features, impl):
        return (_tokens(q, k.shape[1], channels, features, budget, impl),)

    return decode.run(body, summary, q, None, k, k, None, impl)[0]


@torch.no_grad()
def calibrate(q: torch.Tensor, k: torch.Tensor, *, r: int) -> torch.Tensor:
    r"""Channels that carry the products, found offline on a sample of text.

    .. math:: \mathcal C = \operatorname{top}_r \textstyle\sum_t |q_{t,c}\, k_{t,c}|

    summed over the query heads of a key head as well.

    Args:
        q: queries of the sample, [B, T, H, K].
        k: its keys, [B, T, HKV, K]; H is a multiple of HKV.
        r: channels to keep, 1 to K; K / 16 to K / 4 in the paper.

    Returns:
        Channel numbers, [HKV, r] int64, the strongest first; a tie goes to the lower one: the sort is stable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; r is out of range.

    Cost: 3 B T H K FLOPs, once.
    Source: Yang et al. 2024, arXiv:2408.07092, the released calibration: each token meets its own key alone.
    """
    check(q, k, k, None)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected T = {q.shape[1]} tokens as q")
    if not 1 <= r <= q.shape[3]:
        raise ValueError(f"r is {r}, expected 1 to K = {q.shape[3]}")
    wide = torch.promote_types(q.dtype, torch.float32)
    products = q.to(wide).unflatten(2, (k.shape[2], -1)) * k.to(wide)[:, :, :, None]  # [B, T, HKV, G, K]
    strength = products.abs().sum((0, 1, 3))
    return strength.sort(dim=-1, descending=True, stable=True)[1][:, :r]


def _labels(x, channels):
    """The channels [HKV, r] of keys [B, T, HKV, K]."""
    return x.gather(3, channels.expand(*x.shape[:2], *channels.shape))


def _tokens(q, Tk, channels, features, budget, impl):
    past = torch.arange(Tk - q.shape[1], Tk, device=q.device) + 1
    mine = _labels(q, channels.repeat_interleave(q.shape[2] // channels.shape[0], dim=0))
    return decode.choose(mine, features, past, budget, impl)


def _channels(channels, q, k):
    """Channels as [HKV, r] int64 on q's device, in range."""
    if not isinstance(channels, torch.Tensor):
        channels = torch.tensor(list(channels), device=q.device)
    if channels.is_floating_point() or channels.dtype == torch.bool:
        raise TypeError(f"channels is {channels.dtype}, expected integers")
    if k.ndim != 4:  # named when k is checked
        return channels.long()
    shape, HKV = tuple(channels.shape), k.shape[2]
    channels = channels.expand(HKV, -1) if channels.ndim == 1 else channels
    if channels.ndim != 2 or channels.shape[0] != HKV or not channels.shape[1]:
        raise ValueError(f"channels has shape {shape}, expected [r] or [HKV, r] with HKV = {HKV}, r >= 1")
    if channels.device != q.device and q.device == k.device:
        raise ValueError(f"channels is on {channels.device}, expected {q.device} as q")
    # reading values on a GPU would wait for it
    if channels.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(channels.min()) < 0 or int(channels.max()) >= k.shape[3]:
            raise ValueError(f"channels is {channels.tolist()}, expected 0 to K - 1 = {k.shape[3] - 1}")
    return channels.long()
