"""What works on each token alone: gated and plain networks, and mixtures of them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    r"""Activation of one product times the other; "clipped_silu" is gpt-oss's.

    .. math:: \operatorname{act}(g) \odot u, \qquad \text{clipped: }
        \min(g, 7)\,\sigma(1.702 \min(g, 7)) \odot (1 + \operatorname{clip}(u, -7, 7))
    """
    if activation == "clipped_silu":
        gate = gate.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (1 + up.clamp(-7.0, 7.0))
    return ACTIVATIONS[activation](gate) * up


class Gated(nn.Module):
    r"""Gated feed-forward: :math:`y = W_2\,(\operatorname{act}(s W_g x) \odot W_1 x)`.

    Args:
        width: D.
        hidden: entries between the two products.
        activation: a key of ACTIVATIONS, or "clipped_silu".
        bias: of all three projections.
        gate_scale: s.

    Cost: 6 B T D hidden FLOPs.
    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        gate_scale: float = 1.0,
    ):
        super().__init__()
        self.activation, self.gate_scale = activation, gate_scale
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Work on each token of x [..., D] alone."""
        gate = self.gate_proj(x)
        gate = gate if self.gate_scale == 1 else self.gate_scale * gate
        return self.down_proj(gated(gate, self.up_proj(x), self.activation))


class Plain(nn.Module):
    r"""Feed-forward of two products: :math:`y = W_2 \operatorname{act}(W_1 x)`.

    Args:
        width: D.
        hidden: entries between the two products.
        activation: a key of ACTIVATIONS.
        bias: of both projections.

    Cost: 4 B T D hidden FLOPs.
    """

    def __init__(self, width: int, hidden: int, *, activation: str = "gelu", bias: bool = False):
        super().__init__()
        self.activation = activation
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Work on each token of x [..., D] alone."""
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class Experts(nn.Module):
    r"""A mixture of gated feed-forwards: each token goes to the few experts that its router likes best.

    .. math:: y = \sum_{e \in \operatorname{top}(p + b)} c\,p_e\,E_e(x) + E_{\mathrm{shared}}(x), \qquad
        p = \operatorname{softmax}(W_R x) \text{ or } \sigma(W_R x)

    Args:
        width: D.
        hidden: entries between the two products of an expert.
        experts: how many there are.
        top: how many a token goes to.
        groups, top_groups: experts stand in equal groups, and a token goes to those of the `top_groups`
            whose two best ones it likes most in sum; one group has no effect.
        activation: as in `Gated`.
        scores: "softmax" over all experts, or "sigmoid" of each.
        normalise: divide the chosen p by their sum.
        scale: c.
        weigh: "output" of an expert is multiplied by c p, or its "input" (Llama 4).
        balance: add a bias b to p when experts are chosen; it is no parameter, since no gradient reaches it.
        router_bias: add a bias to W_R x.
        bias: of the experts' projections.
        shared: hidden entries of the expert that every token goes to; 0 for none.
        shared_gate: multiply its output by a sigmoid of one number a token.

    Cost: 6 B T D (top hidden + shared) FLOPs, and the router's 2 B T D experts.
    Source: Shazeer et al. 2017, arXiv:1701.06538; the architectures of this folder.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top: int,
        *,
        activation: str = "silu",
        scores: str = "softmax",
        normalise: bool = False,
        scale: float = 1.0,
        weigh: str = "output",
        groups: int = 1,
        top_groups: int = 1,
        balance: bool = False,
        router_bias: bool = False,
        bias: bool = False,
        shared: int = 0,
        shared_gate: bool = False,
    ):
        super().__init__()
        self.top, self.activation, self.scores = top, activation, scores
        self.normalise, self.scale, self.weigh = normalise, scale, weigh
        self.groups, self.top_groups = groups, top_groups
        self.router = nn.Linear(width, experts, bias=router_bias)
        sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        for name, (rows, columns) in sizes.items():
            bound = 1 / math.sqrt(columns)
            weight = torch.empty(experts, rows, columns).uniform_(-bound, bound)
            setattr(self, name, nn.Parameter(weight))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(experts, rows)) if bias else None)
        self.register_buffer("balance", torch.zeros(experts) if balance else None)
        self.shared = Gated(width, shared, activation=activation) if shared else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_gate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Work on each token of x [..., D] alone."""
        tokens = x.flatten(0, -2)  # [n, D]
        weight, chosen = self.route(tokens)
        y = torch.zeros_like(tokens)
        for e in chosen.unique().tolist():
            token, place = torch.where(chosen == e)
            p = weight[token, place, None].to(x.dtype)
            z = tokens[token]
            z = self._expert(e, z * p) if self.weigh == "input" else self._expert(e, z) * p
            # autocast gives narrower products
            y = y.index_add(0, token, z.to(y.dtype))
        y = y.view_as(x)
        if self.shared is None:
            return y
        common = self.shared(x)
        return y + (common if self.shared_gate is None else common * self.shared_gate(x).sigmoid())

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and numbers of the chosen experts, [n, top] each, of tokens x [n, D]."""
        logits = self.router(x).to(torch.promote_types(x.dtype, torch.float32))
        p = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        chosen = self.select(p if self.balance is None else p + self.balance)
        weight = p.gather(-1, chosen)
        if self.normalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return self.scale * weight, chosen

    def select(self, p: torch.Tensor) -> torch.Tensor:
        """Numbers of the `top` experts, [n, top], of preferences [n, experts]."""
        if self.groups > 1:
            p = p.unflatten(-1, (self.groups, -1))
            best = p.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            out = torch.ones_like(p[..., 0], dtype=torch.bool).scatter(-1, best, False)
            p = p.masked_fill(out[..., None], -torch.inf).flatten(-2)
        return p.topk(self.top, dim=-1).indices

    def _expert(self, e, x):
        def product(name, x):
            bias = getattr(self, f"{name}_bias")
            return F.linear(x, getattr(self, name)[e], None if bias is None else bias[e])

        return product("down", gated(product("gate", x), product("up", x), self.activation))
