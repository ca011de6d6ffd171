"""What one layer keeps for all later ones: keys and values once for half a model, or a scan's output."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer, split_heads
from effattn_lite.layers.mamba import Mamba
from effattn_lite.models.config import Rope
from effattn_lite.models.rotary import turn
from effattn_lite.models.rows import LENGTH, Rows, places


class KeysValues(Mixer):
    r"""Keys and values that later layers borrow; it adds nothing to the stream itself, y = 0.

    .. math:: k_t = \operatorname{turn}(W_K x_t), \qquad v_t = W_V x_t

    Args:
        width: D.
        kv_heads: HKV.
        head_dim: K = V.
        rope: rotary positions; None has none.
        lends: name under which later layers find them.

    Cost: 4 B T HKV D K FLOPs.
    Cache: turned keys, and values, of all tokens, [N, n, HKV, K], and their number, [N].
    Source: Sun et al. 2024, arXiv:2405.05254, eq. (4).
    """

    shares = True

    def __init__(
        self, width: int, kv_heads: int, head_dim: int, *, rope: Rope | None = None, lends: str = "kv"
    ):
        super().__init__()
        self.kv_heads, self.rope, self.lends = kv_heads, rope, lends
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)

    def prefill(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """Keep and lend the next T tokens' keys and values; x is [B, T, D], what it returns is 0."""
        position, length = places(x, cache, cu_seqlens)
        k, v = (split_heads(proj(x), self.kv_heads) for proj in (self.k_proj, self.v_proj))
        k = k if self.rope is None else turn(k, position, self.rope)
        shared[self.lends] = rows = Rows.extend(cache, {"k": k, "v": v}, cu_seqlens)
        return torch.zeros_like(x), rows.keep(lambda z: z) | {LENGTH: length}

    def step(
        self, x: torch.Tensor, cache: Cache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        y, cache = self.prefill(x[:, None], cache, shared=shared)
        return y[:, 0], cache


class LendingMamba(Mamba):
    """Mamba's block that lends what its scan reads out, before the gate, to gated memory units.

    Args:
        width: D.
        lends: name under which later layers find it.
        options: as `Mamba`.

    Source: Ren et al. 2025, arXiv:2507.06607, and the released code.
    """

    shares = True

    def __init__(self, width: int, *, lends: str = "memory", **options):
        super().__init__(width, **options)
        self.lends = lends

    def prefill(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        shared[self.lends], z, cache = self.scan(x, cache, cu_seqlens=cu_seqlens)
        return self.out_proj(shared[self.lends] * F.silu(z)), cache

    def step(
        self, x: torch.Tensor, cache: Cache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        shared[self.lends], z, cache = self.scan_step(x, cache)
        return self.out_proj(shared[self.lends] * F.silu(z)), cache


class GatedMemory(Mixer):
    r"""Gated memory unit: reads what an earlier layer lent of this very token, and keeps nothing.

    .. math:: y_t = W_2\,\bigl(\mathrm{SiLU}(W_1 x_t) \odot m_t\bigr)

    Args:
        width: D.
        memory: entries of m.
        borrows: its name.

    Cost: 4 B T D memory FLOPs: no token meets another.
    Cache: none.
    Source: Ren et al. 2025, arXiv:2507.06607, section 2.
    """

    shares = True

    def __init__(self, width: int, memory: int, *, borrows: str = "memory"):
        super().__init__()
        self.borrows = borrows
        self.in_proj = nn.Linear(width, memory, bias=False)
        self.out_proj = nn.Linear(memory, width, bias=False)

    def prefill(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]."""
        return self.out_proj(F.silu(self.in_proj(x)) * shared[self.borrows]), {}

    def step(
        self, x: torch.Tensor, cache: Cache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        return self.prefill(x, shared=shared)
