"""SeerAttention-R: the public operator, its gate for decoding, and what the gate learns from."""

import torch
import torch.nn.functional as F

from effattn_lite.ops import common
from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.engines import attention_gate as engine
from effattn_lite.ops.engines import block_select, decode, token_sparse


def seer_attention_r(
    q: torch.Tensor, cache: KVCache | None = None, *, k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    w_q: torch.Tensor, w_max: torch.Tensor, w_min: torch.Tensor, w_avg: torch.Tensor,
    budget: int | None = None, threshold: float | None = None, block_size: int = 64,
    rope_theta: float | None = None, q_gate: torch.Tensor | None = None, k_gate: torch.Tensor | None = None,
    k_cmp: torch.Tensor | None = None, return_lse: bool = False, scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None, impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    r"""A new token reads the blocks of the cache that a learned gate names, the same for a group of heads.

    .. math:: p_t = \operatorname{softmax}_{J < \lfloor t/B_S \rfloor}(\tilde q_t^\top \tilde k_J / \sqrt M),
        \qquad \mathcal I(t) = \{\lfloor t / B_S \rfloor\} \cup \operatorname{top}\, p_t

    with the gate's vectors as in `gate`. The newest block is always read. Gradients flow through q, k and v
    of a text, none through the choice, which learns from `gate_loss`; none flows through a cache.

    Args:
        q: queries of the newest token, [B, H, K]; float32 / bfloat16 / float16; float64 with impl="torch".
            With k and v, of the last T of Tk tokens, [B, T, H, K].
        cache: keys and values so far, the newest token's among them; it keeps compressed keys as long as
            w_max is the same tensor. Or
        k, v: keys [B, Tk, HKV, K] and values [B, Tk, HKV, V] of a text, in which every token is read as if it
            had just been written; H is a multiple of HKV.
        w_q, w_max, w_min, w_avg, rope_theta: the gate, as in `gate`.
        budget: tokens that a query may read, >= 1, in whole blocks, the newest among them. Or
        threshold: past blocks with a larger share p are read.
        block_size: B_S, tokens in a block.
        q_gate: queries for the gate, before rotation, shape of q; default q.
        k_gate: keys for the gate, before rotation, beside k and v and of k's shape; default k.
        k_cmp: compressed keys for the gate, [B, Tk // B_S, HKV, M], of `compress`; default those of the
            cache's own keys, or of k_gate.
        return_lse: return the log-sum-exp of each row as well.
        scale: of the scores; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1, k and v, T = Tk; read on the host.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, H, V] or [B, T, H, V], dtype of q; with return_lse also lse, [B, H] or [B, T, H], float32
        (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit; neither or both of cache and k, v are given.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: a token reads HKV M numbers a block, and HKV budget (K + V) of keys and values; 2 H K M FLOPs for
        the gate's query.
    Source: Gao et al. 2025, arXiv:2506.08889. The released code counts the newest block beside the budget,
        and can normalise the gate's vectors; here it is in it, and they are not.
    """
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg)
    how = dict(budget=budget, threshold=threshold, block_size=block_size, rope_theta=rope_theta)
    if cache is None:
        if k is None or v is None:
            raise ValueError("neither a cache nor both k and v are given")
        if not (k_cmp is None or k_gate is None and cu_seqlens is None):
            raise ValueError(
                "k_cmp stands for the keys of one text: expected no k_gate or cu_seqlens beside it"
            )
        sizes = _check(q, k, weights, cu_seqlens, q_gate=q_gate, k_gate=k_gate, **how)
        common.check_shape("v", v, "B Tk HKV V", sizes, like="k")
        common.check_alike("v", v, q)
        gates = q if q_gate is None else q_gate, k if k_gate is None else k_gate
        pages = _select(*gates, weights, cu_seqlens, k_cmp, impl=impl, **how)
        o, lse = token_sparse.attend(
            q, k, v, block_indices=pages, block_size=block_size, scale=scale, cu_seqlens=cu_seqlens, impl=impl
        )
    else:
        if not (k is None and v is None and k_gate is None and cu_seqlens is None):
            raise ValueError("a cache has its own k and v, and packs no sequences: expected none beside it")
        o, lse = _decode(q, cache, weights, q_gate, k_cmp, scale=scale, impl=impl, **how)
    return (o, lse) if return_lse else o


def select(
    q: torch.Tensor, k: torch.Tensor, *,
    w_q: torch.Tensor, w_max: torch.Tensor, w_min: torch.Tensor, w_avg: torch.Tensor,
    budget: int | None = None, threshold: float | None = None, block_size: int = 64,
    rope_theta: float | None = None, cu_seqlens: torch.Tensor | None = None, impl: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Blocks of each query's group of heads: the newest, and past ones by the gate.

    Args:
        q, k: as in `gate`.
        w_q and the others: as in `seer_attention_r`.

    Returns:
        Block numbers, [B, T, HKV, n], int32: the newest, then for a budget the best first; -1 where there is
        none. A tie in float32 goes to the lower block.

    Raises:
        ValueError, TypeError: as `seer_attention_r`.

    Cost: that of `gate`.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg)
    how = dict(budget=budget, threshold=threshold, block_size=block_size, rope_theta=rope_theta)
    _check(q, k, weights, cu_seqlens, **how)
    return _select(q, k, weights, cu_seqlens, None, impl=impl, **how)


