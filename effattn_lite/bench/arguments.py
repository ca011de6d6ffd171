"""What the bench makes of inputs and options before a call: arguments that are tensors themselves."""

import torch

from effattn_lite.ops.double_sparsity import calibrate

__all__ = ["arguments_of"]


def arguments_of(inputs, options):
    """All keyword arguments of a call.

    Args:
        inputs: tensors by name.
        options: static arguments. Of these `share` becomes sets of blocks drawn at random, and `r` the
            channels that DoubleSparsity calibrates on the first 2,048 tokens.
    """
    made = inputs | options
    if "share" in made:
        made["block_mask"] = _random_blocks(made["q"], made["block_size"], made.pop("share"))
    if "r" in made:
        made["channels"] = calibrate(made["q"][:, :2_048], made["k"][:, :2_048], r=made.pop("r"))
    return made


def _random_blocks(q, block_size, share):
    """A mask [B, H, NB, NB]: the own block, and of earlier ones as many as make up the share, at random."""
    (B, T, H, _), rng = q.shape, torch.Generator(q.device).manual_seed(0)
    i = torch.arange(-(-T // block_size), device=q.device)
    rank = torch.rand(B, H, len(i), len(i), generator=rng, device=q.device)
    rank = rank.masked_fill(i > i[:, None], 2.0).masked_fill(i == i[:, None], -1.0)
    order = rank.argsort(dim=-1).argsort(dim=-1)
    return (order < (share * (i + 1)).round().clamp(min=1)[:, None]) & (i <= i[:, None])
