"""NSA as a layer: three branches with keys and values of their own, summaries that are learnt, gates."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, GroupedAttention, rotate, split_heads
from effattn_lite.ops.nsa import nsa, windows


class Summary(nn.Module):
    r"""One vector for a span of l: each token gets its place in the span added, then an MLP reads them all.

    .. math:: \tilde k = W_2\, \mathrm{GELU}(W_1\, [k_1 + p_1; \dots; k_l + p_l])

    Args:
        head_dim: K; the hidden layer is as wide.
        size: l.
    """

    def __init__(self, head_dim: int, size: int):
        super().__init__()
        self.place = nn.Parameter(torch.randn(size, head_dim) * 0.02)
        self.enter = nn.Linear(size * head_dim, head_dim)
        self.leave = nn.Linear(head_dim, head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Spans [B, NC, l, HKV, K] -> [B, NC, HKV, K]; all heads share the MLP."""
        x = (x + self.place[:, None]).transpose(2, 3).flatten(3)  # [B, NC, HKV, l K]
        return self.leave(F.gelu(self.enter(x)))


class NSA(GroupedAttention):
    r"""Project, summarise, attend in three ways, weigh them by :math:`\sigma(W_g x)` a head, project.

    Queries and keys are rotated; a summary is made of keys that are not, and rotated as its first token.

    Args:
        width: D.
        heads: H query heads.
        block_size, top_n, window, cmp_size, cmp_stride: as in the op.
        kv_heads: HKV heads of keys and values, a divisor of H; default H. 16 query heads a key head fill the
            kernels' tiles.
        head_dim: K = V; default D / H.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        impl: as in the op.

    Cost: 2 B T D K (2 H + 6 HKV) FLOPs of projections, 4 B T HKV K^2 l / d of summaries, plus the op's.
    Cache: keys and values of the selected branch, and summaries, of all tokens; of the last W for the near
        branch; keys and values that no whole span has taken, fewer than l.
    Source: Yuan et al. 2025, arXiv:2502.11089. Differs: a gate is one linear map; positions are said above.
    """

    def __init__(
        self, width: int, heads: int, *, block_size: int = 64, top_n: int = 16, window: int = 512,
        cmp_size: int = 32, cmp_stride: int = 16, kv_heads: int | None = None, head_dim: int | None = None,
        rope_theta: float | None = 10_000.0, impl: str = "auto",
    ):  # fmt: skip
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        self.rope_theta, self.window = rope_theta, window
        self.spans = dict(cmp_size=cmp_size, cmp_stride=cmp_stride)
        self.options = dict(block_size=block_size, top_n=top_n, window=window, impl=impl)
        names, inner = ("k_rest", "v_rest", "k_win", "v_win"), self.kv_heads * self.head_dim
        self.proj = nn.ModuleDict({name: nn.Linear(width, inner, bias=False) for name in names})
        self.summary = nn.ModuleDict({name: Summary(self.head_dim, cmp_size) for name in ("k_cmp", "v_cmp")})
        self.gate_proj = nn.Linear(width, 3 * heads)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave no cache."""
        cache = cache or {}
        new = dict(zip(("q", "k", "v"), self.project(x), strict=True))
        new |= {name: split_heads(proj(x), self.kv_heads) for name, proj in self.proj.items()}
        before = cache.get("length", torch.zeros((), dtype=torch.long, device=x.device))
        position = before + torch.arange(x.shape[1], device=x.device)
        for name in ("q", "k", "k_win"):
            new[name] = self._rotate(new[name], position)
        q, (k, v), near = new["q"], _after(cache, new, "k", "v"), _after(cache, new, "k_win", "v_win")
        summaries, rest = self._summarise(cache, _after(cache, new, "k_rest", "v_rest"), cu_seqlens)
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (3, -1)).unbind(-2)
        y = nsa(
            q, k, v, **dict(zip(("g_cmp", "g_slc", "g_win"), gates, strict=True)), **summaries,
            k_win=near[0], v_win=near[1], **self.spans, **self.options, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = self.o_proj(y.flatten(2))
        if cu_seqlens is not None:
            return y, {}
        # copies: views would keep all of the near branch alive
        last = {name: x[:, -self.window :].clone() for name, x in zip(("k_win", "v_win"), near, strict=True)}
        return y, {"k": k, "v": v, "length": before + x.shape[1]} | last | summaries | rest

    def _summarise(self, cache, left, cu_seqlens):
        """Summaries of all whole spans, and what is left for those that are not whole yet."""
        (size, stride), done, rest = self.spans.values(), {}, {}
        before = cache["k_cmp"].shape[1] if cache else 0
        for name, x in zip(("k_cmp", "v_cmp"), left, strict=True):
            spans = windows(x, size, stride, cu_seqlens)
            y = self.summary[name](spans)
            if name == "k_cmp":
                # where each span begins
                t = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
                y = self._rotate(y, windows(t, size, stride, cu_seqlens)[0, :, 0, 0, 0] + before * stride)
            done[name] = torch.cat((cache[name], y), dim=1) if cache else y
            rest[name.replace("cmp", "rest")] = x[:, spans.shape[1] * stride :].clone()
        return done, rest

    def _rotate(self, x, position):
        return x if self.rope_theta is None else rotate(x, position, self.rope_theta)


def _after(cache, new, *names):
    """Tensors of the new tokens, each behind those of the cache, if there is one."""
    return [torch.cat((cache[n], new[n]), dim=1) if cache else new[n] for n in names]
