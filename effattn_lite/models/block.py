"""One layer of a model: a mixer, a feed-forward, and where norms and residuals stand."""

import torch
from torch import nn

from effattn_lite.layers.common import Mixer
from effattn_lite.models.config import Config, Layer
from effattn_lite.models.kinds import build_part
from effattn_lite.models.norm import build_norm

BlockCache = dict[str, dict]


class Block(nn.Module):
    r"""A mixer and a feed-forward around the residual stream; with N for a norm, M and F for the parts.

    | placement | the stream becomes |
    |---|---|
    | pre | :math:`x + M(N x)`, then :math:`x + F(N x)` |
    | pre_post | :math:`x + N M(N x)`, then :math:`x + N F(N x)` |
    | post | :math:`x + N M(x)`, then :math:`x + N F(x)` |
    | parallel | :math:`x + M(N x) + F(N x)`, one norm |
    | post_residual | :math:`N x + M(N x)`, then :math:`N x + F(N x)` |

    Each sum is `carry` times the first term and `gain` times the second. A part that is None is left out. A
    class with `norms = True` norms its input itself: the N before it is left out.

    Args:
        config: of the model.
        layer: which of its layers.
    """

    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        self.placement, self.layer = config.placement, layer
        parts = {"mixer": layer.mixer, "feed_forward": layer.feed}
        self.parts = {name: part for name, part in parts.items() if part is not None}
        place = layer.index, len(config.layers)
        for name, part in self.parts.items():
            self.add_module(name, build_part(config.width, part, place=place))
            if self.placement == "parallel" and name == "feed_forward" and "mixer" in self.parts:
                continue
            if self.placement != "post" and not getattr(type(getattr(self, name)), "norms", False):
                self.add_module(f"{name}_norm", build_norm(config.norm, config.width))
            if self.placement in ("pre_post", "post"):
                self.add_module(f"{name}_post_norm", build_norm(config.norm, config.width))

    def prefill(
        self,
        x: torch.Tensor,
        cache: BlockCache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, BlockCache]:
        """The next T tokens, x [B, T, D]; `shared` is what layers of one call tell each other."""
        return self._run("prefill", x, cache, shared, cu_seqlens=cu_seqlens)

    def step(
        self, x: torch.Tensor, cache: BlockCache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, BlockCache]:
        """The next token, x [B, D]."""
        return self._run("step", x, cache, shared)

    def _run(self, how, x, cache, shared, **more):
        after, normed = {}, {}
        for name in self.parts:
            if self.placement == "parallel":
                # both parts read the stream before either has written to it
                normed.setdefault("x", self._norm(f"{name}_norm", x))
            z = normed["x"] if normed else self._norm(f"{name}_norm", x)
            y, held = self._part(name, how, z, (cache or {}).get(name), shared, more)
            if held:
                after[name] = held
            part, base = self.parts[name], z if self.placement == "post_residual" else x
            y = self._norm(f"{name}_post_norm", y)
            x = _scaled(part.carry, base) + _scaled(part.gain, y)
        return x, after

    def _part(self, name, how, x, cache, shared, more):
        module = getattr(self, name)
        if not isinstance(module, Mixer):
            return module(x), None
        if getattr(module, "shares", False):
            more = more | {"shared": shared}
        return getattr(module, how)(x, cache, **more)

    def _norm(self, name, x):
        norm = getattr(self, name, None)
        return x if norm is None else norm(x)


def _scaled(factor, x):
    return x if factor == 1 else factor * x
