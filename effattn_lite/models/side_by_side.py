"""Several mixers that read the same input, and whose outputs are added."""

from collections.abc import Mapping

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer
from effattn_lite.models.config import Part
from effattn_lite.models.kinds import build_part


class SideBySide(Mixer):
    r"""A sum of mixers: :math:`y = \sum_i g_i M_i(x)`.

    Args:
        width: D.
        parts: name -> mixer, with its gain g.
        place: number of the layer, and of all layers.

    Raises:
        ValueError: a part with a carry: the stream is carried once, by the layer.

    Cost: those of the parts.
    Cache: name -> what that part keeps.
    """

    shares = True
    """`prefill` and `step` take `shared`."""
    placed = True
    """The constructor takes `place`."""

    def __init__(self, width: int, *, parts: Mapping[str, Part], place: tuple[int, int]):
        super().__init__()
        if any(part.carry != 1 for part in parts.values()):
            raise ValueError(f"carries are {[part.carry for part in parts.values()]}, expected 1 each")
        self.gains = {name: part.gain for name, part in parts.items()}
        self.parts = nn.ModuleDict(
            {name: build_part(width, part, place=place) for name, part in parts.items()}
        )

    def prefill(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        return self._run("prefill", x, cache, shared, cu_seqlens=cu_seqlens)

    def step(
        self, x: torch.Tensor, cache: Cache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        return self._run("step", x, cache, shared)

    def _run(self, how, x, cache, shared, **more):
        y, after = 0, {}
        for name, part in self.parts.items():
            given = more | ({"shared": shared} if getattr(part, "shares", False) else {})
            z, after[name] = getattr(part, how)(x, cache[name] if cache else None, **given)
            y = y + self.gains[name] * z
        return y, after
