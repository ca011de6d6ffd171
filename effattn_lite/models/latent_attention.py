"""Multi-head latent attention: keys and values of all heads from one small vector a token."""

import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite.layers.common import Cache, Mixer, split_heads
from effattn_lite.models.config import Norm, Rope
from effattn_lite.models.norm import build_norm
from effattn_lite.models.rotary import turn
from effattn_lite.models.rows import LENGTH, Rows, places
from effattn_lite.ops.engines import softmax_attention as dense
from effattn_lite.ops.engines import token_sparse as sparse


class LatentAttention(Mixer):
    r"""Softmax attention whose cache is one latent vector c and one short key r a token, whatever the heads.

    .. math:: c_s = \operatorname{norm}(W_c x_s), \quad r_s = \operatorname{turn}(W_r x_s), \qquad
        k_s^h = (W_K^h c_s,\, r_s), \quad v_s^h = W_V^h c_s, \qquad y = W_O\, \operatorname{attend}(q, k, v)

    A step never forms these keys and values: since
    :math:`q^\top W_K^h c_s = (W_K^{h\top} q)^\top c_s`, queries go into the space of the latents instead, and
    all heads attend to the one key :math:`(c_s, r_s)` and the one value :math:`c_s`, as in multi-query
    attention. With an indexer every call does so, on the tokens that it chose.

    Args:
        width: D.
        heads: H.
        rank: R, entries of c.
        nope_dim: entries of a key that come from c.
        rope_dim: entries of r.
        value_dim: V.
        q_rank: queries come from a normed vector of so many entries; None takes them from x.
        rope: how r and that part of a query turn; None does not.
        scale: factor on the products; default (nope_dim + rope_dim) ** -0.5.
        norm_eps: of the norms of c and of the queries' vector.
        bias: of the projections down and of the last one.
        index_heads, index_dim, index_top: as `Indexer`; 0 heads for none.
        impl: as in the op.

    Cost: 2 B T (D (q_rank + R + rope_dim + H V) + H (q_rank (nope_dim + rope_dim) + R (nope_dim + V))) FLOPs
        of projections, plus the op's.
    Cache: c and turned r, R + rope_dim numbers a token, index_dim more with an indexer; and how many tokens
        came before, [N]. Packed sequences leave one row each, as long as it is.
    Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1; the indexer by DeepSeek-AI 2025, DeepSeek-V3.2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        q_rank: int | None = None,
        rope: Rope | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
        index_heads: int = 0,
        index_dim: int = 128,
        index_top: int = 2048,
        impl: str = "auto",
    ):
        super().__init__()
        if index_heads and q_rank is None:
            raise ValueError("the indexer reads the queries' vector: expected q_rank, got None")
        self.heads, self.rope, self.impl = heads, rope, impl
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
        norm = Norm("rms", eps=norm_eps)
        self.q_down = nn.Linear(width, q_rank, bias=bias) if q_rank else None
        self.q_norm = build_norm(norm if q_rank else None, q_rank)
        self.q_proj = nn.Linear(q_rank or width, heads * (nope_dim + rope_dim), bias=False)
        self.kv_down = nn.Linear(width, rank + rope_dim, bias=bias)
        self.kv_norm = build_norm(norm, rank)
        self.kv_up = nn.Linear(rank, heads * (nope_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(heads * value_dim, width, bias=bias)
        self.indexer = None
        if index_heads:
            self.indexer = Indexer(width, q_rank, index_heads, index_dim, index_top, rope_dim, rope)

    def prefill(
        self, x: torch.Tensor, cache: Cache | None = None, *, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The next T tokens, x [B, T, D]; packed sequences leave a cache with one row each."""
        position, length = places(x, cache, cu_seqlens)
        source = x if self.q_down is None else self.q_norm(self.q_down(x))
        q, turned = split_heads(self.q_proj(source), self.heads).split((self.nope_dim, self.rope_dim), dim=-1)
        latent, key = self.kv_down(x).tensor_split((self.kv_up.in_features,), dim=-1)
        new = {"latent": self.kv_norm(latent), "key": self._turn(key[..., None, :], position)[..., 0, :]}
        asked = ()
        if self.indexer is not None:
            new["index"] = self.indexer.keys(x, position)
            asked = self.indexer.queries(x, source, position)
        rows = Rows.extend(cache, new, cu_seqlens)
        o = self._attend((q, self._turn(turned, position), *asked), rows)
        return self.o_proj(o.flatten(2)), rows.keep(lambda z: z) | {LENGTH: length}

    def step(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """The next token, x [B, D]: one query on the latents."""
        y, cache = self.prefill(x[:, None], cache)
        return y[:, 0], cache

    def _turn(self, x, position):
        return x if self.rope is None else turn(x, position, self.rope)

    def _attend(self, asked, rows):
        """Heads' outputs [B, T, H, V] of what is asked: queries in two parts, the indexer's as well."""
        if rows.edges is None:
            return self._one(asked, rows.parts)
        B, T = asked[0].shape[:2]
        if B == 1 and T == rows.parts["latent"].shape[1]:
            sizes = rows.edges.diff().tolist()
            texts = zip(*(z.split(sizes, dim=1) for z in asked), strict=True)
        else:
            texts = zip(*(z.split(1) for z in asked), strict=True)
        # rows of their own lengths: one call a row
        alone = [self._one(text, row) for text, row in zip(texts, rows, strict=True) if text[0].numel()]
        return torch.cat(alone, dim=1 if B == 1 else 0)

    def _one(self, asked, row):
        q, turned, *index = asked
        c, r = row["latent"], row["key"]
        up_k, up_v = split_heads(self.kv_up.weight.T, self.heads).split(
            (self.nope_dim, self.value_dim), dim=-1
        )
        if self.indexer is None and q.shape[1] > 1:
            k = torch.einsum("bnr,rhk->bnhk", c, up_k)
            k = torch.cat((k, r[:, :, None].expand(-1, -1, self.heads, -1)), dim=-1)
            v = torch.einsum("bnr,rhv->bnhv", c, up_v)
            return dense.attend(torch.cat((q, turned), dim=-1), k, v, scale=self.scale, impl=self.impl)[0]
        # [B, T, H, K] with [R, H, K] -> [B, T, H, R]
        q = torch.cat((torch.einsum("bthk,rhk->bthr", q, up_k), turned), dim=-1)
        shared = (torch.cat((c, r), dim=-1)[:, :, None], c[:, :, None])
        if self.indexer is None:
            o, _ = dense.attend(q, *shared, scale=self.scale, impl=self.impl)
        else:
            chosen = self.indexer.choose(*index, row["index"])[:, :, None]
            o, _ = sparse.attend(
                q, *shared, block_indices=chosen, block_size=1, scale=self.scale, impl=self.impl
            )
        return torch.einsum("bthr,rhv->bthv", o, up_v)


class Indexer(nn.Module):
    r"""Chooses for each query the tokens that attention may see: a small attention without a softmax.

    .. math:: I_{ts} = \frac{1}{\sqrt{H_I K_I}} \sum_h w_t^h \operatorname{ReLU}(q_t^{h\top} k_s), \qquad
        s \le t

    The `top` tokens of largest I are chosen, of equal ones the earlier. A choice has no gradient: the authors
    teach the indexer apart, to agree with attention's own weights, so its weights ask for no gradient here.

    Args:
        width: D.
        q_rank: entries of the queries' vector, which it shares.
        heads: H_I.
        dim: K_I.
        top: tokens that are chosen.
        rope_dim: channels that turn, in pairs (i, i + rope_dim / 2), unlike those of attention.
        rope: how they turn.

    Cost: 2 B T (q_rank H_I K_I + D (K_I + H_I)) FLOPs of projections, and 2 B T T H_I K_I of scores:
        quadratic, with a small factor.
    Source: DeepSeek-AI 2025, DeepSeek-V3.2, as read in transformers; the rotation by a Hadamard matrix, which
        changes no product, and 8-bit numbers are left out.
    """

    def __init__(
        self, width: int, q_rank: int, heads: int, dim: int, top: int, rope_dim: int, rope: Rope | None = None
    ):
        super().__init__()
        self.heads, self.top = heads, top
        self.rope = None if rope is None else Rope(**vars(rope) | {"dims": rope_dim, "adjacent": False})
        self.scale = (heads * dim) ** -0.5
        self.q_proj = nn.Linear(q_rank, heads * dim, bias=False)
        self.k_proj = nn.Linear(width, dim, bias=False)
        self.k_norm = build_norm(Norm("layer", eps=1e-6, bias=True), dim)
        self.weight_proj = nn.Linear(width, heads, bias=False)
        self.requires_grad_(False)

    def keys(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Keys [B, T, K_I] of x [B, T, D]."""
        return self._turn(self.k_norm(self.k_proj(x.detach()))[..., None, :], position)[..., 0, :]

    def queries(
        self, x: torch.Tensor, source: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, T, H_I, K_I] of the queries' vectors, and weights [B, T, H_I] of x [B, T, D]."""
        q = self._turn(split_heads(self.q_proj(source.detach()), self.heads), position)
        return q, self.weight_proj(x.detach()) * self.scale

    def choose(self, q: torch.Tensor, weight: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Numbers of the chosen tokens, [B, T, top], -1 for none, of keys [B, n, K_I]; the last T ask."""
        scores = F.relu(torch.einsum("bthk,bnk->bthn", q, k))
        scores = torch.einsum("bth,bthn->btn", weight, scores)
        T, n = scores.shape[1:]
        later = torch.ones(T, n, dtype=torch.bool, device=k.device).triu(n - T + 1)
        scores = scores.masked_fill(later, -torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True)
        return best.indices.masked_fill(best.values.isneginf(), -1)[..., : self.top]

    def _turn(self, x, position):
        return x if self.rope is None else turn(x, position, self.rope)
