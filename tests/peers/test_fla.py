"""Outside truth: flash-linear-attention's plain loops on every device, its fast kernels on a GPU.

Its plain loops share nothing with this package: another author's reading of the same papers.
"""

import pytest
import torch

from effattn_lite import registry
from effattn_lite.bench.fla_peers import FLA
from effattn_lite.testing import flat, make_inputs, relative_error, run_op, to_torch

pytest.importorskip("fla", reason="flash-linear-attention is not installed (pip install fla-core)")

CUDA = torch.cuda.is_available()
SIZES = (dict(B=1, T=63, H=1, K=64, V=64), dict(B=2, T=100, H=3, K=60, V=60))


def heads_first(function, *tensors, **more):
    """Call what wants [B, H, T, ...], and give its output in this package's layout."""
    o, *rest = function(*(x.transpose(1, 2) for x in tensors), **more)
    return o.transpose(1, 2), *rest


def retnet(q, k, v):
    from fla.ops.retention.naive import naive_retention

    return heads_first(lambda *x: (naive_retention(*x),), q, k, v)


def lightning_attention(q, k, v, g, **more):
    return mamba2(q, k, v, g.expand(*q.shape[:3]), **more)


def rwkv5(q, k, v, g, u, **more):
    return rwkv6(q, k, v, g.expand(q.shape), u, **more)


def mamba2(q, k, v, g, **more):
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    return naive_recurrent_simple_gla(q, k, v, g, scale=1.0, **more)


def gla(q, k, v, g, **more):
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(q, k, v, g, **more)


def hgrn2(q, v, g, **more):
    # its loop has a scale of K^(-1/2)
    return gla(q * q.shape[-1] ** 0.5, 1 - g.exp(), v, g, **more)


def rwkv6(q, k, v, g, u, **more):
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    return heads_first(lambda *x: naive_recurrent_rwkv6(*x, u, scale=1.0, **more), q, k, v, g)


def hgrn(x, g, **more):
    from fla.ops.hgrn.naive import naive_recurrent_hgrn

    return naive_recurrent_hgrn(x, g, **more)


def deltanet(q, k, v, beta, **more):
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    return heads_first(lambda *x: delta_rule_recurrence(*x, **more), q, k, v, beta)


def gated_deltanet(q, k, v, g, beta, **more):
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    return naive_recurrent_gated_delta_rule(q, k, v, beta, g, **more)


def kda(q, k, v, g, beta, **more):
    from fla.ops.kda.naive import naive_recurrent_kda

    return naive_recurrent_kda(q, k, v, g, beta, **more)


def rwkv7(q, k, v, g, a, b, **more):
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    # its loop has a scale of K^(-1/2)
    return heads_first(lambda *x: dplr_recurrence(*x, **more), q * q.shape[-1] ** 0.5, k, v, a, b, g)


def linear_transformer(q, k, v, initial_state=None, **more):
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    if initial_state is not None:
        S, z = initial_state
        initial_state = (S, z[:, None])
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    o, state = naive_recurrent_linear_attn(q, k, v, initial_state=initial_state, normalize=True, **more)
    return o, state and (state[0], state[1][:, 0])


def gsa(q, k, v, s, g, **more):
    from fla.ops.gsa.naive import naive_recurrent_gsa

    return naive_recurrent_gsa(q, k, v, s, g, **more)


def abc(q, k, v, s, initial_state=None, output_final_state=False):
    from fla.ops.abc.naive import naive_recurrent_abc

    return heads_first(naive_recurrent_abc, q, k, v, s)


LOOPS = {
    f.__name__: f
    for f in (
        *(linear_transformer, retnet, lightning_attention, rwkv5, mamba2, gla, hgrn2, rwkv6, hgrn),
        *(deltanet, gated_deltanet, kda, rwkv7, gsa, abc),
    )
}
WITHOUT_STATE = {"retnet", "abc"}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", sorted(set(LOOPS) & set(registry.names("op"))))
def test_equals_its_plain_loop(name, sizes, device):
    """float32, with an initial state where the loop takes one."""
    state = name not in WITHOUT_STATE
    inputs = make_inputs(name, state=state, dtype="float32", **sizes)
    x = to_torch(inputs, dtype="float32", device=device)
    want = LOOPS[name](**x, **dict(output_final_state=True) if state else {})
    got = run_op(name, x)
    for mine, theirs in zip(flat(got), flat(want), strict=False) if state else [(got[0], want[0])]:
        assert relative_error(mine, theirs) < 2e-5


def rms(x):
    return float(x.square().mean().sqrt())


def off(got, want):
    """Root mean square of the difference, as a share of what is wanted."""
    want = want.detach().double()
    return rms(got.detach().cpu().double() - want) / rms(want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(set(FLA) & set(registry.names("kernel"))))
def test_equals_its_kernel(name):
    """bfloat16 on the GPU: outputs and gradients of both, against plain torch in float64.

    This op meets the tolerances of the peer's own tests. The peer may miss them by twice as much: of it is
    asked only that it computes the same.
    """
    inputs = make_inputs(name, dtype="bfloat16", B=1, T=1000, H=3, K=64, V=64)
    exact = to_torch(inputs, dtype="float64", requires_grad=True)
    x = to_torch(inputs, dtype="bfloat16", device="cuda", requires_grad=True)
    label, theirs = FLA[name](**x)
    known = [n for n in x if not ("without" in label and n in ("g", "u"))]
    o = {
        "exact": run_op(name, exact, impl="torch")[0],
        "this": run_op(name, x, impl="triton")[0],
        label: theirs(),
    }
    do = torch.randn_like(o["this"])

    def results(who):
        leaves = exact if who == "exact" else x
        grads = torch.autograd.grad(o[who], [leaves[n] for n in known], do.to(o[who]))
        return {"o": o[who]} | dict(zip(known, grads, strict=True))

    want, found = results("exact"), {"this": results("this")}
    try:
        found[label] = results(label)
    except (RuntimeError, NotImplementedError) as error:
        print(f"{label} refuses its backward here: {str(error).partition(chr(10))[0]}")
        found[label] = {"o": o[label]}
    for who, got in found.items():
        for tensor, value in got.items():
            limit = {"o": 0.005, "g": 0.02, "beta": 0.02, "u": 0.02}.get(tensor, 0.008)
            assert off(value, want[tensor]) < limit * (1 if who == "this" else 2), f"{who}: {tensor}"
