"""What the layers share: their interface, rotary positions, norms, a short convolution, delta-rule mixers."""

import torch
from torch import nn
from torch.nn import functional as F

Cache = dict[str, torch.Tensor]
"""What decoding carries from one token to the next; its memory is the sum of `nbytes`."""


class Mixer(nn.Module):
    """A causal sequence mixer, [B, T, D] -> [B, T, D], that can go on from a cache.

    Three calls compute the same function: `forward` over a whole sequence, `prefill` over any part of it,
    `step` over one token. A subclass gives `prefill` and `step`.
    """

    def forward(self, x: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Mix a whole sequence, or packed sequences; x is [B, T, D], so is the result."""
        return self.prefill(x, cu_seqlens=cu_seqlens)[0]

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """Mix the next T tokens, x [B, T, D], after those in the cache; returns y and the cache after them.

        `cu_seqlens` packs sequences into one batch row; it excludes a cache on the way in.
        """
        raise NotImplementedError

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """Mix one token a row, x [B, D]; returns y [B, D] and the cache after it."""
        raise NotImplementedError


class GroupedAttention(Mixer):
    """A mixer with H query heads and HKV heads of keys and values: project, attend, project back.

    A subclass gives `prefill`; a step is a prefill of one token.

    Args:
        width: D.
        heads: H query heads.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K = V; default D / H.

    Source: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, width: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or width // heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, T, H, K], keys and values [B, T, HKV, K] of x [B, T, D], not yet rotated."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return split_heads(q, self.heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]: one query on the cache."""
        y, cache = self.prefill(x[:, None], cache)
        return y[:, 0], cache


class RotaryAttention(GroupedAttention):
    """Grouped attention that rotates by the token's place in the text and caches rotated keys.

    A subclass gives `attend(q, k, v, cu_seqlens) -> o`, and `keep(x)`: what of a cache a later token sees.

    Args:
        width, heads, kv_heads, head_dim: as `GroupedAttention`.
        rope_theta: base of the rotary wavelengths; None leaves positions out.

    Cache: rotated keys, and values, that `keep` leaves, [B, n, HKV, K], and how many tokens came before.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10_000.0,
    ):
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        self.rope_theta = rope_theta

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave no cache."""
        q, k, v = self.project(x)
        position = torch.arange(x.shape[1], device=x.device)
        seen = torch.as_tensor(x.shape[1], device=x.device)
        if cache:
            position, seen = position + cache["length"], seen + cache["length"]
        if self.rope_theta is not None:
            # only differences of positions count, so packed sequences need not begin at 0
            q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        if cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        y = self.o_proj(self.attend(q, k, v, cu_seqlens).flatten(2))
        if cu_seqlens is not None:
            return y, {}
        return y, {"k": self.keep(k), "v": self.keep(v), "length": seen}


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[..., heads * K] -> [..., heads, K]."""
    return x.unflatten(-1, (heads, -1))


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    """Rotary positions: turn each pair of channels by an angle that grows with the position.

    .. math:: (x_i, x_{i+K/2}) \\mapsto (x_i \\cos\\omega_i p - x_{i+K/2} \\sin\\omega_i p,\\;
        x_{i+K/2} \\cos\\omega_i p + x_i \\sin\\omega_i p), \\qquad \\omega_i = \\theta^{-2i/K}

    Args:
        x: [B, T, H, K], K even.
        positions: [T] or [B, T], any integers or reals.
        theta: base of the wavelengths.

    Source: Su et al. 2021, arXiv:2104.09864; pairs are (i, i + K/2), as GPT-NeoX and Llama lay them out.
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    omega = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = positions.to(wide)[..., None, None] * omega  # [..., T, 1, K/2]
    a, b = x.to(wide).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class HeadNorm(nn.Module):
    """Normalise each head's read-out by itself, [..., H, V]: layer norm, or RMS norm without a mean.

    It stands where softmax attention divides by the sum of its weights.
    """

    def __init__(
        self, heads: int, head_dim: int, *, center: bool = False, affine: bool = True, eps: float = 1e-5
    ):
        super().__init__()
        self.center, self.eps = center, eps
        self.weight = nn.Parameter(torch.ones(heads, head_dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(heads, head_dim)) if affine and center else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last axis; x is [..., H, V]."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.center:
            y = y - y.mean(-1, keepdim=True)
        y = y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


class ShortConvolution(nn.Module):
    r"""Mix each channel with its last few tokens, then SiLU: an n-gram's worth of position, before a state.

    .. math:: y_t = \mathrm{SiLU}\Bigl(b + \sum_{i=0}^{n-1} w_i \odot x_{t-n+1+i}\Bigr)

    Tokens before the first are zero; in packed sequences no token sees another sequence.

    Args:
        width: D channels, each convolved by itself.
        size: n taps, the last of which is the token's own.
        bias: learn b as well.
        activate: apply SiLU.

    Cost: 2 B T D n FLOPs.
    Cache: the tail, the last n - 1 inputs, [N, n - 1, D].
    """

    def __init__(self, width: int, size: int = 4, *, bias: bool = False, activate: bool = True):
        super().__init__()
        self.size, self.activate = size, activate
        # first values as nn.Conv1d draws them
        self.weight = nn.Parameter(torch.empty(width, size).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def prefill(
        self, x: torch.Tensor, tail: torch.Tensor | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next T tokens, x [B, T, D], after the tail; returns y and the tail after them.

        Packed sequences, which exclude a tail on the way in, leave one each.
        """
        B, T, D = x.shape
        before = self.size - 1
        if tail is None:
            tail = x.new_zeros(B, before, D)
        window = torch.cat((tail, x), dim=1)  # [B, n - 1 + T, D]
        seen = None
        # a copy: a view would keep the whole window alive in the cache
        end = window[:, T:].clone()
        if cu_seqlens is not None:
            token = torch.arange(T, device=x.device)
            owner = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
            seen = token - cu_seqlens[owner]
            last = cu_seqlens[1:, None] + torch.arange(before, device=x.device)  # [N, n - 1], in window
            inside = last - before >= cu_seqlens[:-1, None]
            end = window[0, last].masked_fill(~inside[..., None], 0)
        wide = window.to(torch.promote_types(x.dtype, torch.float32))
        taps = [wide[:, i : i + T] for i in range(self.size)]
        if seen is not None:
            taps = [z.masked_fill((seen < before - i)[:, None], 0) for i, z in enumerate(taps)]
        return self._mix(taps).to(x.dtype), end

    def step(self, x: torch.Tensor, tail: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token, x [B, D]; returns y [B, D] and the tail after it."""
        y, tail = self.prefill(x[:, None], tail)
        return y[:, 0], tail

    def _mix(self, taps):
        y = sum(z * w for z, w in zip(taps, self.weight.unbind(1), strict=True))
        y = y if self.bias is None else y + self.bias
        return F.silu(y) if self.activate else y


class DeltaMixer(Mixer):
    """A mixer by a delta rule: short convolutions of q, k and v, queries and keys of length 1, a state.

    A subclass names its op and step, and gives `gates(x) -> keyword arguments` and `output(x, o) -> y`.

    Args:
        width: D.
        heads: H query and key heads.
        key_dim: K.
        value_heads: HV, a multiple of H.
        value_dim: V.
        conv_size: taps of the convolutions.
        impl: as in the op.

    Cache: the state [N, HV, K, V], float32, and the convolutions' tails; its size does not grow.
    """

    op = step_op = None

    def __init__(
        self, width: int, heads: int, *, key_dim: int, value_heads: int, value_dim: int, conv_size: int = 4,
        impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.impl = impl
        self.heads = {"q": heads, "k": heads, "v": value_heads}
        sizes = {"q": heads * key_dim, "k": heads * key_dim, "v": value_heads * value_dim}
        self.proj = nn.ModuleDict({name: nn.Linear(width, n, bias=False) for name, n in sizes.items()})
        self.conv = nn.ModuleDict({name: ShortConvolution(n, conv_size) for name, n in sizes.items()})
        self.o_proj = nn.Linear(sizes["v"], width, bias=False)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        qkv, tails = self._convolve("prefill", x, cache, cu_seqlens=cu_seqlens)
        o, state = self.op(
            **qkv, **self.gates(x), initial_state=cache["state"] if cache else None, output_final_state=True,
            cu_seqlens=cu_seqlens, impl=self.impl,
        )  # fmt: skip
        return self.output(x, o), {"state": state} | tails

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        if not cache:
            y, cache = self.prefill(x[:, None])
            return y[:, 0], cache
        qkv, tails = self._convolve("step", x, cache)
        o, state = self.step_op(**qkv, **self.gates(x), state=cache["state"], impl=self.impl)
        return self.output(x, o), {"state": state} | tails

    def _convolve(self, how, x, cache, **more):
        heads, tails = {}, {}
        for name, conv in self.conv.items():
            y, tails[name] = getattr(conv, how)(self.proj[name](x), cache[name] if cache else None, **more)
            y = split_heads(y, self.heads[name])
            heads[name] = y if name == "v" else unit(y)
        return heads, tails


def unit(x: torch.Tensor) -> torch.Tensor:
    """x over its length along the last axis; a vector much shorter than 1e-3 becomes shorter than 1."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def first_steps(n: int) -> torch.Tensor:
    """First values c [n] of a step's bias: softplus(c) is log-uniform between 0.001 and 0.1."""
    return (10 ** torch.empty(n).uniform_(-3, -1)).expm1().log()
