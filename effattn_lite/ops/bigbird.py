"""BigBird: the public operators; the sets, drawn once, and block-sparse attention on them."""

from functools import lru_cache

import numpy as np
import torch
from torch.nn.functional import pad

from effattn_lite.ops import common
from effattn_lite.ops.block_sparse_attention import block_sparse_attention


def bigbird(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int = 64,
    random_blocks: int = 3,
    seed: int = 0,
    return_lse: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Blocks of tokens see their neighbours, the first and last block, and a few drawn at random.

    .. math:: \mathcal I_h(i) = \{i - 1, i, i + 1\} \cup \{0, N_B - 1\} \cup \mathcal R_h(i), \qquad
        \mathcal I_h(0) = \mathcal I_h(N_B - 1) = \{0, \dots, N_B - 1\}

    .. math:: o_t = \sum_{j \in \mathcal S(t)} \operatorname{softmax}_j(s\, q_t^\top k_j)\, v_j, \qquad
        \mathcal S(t) = \{j : \lfloor j / B_S \rfloor \in \mathcal I(\lfloor t / B_S \rfloor)\}

    Through the first and last block any token reaches any other in two steps.

    Args:
        q: queries, [B, T, H, K], positions already in them.
        k: keys, [B, T, HKV, K]; H is a multiple of HKV.
        v: values, [B, T, HKV, V].
        block_size: B_S >= 1, tokens in a block; NB = ceil(T / block_size), and up to NB = 4 all is seen.
        random_blocks: r >= 0 blocks that a block draws beyond those it sees anyway, in each head for itself.
        seed: of the draw; layers of a model take different ones.
        return_lse: return the log-sum-exp of each row as well.
        scale: s; default K ** -0.5.
        cu_seqlens: edges of packed sequences, [N + 1], with B = 1; each has the sets of its own length.
        impl: "torch", "triton" or "auto".

    Returns:
        o, [B, T, H, V]; with return_lse also lse, [B, T, H].

    Raises:
        ValueError: shapes do not fit, block_size < 1, or random_blocks or seed < 0.
        TypeError, NotImplementedError: as `block_sparse_attention`.

    Cost: B H T (5 + r) B_S (2 K + 2 V) FLOPs in products, and B_S T pairs for each of two global blocks. The
        sets take H NB^2 bytes, one a pair of blocks.
    Source: Zaheer et al. 2020, arXiv:2007.14062, with global blocks of the text's own (ITC); code
        https://github.com/google-research/bigbird. Differs: any number of tokens and blocks; all blocks can
        be drawn, where the code takes those of the text's first 2 r + 5, or of its first 1,024 tokens.
    """
    common.check_shape("q", q, "B T H K", {})
    _check(block_size, random_blocks, seed)
    (B, T, H, _), more = q.shape, dict(block_size=block_size, random_blocks=random_blocks, seed=seed)
    if cu_seqlens is not None:
        common.check_cu_seqlens(cu_seqlens, B, T)
        sets = [select(n, H, **more, device=q.device) for n in cu_seqlens.diff().tolist()]
        NK = max(mask.shape[3] for mask in sets)
        mask = torch.cat([pad(mask, (0, NK - mask.shape[3])) for mask in sets], dim=2)
    else:
        mask = select(T, H, **more, device=q.device)
    return block_sparse_attention(
        q,
        k,
        v,
        block_mask=mask.expand(B, *mask.shape[1:]),
        block_size=block_size,
        causal=False,
        scale=scale,
        cu_seqlens=cu_seqlens,
        return_lse=return_lse,
        impl=impl,
    )


def select(
    T: int,
    H: int,
    *,
    block_size: int = 64,
    random_blocks: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Which blocks of keys a block of queries sees: neighbours, first, last, and r others at random.

    The same arguments give the same sets, on every device. Every block that is not seen anyway gets a random
    number, and those of the r smallest are drawn; the lower block first where two are equal.

    Args:
        T: tokens.
        H: heads; each draws for itself.
        block_size, random_blocks, seed: as in `bigbird`.
        device: of the result.

    Returns:
        block_mask, [1, H, NB, NB], bool, NB = ceil(T / block_size): the sets of all batch rows.

    Raises:
        ValueError: block_size < 1, or random_blocks or seed < 0.

    Cost: H NB^2 random numbers on the CPU, once; the last few results are kept.
    Source: Zaheer et al. 2020, arXiv:2007.14062.
    """
    _check(block_size, random_blocks, seed)
    NB = -(-T // block_size)
    return torch.ops.effattn_lite.bigbird_sets(NB, H, random_blocks, seed, torch.device(device))


def _check(block_size, random_blocks, seed):
    for name, x, least in (
        ("block_size", block_size, 1),
        ("random_blocks", random_blocks, 0),
        ("seed", seed, 0),
    ):
        if x < least:
            raise ValueError(f"{name} is {x}, expected >= {least}")


@lru_cache(maxsize=16)
def _draw(NB, H, random_blocks, seed):
    """The sets of all heads, [H, NB, NB]."""
    i = np.arange(NB)
    edge = (i == 0) | (i == NB - 1)
    fixed = (abs(i[:, None] - i) <= 1) | edge[:, None] | edge
    rng, sets = np.random.default_rng(seed), np.empty((H, NB, NB), dtype=bool)
    for mask in sets:  # head by head: random numbers of all heads are many more bytes than their sets
        order = np.where(fixed, 1.0, rng.random((NB, NB))).argsort(axis=1, kind="stable")
        mask[:] = fixed
        np.put_along_axis(mask, order[:, :random_blocks], True, axis=1)
    return sets


def _sets(NB, H, random_blocks, seed, device):
    # a copy: what is kept must not be written to
    return torch.tensor(_draw(NB, H, random_blocks, seed)[None], device=device)


def _sets_fake(NB, H, random_blocks, seed, device):
    return torch.empty((1, H, NB, NB), dtype=torch.bool, device=device)


common.register(
    "bigbird_sets",
    "(SymInt NB, int H, int random_blocks, int seed, Device device) -> Tensor",
    _sets,
    _sets_fake,
)