def compress(
    k: torch.Tensor, *, w_max: torch.Tensor, w_min: torch.Tensor, w_avg: torch.Tensor, block_size: int = 64,
    rope_theta: float | None = None, first: int | torch.Tensor = 0,
) -> torch.Tensor:  # fmt: skip
    """Compressed keys of the whole blocks of k [B, T, HKV, K], before rotation: [B, T // B_S, HKV, M].

    Args:
        k, w_max, w_min, w_avg, block_size, rope_theta: as in `gate`.
        first: number of the first block, which turns by its position.
    """
    return engine.compress(k.double(), (w_max, w_min, w_avg), block_size, rope_theta, first).to(_wide(k))


def gate(
    q: torch.Tensor, k: torch.Tensor, *,
    w_q: torch.Tensor, w_max: torch.Tensor, w_min: torch.Tensor, w_avg: torch.Tensor,
    block_size: int = 64, rope_theta: float | None = None,
) -> torch.Tensor:  # fmt: skip
    r"""Share of the attention to the past that each token is expected to give to each past block.

    .. math:: \tilde q_t = \textstyle\sum_{h \in \mathrm{group}} W_h^\top q_{t,h}, \quad
        \tilde k_J = W_{\max}^\top \max_{j \in J} k_j + W_{\min}^\top \min_{j \in J} k_j
        + W_{\mathrm{avg}}^\top \operatorname{mean}_{j \in J} k_j, \quad
        p_{tJ} = \operatorname{softmax}_{J < \lfloor t / B_S \rfloor}(\tilde q_t^\top \tilde k_J / \sqrt M)

    Differentiable in all tensors.

    Args:
        q: queries before rotation, [B, T, H, K]; the last T of Tk tokens.
        k: keys before rotation, [B, Tk, HKV, K].
        w_q: [H, K, M].
        w_max, w_min, w_avg: the three parts of one matrix on the concatenated pools, [HKV, K, M].
        block_size: B_S, tokens in a block.
        rope_theta: turn a query by its position and a block by that of its first token, with wavelengths of
            this base; None leaves positions out. M is even then.

    Returns:
        p, [B, HKV, T, Tk // B_S], float32 (float64 for float64); a row sums to 1, or to 0 without a past.

    Raises:
        ValueError, TypeError: as `seer_attention_r`.

    Cost: B T (2 H K M + 2 HKV M P) FLOPs in products, P blocks, and 6 K M a block and key head.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg)
    _check(q, k, weights, None, budget=1, threshold=None, block_size=block_size, rope_theta=rope_theta)
    scores, see = engine.token_scores(q, k, weights, block_size, rope_theta)
    return scores.masked_fill(~see, torch.finfo(scores.dtype).min).softmax(-1) * see


def ground_truth(
    q: torch.Tensor, k: torch.Tensor, *, block_size: int = 64, scale: float | None = None
) -> torch.Tensor:
    r"""What the gate is to learn: the largest weight in each past block, of any head of the group, as shares.

    .. math:: g_{tJ} = \max_{h \in \mathrm{group},\, j \in J} \operatorname{softmax}_j(s\, q_{t,h}^\top k_j),
        \qquad \hat g_{tJ} = g_{tJ} / \textstyle\sum_{J < \lfloor t / B_S \rfloor} g_{tJ}

    Computed 128 queries at a time: 128 T scores a head are in memory, never T^2. No gradient is kept.

    Args:
        q: queries as the attention multiplies them, rotated, [B, T, H, K].
        k: keys, rotated, [B, T, HKV, K].
        block_size: B_S.
        scale: s; default K ** -0.5.

    Returns:
        [B, HKV, T, T // B_S], float32 (float64 for float64); a row without a past is 0.

    Raises:
        ValueError, TypeError: as `gate`.

    Cost: B H T^2 (K + 3) FLOPs, half of the map.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    block_select.check(q, k, block_size=block_size)
    (B, T, HKV, _), P = k.shape, k.shape[1] // block_size
    tiles = engine.largest_weights(q, k, block_size=block_size, scale=scale, tile=decode.QUERY_TILE)
    none = torch.zeros((B, HKV, 0, P), dtype=_wide(q), device=q.device)
    g = torch.cat([none, *(p.amax(2)[..., :P] for p in tiles)], dim=2)
    g = g * engine.past_blocks(T, T, block_size, q.device)
    return g / g.sum(-1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)


def gate_loss(
    q: torch.Tensor, k: torch.Tensor, truth: torch.Tensor, *,
    w_q: torch.Tensor, w_max: torch.Tensor, w_min: torch.Tensor, w_avg: torch.Tensor,
    block_size: int = 64, rope_theta: float | None = None,
) -> torch.Tensor:  # fmt: skip
    r"""How far the gate is from the truth, a mean over tokens with a past; it has no other loss.

    .. math:: \mathcal L = \operatorname{mean}_t\, \mathrm{KL}(\hat g_t \Vert p_t)

    Args:
        q, k, w_q, w_max, w_min, w_avg, block_size, rope_theta: as in `gate`.
        truth: of `ground_truth`, [B, HKV, T, T // B_S].

    Returns:
        A number, float32 (float64 for float64), differentiable in all but the truth.

    Raises:
        ValueError, TypeError: as `gate`.

    Cost: that of `gate`.
    Source: Gao et al. 2025, arXiv:2506.08889.
    """
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg)
    _check(q, k, weights, None, budget=1, threshold=None, block_size=block_size, rope_theta=rope_theta)
    scores, see = engine.token_scores(q, k, weights, block_size, rope_theta)
    common.check_shape(
        "truth", truth, "B HKV T P", dict(zip(("B", "HKV", "T", "P"), scores.shape, strict=True))
    )
    return engine.divergence(truth, scores, see)


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _keys(weights):
    return {name: weights[name] for name in ("w_max", "w_min", "w_avg")}


