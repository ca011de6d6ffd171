"""SeerAttention: the public operator, its gate, and what the gate learns from."""

import torch

from effattn_lite.ops.block_sparse_attention import block_sparse_attention
from effattn_lite.ops.engines import attention_gate as engine
from effattn_lite.ops.engines import block_select

ROWS = 128
"""Blocks of queries whose scores of blocks are held at a time, in the choice."""


def seer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    w_q: torch.Tensor,
    w_max: torch.Tensor,
    w_min: torch.Tensor,
    w_avg: torch.Tensor,
    block_size: int = 64,
    top_k: int | None = None,
    threshold: float | None = None,
    rope_theta: float | None = None,
    q_gate: torch.Tensor | None = None,
    k_gate: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Block-sparse attention where a small learned gate, on pooled queries and keys, names the blocks.

    .. math:: p_{IJ} = \operatorname{softmax}_{J \le I}(\tilde q_I^\top \tilde k_J / \sqrt M), \qquad
        \mathcal S(t) = \{j \le t : \lfloor j / B_S \rfloor
        \in \operatorname{top}_k\, p_{\lfloor t / B_S \rfloor}\}

    with the pooled vectors as in `gate`. Gradients flow through q, k and v of the attention, none through the
    choice: the gate learns from `gate_loss`. Prefill only: what a block of queries sees depends on all tokens
    of the block.

    Args:
        q: queries, [B, T, H, K], float32 / bfloat16 / float16; float64 with impl="torch".
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        w_q, w_max, w_min, w_avg, rope_theta: the gate, as in `gate`.
        block_size: B_S, tokens in a block.
        top_k: blocks of a block of queries, its own among them, >= 1. Or
        threshold: blocks with a larger share p are kept, and the own; 5e-4 to 5e-3 are usual.
        q_gate: queries for the gate, before rotation, [B, T, H, K]; default q.
        k_gate: keys for the gate, before rotation, [B, T, HKV, K]; default k.
        scale: of the scores; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1; read on the host.
        return_lse: return the log-sum-exp of each row as well; gradients flow through it.
        impl: "torch", "triton" or "auto"; the gate is torch in all of them.

    Returns:
        o, [B, T, H, V], dtype of q; with return_lse also lse, [B, T, H], float32 (float64 for float64).

    Raises:
        ValueError: shapes, devices or ranges do not fit, or not exactly one of top_k and threshold is given.
        TypeError: dtypes differ, or the kernels do not take them.
        NotImplementedError: impl="triton" with K or V over 256.

    Cost: that of `gate`; B H n (2 K + 2 V) FLOPs in products, n the pairs in chosen blocks.
    Source: Gao et al. 2024, arXiv:2410.13276. Differs: a block of queries always sees its own block, which
        the released code leaves to the gate.
    """
    mask = select(
        q if q_gate is None else q_gate, k if k_gate is None else k_gate, w_q=w_q, w_max=w_max, w_min=w_min,
        w_avg=w_avg, block_size=block_size, top_k=top_k, threshold=threshold, rope_theta=rope_theta,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return block_sparse_attention(
        q, k, v, block_mask=mask, block_size=block_size, scale=scale,
        cu_seqlens=cu_seqlens, return_lse=return_lse, impl=impl,
    )  # fmt: skip


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    w_q: torch.Tensor,
    w_max: torch.Tensor,
    w_min: torch.Tensor,
    w_avg: torch.Tensor,
    block_size: int = 64,
    top_k: int | None = None,
    threshold: float | None = None,
    rope_theta: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Blocks that each block of queries sees, as a mask: its own, and the best of the past.

    Shares are computed in float64 and compared in float32; a tie goes to the lower block: the sort is stable.

    Args:
        q, k, w_q, w_max, w_min, w_avg, block_size, rope_theta: as in `gate`.
        top_k, threshold, cu_seqlens: as in `seer_attention`.

    Returns:
        A mask, [B, H, NQ, NK] of bool, NQ = NK = ceil(T / block_size); for packed sequences laid out as
        `block_sparse_attention` says.

    Raises:
        ValueError, TypeError: as `seer_attention`.

    Cost: that of `gate`; no more than 128 rows of shares are in memory.
    Source: Gao et al. 2024, arXiv:2410.13276.
    """
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg)
    _check(q, k, weights, block_size, rope_theta, cu_seqlens)
    engine.check_choice(threshold, block_size, top_k=top_k)

    @torch.no_grad()
    def choose(q, k):
        qg, kg = _pooled(q.double(), k.double(), weights, block_size, rope_theta)
        tiles = [slice(a, a + ROWS) for a in range(0, max(kg.shape[1], 1), ROWS)]
        return torch.cat([_choose(qg, kg, rows, top_k, threshold) for rows in tiles], dim=2)

    # autocast would round the shares to 8 bits
    with torch.autocast(q.device.type, enabled=False):
        return block_select.per_sequence(choose, q, k, cu_seqlens)


