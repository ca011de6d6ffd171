"""What is special to RWKV-6: a decay that the token chooses, read before it acts, and a bonus."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.rwkv5 import RWKV5
from effattn_lite.layers.rwkv6 import RWKV6
from effattn_lite.ops.rwkv6 import rwkv6
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("rwkv6").forms)
GATES = {"open": [0.0], "shut": [-20.0], "mixed": [0.0, -1e-6, -1.0, -20.0]}


def draw(**sizes):
    return make_inputs("rwkv6", state=True, **sizes)


def with_gates(x, gates):
    """Gates that differ from channel to channel, and every nine tokens."""
    b, t, *rest = np.indices(x["g"].shape)
    return x | {"g": np.take(gates, (b + t // 9 + sum(rest)) % len(gates))}


def sum_over_past(q, k, v, *, g, u, initial_state):
    """o_t = (q_t u) . k_t v_t + sum_{j < t} (q_t * prod_{r = j+1..t-1} e^{g_r}) . k_j v_j, S_0 before all."""
    o = np.zeros_like(v)
    for t in range(q.shape[1]):
        o[:, t] = (q[:, t] * u * k[:, t]).sum(-1, keepdims=True) * v[:, t]
        faded = q[:, t]
        for j in range(t - 1, -1, -1):
            o[:, t] += (faded * k[:, j]).sum(-1, keepdims=True) * v[:, j]
            faded = faded * np.exp(g[:, j])
        o[:, t] += np.einsum("bhk,bhkv->bhv", faded, initial_state)
    return o


@FORMS
def test_reduces_to_rwkv5(form):
    """g the same at every token: Finch is Eagle."""
    x = draw(T=37, H=3)
    g = x["g"][0, 0]
    got = run_reference("rwkv6", x | {"g": np.broadcast_to(g, x["g"].shape)}, form=form)
    assert relative_error(got, run_reference("rwkv5", x | {"g": g})) < 1e-10


@FORMS
@pytest.mark.parametrize("gates", GATES)
def test_sum_over_the_past(form, gates):
    """Gates of 0 and -20 nats side by side, to the last digits, and nothing overflows on the way."""
    x = with_gates(draw(T=70), GATES[gates])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        o, S = run_reference("rwkv6", x, form=form)
    assert np.isfinite(S).all()
    assert relative_error(o, sum_over_past(**x)) < 1e-10


@FORMS
def test_bonus_touches_the_own_token_alone(form):
    x = draw(T=20)
    base, more = (run_reference("rwkv6", x | {"u": x["u"] + extra}, form=form) for extra in (0, 1))
    own = (x["q"] * x["k"]).sum(-1, keepdims=True) * x["v"]
    assert relative_error(more[0] - base[0], own) < 1e-10
    assert np.array_equal(more[1], base[1])


@FORMS
def test_without_bonus_it_is_gla_read_one_token_late(form):
    """u = 0: output t + 1 is gla's output t asked with the query of t + 1; the states are the same."""
    x = draw(T=37)
    o, S = run_reference("rwkv6", x | {"u": np.zeros_like(x["u"])}, form=form)
    assert relative_error(o[:, 0], np.einsum("bhk,bhkv->bhv", x["q"][:, 0], x["initial_state"])) < 1e-10
    del x["u"]
    gla = run_reference("gla", x | {"q": np.roll(x["q"], -1, axis=1)}, scale=1.0)
    assert relative_error(o[:, 1:], gla[0][:, :-1]) < 1e-10
    assert relative_error(S, gla[1]) < 1e-10


@FORMS
def test_without_bonus_the_token_is_not_seen(form):
    """u = 0 and no state: the first output is 0."""
    x = make_inputs("rwkv6", T=5)
    o = run_reference("rwkv6", x | {"u": np.zeros_like(x["u"])}, form=form)[0]
    assert max_error(o[:, 0], np.zeros_like(o[:, 0])) == 0 and np.abs(o[:, 1]).max() > 0


@FORMS
def test_a_token_is_read_before_its_own_decay(form):
    """A shut gate at token t does not reach output t; the state after it holds token t alone."""
    x, t = draw(T=20), 19
    base = run_reference("rwkv6", x, form=form)[0]
    x["g"][:, t] = -800.0
    o, S = run_reference("rwkv6", x, form=form)
    assert np.array_equal(o[:, t], base[:, t])
    assert relative_error(S, np.einsum("bhk,bhv->bhkv", x["k"][:, t], x["v"][:, t])) < 1e-10


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_with_gates_side_by_side(impl, device):
    """The op in float32 against the sum over the past: no reference point overflows, no sum cancels."""
    x = with_gates(
        make_inputs("rwkv6", state=True, B=1, T=70, H=1, K=16, V=16, dtype="float32"), GATES["mixed"]
    )
    want = sum_over_past(**{name: t.astype(float) for name, t in x.items()})
    o, _ = rwkv6(**to_torch(x, dtype="float32", device=device), impl=impl)
    assert relative_error(o, want) < 1e-5


def test_layer_whose_token_chooses_nothing_is_rwkv5():
    """Both first matrices 0: the shift is mu alone, the decay omega alone."""
    finch, eagle = RWKV6(32, 4, layer=1, layers=3).double(), RWKV5(32, 4, layer=1, layers=3).double()
    same = {n: t for n, t in finch.state_dict().items() if n in eagle.state_dict() and n != "mu"}
    same["omega"] = same["omega"].view(4, 8)
    same["mu"] = finch.mu[[4, 2, 3, 5]]  # r, k, v, g
    eagle.load_state_dict(same)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    assert max_error(finch(x), eagle(x)) > 1e-8
    torch.nn.init.zeros_(finch.mix_a)
    torch.nn.init.zeros_(finch.decay_a)
    assert relative_error(finch(x), eagle(x)) < 1e-10


def test_token_shift_stops_at_a_sequence():
    """Changing the last token of one packed sequence leaves the next sequence as it was."""
    layer, x = RWKV6(32, 2).double(), torch.randn(1, 20, 32, dtype=torch.float64)
    edges, other = torch.tensor([0, 9, 9, 20]), x.clone()
    other[:, 8] += 1
    assert torch.equal(layer(x, cu_seqlens=edges)[:, 9:], layer(other, cu_seqlens=edges)[:, 9:])


def test_packed_prefill_can_be_continued():
    layer, x = RWKV6(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
