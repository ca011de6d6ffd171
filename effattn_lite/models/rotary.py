"""Rotary positions of any base, part, layout and stretching."""

import math

import torch

from effattn_lite.models.config import Rope


def turn(x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    r"""Turn pairs of channels by angles that grow with the position.

    .. math:: (a, b) \mapsto m\,(a \cos\omega_i p - b \sin\omega_i p,\; b \cos\omega_i p + a \sin\omega_i p)

    Args:
        x: [B, T, H, K].
        positions: [B, T] or [1, T].
        rope: which channels, how fast, and the gain m.

    Returns:
        [B, T, H, K]; channels after `rope.dims` as they were.

    Source: Su et al. 2021, arXiv:2104.09864, eq. (34).
    """
    dims = rope.dims or x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    omega = frequencies(rope, dims, device=x.device, dtype=wide)
    angle = positions.to(wide)[..., None, None] * omega  # [B, T, 1, dims / 2]
    cos, sin = angle.cos(), angle.sin()
    turned, rest = x[..., :dims].to(wide), x[..., dims:]
    # pairs on an axis of their own
    axis, shape = (-1, (-1, 2)) if rope.adjacent else (-2, (2, -1))
    a, b = turned.unflatten(-1, shape).unbind(axis)
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=axis)
    turned = (gain(rope) * pairs).flatten(-2).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def gain(rope: Rope) -> float:
    """Factor on the rotated vectors: longer texts have sharper scores under YaRN, else 1."""
    if rope.scaling != "yarn":
        return 1.0
    return 0.1 * math.log(rope.factor) + 1 if rope.gain is None else rope.gain


def frequencies(rope: Rope, dims: int, *, device=None, dtype=torch.float32) -> torch.Tensor:
    r"""Angle a token of every pair, [dims / 2], radians: :math:`\theta^{-2i/\mathrm{dims}}`, stretched.

    Slow pairs, which do not turn `rope.low` times in `rope.context` tokens, become `rope.factor` times
    slower; fast ones, which turn more than `rope.high` times, stay; between them a ramp mixes the two.

    Args:
        rope: base and stretching.
        dims: channels that turn.
        device, dtype: of the result.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2 (YaRN); the released code of Llama 3.1 ("llama3"),
    whose ramp is linear in turns, where YaRN's is linear in the pair's number.
    """
    pair = torch.arange(dims // 2, device=device, dtype=dtype)
    omega = rope.theta ** (-2 * pair / dims)
    if rope.scaling is None:
        return omega
    if rope.scaling == "linear":
        return omega / rope.factor
    if rope.scaling == "llama3":
        turns = rope.context * omega / (2 * math.pi)
        stay = ((turns - rope.low) / max(rope.high - rope.low, 1e-9)).clamp(0, 1)
    else:
        start, end = (_pair_of(rope, dims, turns) for turns in (rope.high, rope.low))
        if rope.truncate:
            start, end = math.floor(start), math.ceil(end)
        start, end = max(start, 0), min(end, dims - 1)
        stay = 1 - ((pair - start) / max(end - start, 1e-3)).clamp(0, 1)
    return omega * (stay + (1 - stay) / rope.factor)


def _pair_of(rope, dims, turns):
    """Number of the pair that turns so often in the context; not whole."""
    return dims * math.log(rope.context / (2 * math.pi * turns)) / (2 * math.log(rope.theta))
