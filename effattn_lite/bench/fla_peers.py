"""flash-linear-attention's fast ops on this package's inputs: the peers that linear methods are timed beside.

Each builder takes a method's inputs by name and returns (label, call), call() being o. The label says where
the peer computes something else. fla is imported inside: it is an optional dependency (`fla-core`).
"""

__all__ = ["FLA"]


def _linear_transformer(q, k, v):
    from fla.ops.linear_attn import chunk_linear_attn
    from torch.nn.functional import elu

    return "fla chunk_linear_attn", lambda: chunk_linear_attn(elu(q) + 1, elu(k) + 1, v, normalize=True)[0]


def _retnet(q, k, v):
    from fla.ops.retention import chunk_retention

    return "fla chunk_retention", lambda: chunk_retention(q, k, v)[0]


def _lightning_attention(q, k, v, g):
    from fla.ops.simple_gla import chunk_simple_gla

    constant = g.detach()
    return (
        "fla chunk_simple_gla, without dg",
        lambda: chunk_simple_gla(q, k, v, g_gamma=constant, scale=1.0)[0],
    )


def _rwkv5(q, k, v, g, u):
    from fla.ops.rwkv6 import chunk_rwkv6

    # rwkv6 takes a decay a token: the constant one, seen at every token
    w = g.detach().to(q.dtype).expand(*q.shape).contiguous().requires_grad_()
    bonus = u.detach().to(q.dtype)
    return "fla chunk_rwkv6, without du", lambda: chunk_rwkv6(q, k, v, w, bonus, scale=1.0)[0]


def _mamba2(q, k, v, g):
    from fla.ops.simple_gla import chunk_simple_gla

    times = v.shape[2] // q.shape[2]
    more = ", q and k repeated" if times > 1 else ""

    def call():
        heads = (x.repeat_interleave(times, dim=2) if times > 1 else x for x in (q, k))
        return chunk_simple_gla(*heads, v, g, scale=1.0)[0]

    return f"fla chunk_simple_gla{more}", call


def _gla(q, k, v, g):
    from fla.ops.gla import chunk_gla

    return "fla chunk_gla", lambda: chunk_gla(q, k, v, g)[0]


def _hgrn2(q, v, g):
    from fla.ops.gla import chunk_gla

    return "fla chunk_gla", lambda: chunk_gla(q, (1 - g.exp()).to(q.dtype), v, g, scale=1.0)[0]


def _rwkv6(q, k, v, g, u):
    from fla.ops.rwkv6 import chunk_rwkv6

    return "fla chunk_rwkv6", lambda: chunk_rwkv6(q, k, v, g, u, scale=1.0)[0]


def _hgrn(x, g):
    from fla.ops.hgrn import fused_recurrent_hgrn

    return "fla fused_recurrent_hgrn", lambda: fused_recurrent_hgrn(x, g)[0]


def _rwkv4(k, v, g, u):
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    w = (-g).log()  # its decay is exp(-exp(w))
    state = k.new_zeros(k.shape[0], 3, 1, k.shape[-1]).float()
    state[:, 2] = -1e30
    return "fla fused_recurrent_rwkv4", lambda: fused_recurrent_rwkv4(w, u, k, v, state)[0]


def _deltanet(q, k, v, beta):
    from fla.ops.delta_rule import chunk_delta_rule

    return "fla chunk_delta_rule", lambda: chunk_delta_rule(q, k, v, beta)[0]


def _gated_deltanet(q, k, v, g, beta):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return "fla chunk_gated_delta_rule", lambda: chunk_gated_delta_rule(q, k, v, g, beta)[0]


def _kda(q, k, v, g, beta):
    from fla.ops.kda import chunk_kda

    return "fla chunk_kda", lambda: chunk_kda(q, k, v, g, beta)[0]


def _rwkv7(q, k, v, g, a, b):
    from fla.ops.rwkv7 import chunk_rwkv7

    return "fla chunk_rwkv7", lambda: chunk_rwkv7(q, g.to(q.dtype), k, v, a, b)[0]


def _gsa(q, k, v, s, g):
    from fla.ops.gsa import chunk_gsa

    return "fla chunk_gsa", lambda: chunk_gsa(q, k, v, s, g)[0]


FLA = {
    "linear_transformer": _linear_transformer,
    "retnet": _retnet,
    "lightning_attention": _lightning_attention,
    "rwkv5": _rwkv5,
    "mamba2": _mamba2,
    "gla": _gla,
    "hgrn2": _hgrn2,
    "rwkv6": _rwkv6,
    "hgrn": _hgrn,
    "rwkv4": _rwkv4,
    "deltanet": _deltanet,
    "gated_deltanet": _gated_deltanet,
    "kda": _kda,
    "rwkv7": _rwkv7,
    "gsa": _gsa,
}
"""Method -> builder."""
