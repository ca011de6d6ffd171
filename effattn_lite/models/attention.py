"""Softmax attention with every option that the models here use."""

import torch
from torch import nn

from effattn_lite.layers.common import Cache, Mixer, split_heads
from effattn_lite.models.config import Norm, Rope
from effattn_lite.models.norm import build_norm
from effattn_lite.models.rotary import turn
from effattn_lite.models.rows import LENGTH, Rows, places
from effattn_lite.ops.engines import softmax_attention as engine


class Attention(Mixer):
    r"""Grouped softmax attention: project, norm, turn, attend, gate, project.

    .. math:: y = W_O\,\bigl(\sigma(W_G x) \odot \operatorname{attend}(q, k, v)\bigr), \qquad
        q = \tau_t\,\operatorname{turn}(\operatorname{norm}(W_Q x))

    Args:
        width: D.
        heads: H query heads.
        kv_heads: HKV heads of keys and values, a divisor of H; default H.
        head_dim: K; default D / H.
        value_dim: V; default K.
        rope: rotary positions; None has none.
        window: see this many tokens, the own included.
        first: and this many at the start of the text, whatever the window.
        chunk: see the tokens of the own chunk only, chunks being this long; excludes a window.
        scale: factor on the products; default K ** -0.5.
        softcap: c > 0: scores become c tanh(score / c).
        qk_norm: norm of each query's and key's head, before it is turned.
        sinks: learn a logit a head that only adds to the denominator.
        bias: of the projections of q, k and v.
        out_bias: of the last projection; default as `bias`.
        gate: multiply by a sigmoid of the input before the last projection.
        temperature: (a, n), queries grow as 1 + a ln(1 + floor((t + 1) / n)) at position t.
        lends: name under which later layers find these keys and values.
        borrows: name of the keys and values to use instead of own ones.
        impl: as in the op.

    Cost: 4 B T (H + HKV) D K FLOPs of projections, plus the op's.
    Cache: turned keys, and values, of the tokens that a later one sees: all; first + window - 1; those of its
        chunk; and how many tokens came before, [N]. Nothing where keys and values are borrowed. Packed
        sequences leave one row each, as long as it is.
    Source: Ainslie et al. 2023, arXiv:2305.13245, and the architectures of this folder.
    """

    shares = True
    """`prefill` and `step` take `shared`."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rope: Rope | None = None,
        window: int | None = None,
        first: int = 0,
        chunk: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        qk_norm: Norm | None = None,
        sinks: bool = False,
        bias: bool = False,
        out_bias: bool | None = None,
        gate: bool = False,
        temperature: tuple[float, float] | None = None,
        lends: str | None = None,
        borrows: str | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        if window is not None and chunk is not None:
            raise ValueError(f"window is {window} and chunk is {chunk}, expected one of them")
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = K = head_dim or width // heads
        V = value_dim or K
        self.rope, self.temperature, self.lends, self.borrows = rope, temperature, lends, borrows
        # a chunk is a window that moves by whole chunks
        self.window, self.first, self.grain = window or chunk, first if window else 0, chunk or 1
        self.pattern = dict(
            window=self.window, sinks=self.first, grain=self.grain, softcap=softcap, scale=scale, impl=impl
        )
        self.q_proj = nn.Linear(width, heads * K, bias=bias)
        self.q_norm = build_norm(qk_norm, K)
        if borrows is None:
            self.k_proj = nn.Linear(width, self.kv_heads * K, bias=bias)
            self.v_proj = nn.Linear(width, self.kv_heads * V, bias=bias)
            self.k_norm = build_norm(qk_norm, K)
        self.gate_proj = nn.Linear(width, heads * V, bias=bias) if gate else None
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.o_proj = nn.Linear(heads * V, width, bias=bias if out_bias is None else out_bias)

    def prefill(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each.

        `shared` holds what earlier layers of the same call lend.
        """
        o, cache = self.read(x, cache, cu_seqlens=cu_seqlens, shared=shared)
        return self.o_proj(o), cache

    def read(
        self,
        x: torch.Tensor,
        cache: Cache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        shared: dict | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """As `prefill`, before the last projection: what all heads read, [B, T, H V]."""
        if self.borrows:
            position = shared["position"]
        else:
            position, length = places(x, cache, cu_seqlens)
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        q = self._turn(q, position)
        if self.temperature is not None:
            rise, tokens = self.temperature
            growth = ((position + 1) // tokens).to(torch.promote_types(q.dtype, torch.float32)).log1p()
            q = (q * (1 + rise * growth)[..., None, None]).to(q.dtype)
        if shared and shared.get("reading"):
            # a sparse mode of the model attends, and says what to keep
            o, held = shared["reading"](self, q, *self._keys(x, position), cache, position, cu_seqlens)
        else:
            rows = shared[self.borrows] if self.borrows else self._rows(x, position, cache, cu_seqlens)
            if self.lends:
                shared[self.lends] = rows
            o, held = self._attend(q, rows), {} if self.borrows else rows.keep(self._cut)
        o = o.flatten(2)
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return o, held if self.borrows else held | {LENGTH: length}

    def step(
        self, x: torch.Tensor, cache: Cache | None = None, *, shared: dict | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]."""
        y, cache = self.prefill(x[:, None], cache, shared=shared)
        return y[:, 0], cache

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of the last T of Tk tokens without a mode, [B, T, H, V]; arguments as in the op."""
        return engine.attend(q, k, v, **self.pattern, sink_logits=self.sinks)[0]

    def _keys(self, x, position):
        k = self.k_norm(split_heads(self.k_proj(x), self.kv_heads))
        return self._turn(k, position), split_heads(self.v_proj(x), self.kv_heads)

    def _rows(self, x, position, cache, cu_seqlens):
        return Rows.extend(cache, dict(zip("kv", self._keys(x, position), strict=True)), cu_seqlens)

    def _turn(self, x, position):
        return x if self.rope is None else turn(x, position, self.rope)

    def _attend(self, q, rows):
        options = self.pattern | {"sink_logits": self.sinks}
        packed = rows.edges is not None and len(q) == 1 and q.shape[1] == rows.parts["k"].shape[1]
        if rows.edges is None or packed:
            return engine.attend(q, **rows.parts, cu_seqlens=rows.edges, **options)[0]
        # rows of their own lengths: the projections are one product, attention is one call a row
        alone = [engine.attend(q[i : i + 1], **row, **options)[0] for i, row in enumerate(rows)]
        return torch.cat(alone)

    def _cut(self, x):
        return x if self.window is None else engine.keep(x, self.window, self.first, self.grain)
