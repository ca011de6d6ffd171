"""FlexAttention, compiled, with the mask of a sparse call: the peer that every pattern has."""

import functools

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from effattn_lite.bench.seen import SIDE

__all__ = ["block_mask_of", "flex_call"]


@functools.cache
def _compiled():
    # one mask is one compiled kernel, and all share a limit, beyond which nothing is compiled any more
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(flex_attention, dynamic=False)


def _no_later(b, h, t, j):
    return j <= t


def _all(b, h, t, j):
    return t >= 0


def block_mask_of(seen, counts, T):
    """FlexAttention's block mask: blocks of SIDE x SIDE that are seen wholly, partly or not at all.

    Where blocks are whole but for causality, causality is all that the kernel masks: one kernel then serves
    every method of this kind.

    Args:
        seen: a `Seen`.
        counts: its pairs in each block, as `tally` returns them.
        T: tokens.
    """
    mod = seen.see if not seen.whole else _no_later if seen.causal else _all
    some, full = counts > 0, counts == SIDE * SIDE
    part = some & ~full
    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(full), BLOCK_SIZE=SIDE, mask_mod=mod, seq_lengths=(T, T)
    )  # fmt: skip


def _listed(chosen):
    """How many blocks of keys each block of queries has, and their numbers first among all."""
    order = chosen.to(torch.int8).sort(dim=-1, descending=True, stable=True)[1]
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def flex_call(q, k, v, seen, counts):
    """A call that returns o [B, T, H, V] of attention to what is seen."""
    mask, grouped = block_mask_of(seen, counts, q.shape[1]), q.shape[2] != k.shape[2]
    heads = [x.transpose(1, 2) for x in (q, k, v)]  # [B, H, T, K], as torch has them
    return lambda: _compiled()(*heads, block_mask=mask, enable_gqa=grouped).transpose(1, 2)