def gate(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    w_q: torch.Tensor,
    w_max: torch.Tensor,
    w_min: torch.Tensor,
    w_avg: torch.Tensor,
    block_size: int = 64,
    rope_theta: float | None = None,
) -> torch.Tensor:
    r"""Share of the attention that each block of queries is expected to give to each block of keys.

    .. math:: \tilde q_I = W_q^\top \operatorname{mean}_{t \in I} q_t, \quad
        \tilde k_J = W_{\max}^\top \max_{j \in J} k_j + W_{\min}^\top \min_{j \in J} k_j
        + W_{\mathrm{avg}}^\top \operatorname{mean}_{j \in J} k_j, \quad
        p_{IJ} = \operatorname{softmax}_{J \le I}(\tilde q_I^\top \tilde k_J / \sqrt M)

    Differentiable in all tensors.

    Args:
        q: queries before rotation, [B, T, H, K].
        k: keys before rotation, [B, T, HKV, K].
        w_q: [H, K, M].
        w_max, w_min, w_avg: the three parts of one matrix on the concatenated pools, [HKV, K, M].
        block_size: B_S, tokens in a block; the last one may be cut.
        rope_theta: turn both by the position of the block's first token, with wavelengths of this base; None
            leaves positions out. M is even then.

    Returns:
        p, [B, H, NQ, NK], float32 (float64 for float64); rows sum to 1.

    Raises:
        ValueError: shapes, devices or ranges do not fit.
        TypeError: dtypes differ.

    Cost: B NQ (2 H K M + 6 HKV K M + 2 H NQ M) FLOPs in products.
    Source: Gao et al. 2024, arXiv:2410.13276.
    """
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg)
    _check(q, k, weights, block_size, rope_theta, None)
    scores, see = _scores(q, k, weights, block_size, rope_theta)
    return scores.masked_fill(~see, -torch.inf).softmax(-1).flatten(1, 2)


def ground_truth(
    q: torch.Tensor, k: torch.Tensor, *, block_size: int = 64, scale: float | None = None
) -> torch.Tensor:
    r"""What the gate is to learn: the largest weight in each block of the attention map, as shares of a row.

    .. math:: g_{IJ} = \max_{t \in I,\, j \in J} \operatorname{softmax}_j(s\, q_t^\top k_j), \qquad
        \hat g_{IJ} = g_{IJ} / \textstyle\sum_J g_{IJ}

    Computed a block of queries at a time: B_S T scores a head are in memory, never T^2. No gradient is kept.

    Args:
        q: queries as the attention multiplies them, rotated, [B, T, H, K].
        k: keys, rotated, [B, T, HKV, K].
        block_size: B_S.
        scale: s; default K ** -0.5.

    Returns:
        [B, H, NQ, NK], float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as `gate`.

    Cost: B H T^2 (K + 3) FLOPs, half of the map.
    Source: Gao et al. 2024, arXiv:2410.13276.
    """
    block_select.check(q, k, block_size=block_size)
    tiles = engine.largest_weights(q, k, block_size=block_size, scale=scale, tile=block_size)
    rows = [p.amax(3) for p in tiles]  # [B, HKV, G, NK] each
    if not rows:
        return q.new_zeros((q.shape[0], q.shape[2], 0, 0), dtype=torch.promote_types(q.dtype, torch.float32))
    g = torch.stack(rows, dim=3).flatten(1, 2)
    return g / g.sum(-1, keepdim=True)