def _check(q, k, weights, cu_seqlens, *, budget, threshold, block_size, rope_theta, **gates):
    sizes = {}
    common.check_shape("q", q, "B T H K", sizes)
    common.check_shape("k", k, "B Tk HKV K", sizes)
    common.check_heads(sizes["H"], sizes["HKV"])
    common.check_alike("k", k, q)
    token_sparse.check_tokens(q, k, cu_seqlens)
    engine.check(sizes, q, weights, rope_theta, **gates)
    engine.check_choice(threshold, block_size, budget=budget)
    return sizes


def _select(q, k, weights, cu_seqlens, k_cmp, *, rope_theta, block_size, impl, **how):
    """Pages of each sequence, the lists of the shorter ones filled up with -1."""
    impl = common.choose_impl(impl, q, refusal=token_sparse.refusal(q, k))

    if k_cmp is not None:
        shape = dict(B=k.shape[0], P=k.shape[1] // block_size, HKV=k.shape[2], M=weights["w_q"].shape[2])
        common.check_shape("k_cmp", k_cmp, "B P HKV M", shape, like="k")

    def one(q, k):
        where = dict(block_size=block_size, rope_theta=rope_theta)
        x = compress(k, **_keys(weights), **where) if k_cmp is None else k_cmp
        return engine.choose_pages(
            q, weights["w_q"], x, k.shape[1], rope_theta, block_size=block_size, impl=impl, **how
        )

    with torch.no_grad():
        if cu_seqlens is None:
            return one(q, k)
        edges = cu_seqlens.tolist()
        pages = [one(q[:, a:b], k[:, a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        n = max(x.shape[3] for x in pages)
        return torch.cat([F.pad(x, (0, n - x.shape[3]), value=-1) for x in pages], dim=1)


def _decode(q, cache, weights, q_gate, k_cmp, *, rope_theta, block_size, scale, impl, **how):
    B, Tk, HKV, K = cache.k.shape
    sizes = dict(B=B, K=K, HKV=HKV)
    for name, x in (("q", q), ("q_gate", q_gate)):
        if x is not None:
            common.check_shape(name, x, "B H K", sizes, like="the cache")
            common.check_alike(name, x, cache.k, like="the cache")
    common.check_heads(sizes["H"], HKV)
    engine.check(sizes, q, weights, rope_theta)
    engine.check_choice(block_size=block_size, **how)
    impl = common.choose_impl(impl, q, refusal=token_sparse.refusal(q[:, None], cache.v))
    if k_cmp is None:

        def function(pages):
            first = Tk // block_size - pages.shape[1]
            where = dict(block_size=block_size, rope_theta=rope_theta, first=first)
            return compress(pages.flatten(1, 2), **_keys(weights), **where)

        k_cmp = cache.summary(f"gate {rope_theta}", block_size, function, weights["w_max"])
    common.check_shape("k_cmp", k_cmp, "B P HKV M", sizes | dict(P=Tk // block_size), like="the cache")
    q_gate = (q if q_gate is None else q_gate)[:, None]
    pages = engine.choose_pages(
        q_gate, weights["w_q"], k_cmp, Tk, rope_theta, block_size=block_size, impl=impl, **how
    )
    o, lse = decode.attend(q[:, None], cache.k, cache.v, pages, page_size=block_size, scale=scale, impl=impl)
    return o[:, 0], lse[:, 0]