def gate_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    truth: torch.Tensor,
    *,
    w_q: torch.Tensor,
    w_max: torch.Tensor,
    w_min: torch.Tensor,
    w_avg: torch.Tensor,
    block_size: int = 64,
    rope_theta: float | None = None,
) -> torch.Tensor:
    r"""How far the gate is from the truth; it has no other loss.

    .. math:: \mathcal L = \operatorname{mean}_I\, \mathrm{KL}(\hat g_I \Vert p_I)

    The first quarter of the blocks of queries is left out: they see few blocks.

    Args:
        q, k, w_q, w_max, w_min, w_avg, block_size, rope_theta: as in `gate`.
        truth: of `ground_truth`, [B, H, NQ, NK].

    Returns:
        A number, float32 (float64 for float64), differentiable in all but the truth.

    Raises:
        ValueError, TypeError: as `gate`.

    Cost: that of `gate`.
    Source: Gao et al. 2024, arXiv:2410.13276; the quarter is the released code's, which divides by the number
        of entries, not of rows.
    """
    weights = dict(w_q=w_q, w_max=w_max, w_min=w_min, w_avg=w_avg)
    _check(q, k, weights, block_size, rope_theta, None)
    scores, see = _scores(q, k, weights, block_size, rope_theta)
    expected = (scores.shape[0], q.shape[2], *scores.shape[3:])
    if tuple(truth.shape) != expected:
        raise ValueError(
            f"truth has shape {tuple(truth.shape)}, expected [B, H, NQ, NK] = {expected} as the gate"
        )
    start = scores.shape[3] // 4
    return engine.divergence(truth[:, :, start:], scores.flatten(1, 2)[:, :, start:], see[start:])


def _check(q, k, weights, block_size, rope_theta, cu_seqlens):
    block_select.check(q, k, cu_seqlens=cu_seqlens, block_size=block_size)
    sizes = dict(H=q.shape[2], HKV=k.shape[2], K=q.shape[3])
    engine.check(sizes, q, weights, rope_theta)


def _pooled(q, k, weights, BS, rope_theta):
    """The gate's queries [B, NQ, H, M] and keys [B, NK, HKV, M], in the dtype of q."""
    means = torch.cat([x.mean(2) for x in engine.blocks(q, BS)], dim=1)
    # [B, NQ, H, K] x [H, K, M] -> [B, NQ, H, M]
    qg = torch.einsum("bihk,hkm->bihm", means, weights["w_q"].to(q.dtype))
    kg = engine.summaries(k, weights["w_max"], weights["w_min"], weights["w_avg"], BS)
    first = torch.arange(qg.shape[1], device=q.device) * BS
    return engine.rotate(qg, first, rope_theta), engine.rotate(kg, first, rope_theta)


def _scores(q, k, weights, BS, rope_theta):
    """Scores of the gate, [B, HKV, G, NQ, NK], and which of them it may look at, [NQ, NK]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        qg, kg = _pooled(q.to(wide), k.to(wide), weights, BS, rope_theta)
        i = torch.arange(qg.shape[1], device=q.device)
        return _product(qg, kg), i <= i[:, None]


def _product(qg, kg):
    # [B, NQ, HKV, G, M] x [B, NK, HKV, M] -> [B, HKV, G, NQ, NK]
    return torch.einsum("bihgm,bjhm->bhgij", qg.unflatten(2, (kg.shape[2], -1)), kg) * qg.shape[3] ** -0.5


def _choose(qg, kg, rows, top_k, threshold):
    """The mask of some rows, [B, H, rows, NK]."""
    s = _product(qg[:, rows], kg).flatten(1, 2)
    j = torch.arange(kg.shape[1], device=s.device)
    i = j[rows, None]
    p = s.masked_fill(j > i, -torch.inf).softmax(-1).float()
    if top_k is None:
        return ((p > threshold) | (j == i)) & (j <= i)
    p = p.masked_fill(j == i, torch.inf).masked_fill(j > i, -torch.inf)
    best = p.sort(dim=-1, descending=True, stable=True)[1][..., :top_k]
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, best, True) & (j <= i)
