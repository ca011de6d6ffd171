"""What is special to HGRN2: the key is what the gate leaves over, so a row of the state is a mean."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.hgrn2 import HGRN2
from effattn_lite.ops.hgrn2 import hgrn2
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("hgrn2").forms)
GATES = {"open": [0.0], "shut": [-20.0], "mixed": [0.0, -1e-6, -1.0, -20.0]}


def draw(**sizes):
    return make_inputs("hgrn2", state=True, **sizes)


def with_gates(x, gates):
    """Gates that differ from channel to channel, and every nine tokens."""
    b, t, *rest = np.indices(x["g"].shape)
    return x | {"g": np.take(gates, (b + t // 9 + sum(rest)) % len(gates))}


def sum_over_past(q, v, *, g, initial_state):
    """o_t = sum_{j <= t} (q_t * prod_{r = j+1..t} e^{g_r}) . (1 - e^{g_j}) v_j, and S_0 before all."""
    o = np.zeros_like(v)
    for t in range(q.shape[1]):
        faded = q[:, t]
        for j in range(t, -1, -1):
            o[:, t] += (faded * -np.expm1(g[:, j])).sum(-1, keepdims=True) * v[:, j]
            faded = faded * np.exp(g[:, j])
        o[:, t] += np.einsum("bhk,bhkv->bhv", faded, initial_state)
    return o


@FORMS
@pytest.mark.parametrize("gates", GATES)
def test_sum_over_the_past(form, gates):
    """Gates of 0 and -20 nats side by side, to the last digits, and nothing overflows on the way."""
    x = with_gates(draw(T=70), GATES[gates])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        o, S = run_reference("hgrn2", x, form=form)
    assert np.isfinite(S).all()
    assert relative_error(o, sum_over_past(**x)) < 1e-10


@FORMS
def test_an_open_gate_writes_nothing(form):
    """g = 0: the key is 0 too, the state stays as it was, and every query reads that one."""
    x = with_gates(draw(T=37), [0.0])
    o, S = run_reference("hgrn2", x, form=form)
    assert np.array_equal(S, x["initial_state"])
    assert relative_error(o, np.einsum("bthk,bhkv->bthv", x["q"], S)) < 1e-10


@FORMS
def test_a_shut_gate_holds_the_last_value_alone(form):
    """g = -800 nats: e^g is 0 in float64, the key is 1, and every row of the state is the last value."""
    x = with_gates(draw(T=20), [-800.0])
    o, S = run_reference("hgrn2", x, form=form)
    assert relative_error(S, np.broadcast_to(x["v"][:, -1, :, None], S.shape)) < 1e-10
    assert relative_error(o, x["q"].sum(-1, keepdims=True) * x["v"]) < 1e-10


@FORMS
def test_a_row_of_the_state_is_a_mean(form):
    """Its weights add up to 1, so equal values come back, and no entry leaves the values' range."""
    x = draw(T=300)
    equal = run_reference(
        "hgrn2", x | {"v": np.ones_like(x["v"]), "initial_state": np.ones((2, 2, 16, 24))}, form=form
    )
    assert relative_error(equal[1], np.ones((2, 2, 16, 24))) < 1e-10
    assert relative_error(equal[0], np.repeat(x["q"].sum(-1, keepdims=True), 24, axis=-1)) < 1e-10
    seen = np.concatenate((x["v"].swapaxes(1, 2), x["initial_state"]), axis=2)
    S = run_reference("hgrn2", x, form=form)[1]
    assert (S.max(axis=2) <= seen.max(axis=2)).all() and (S.min(axis=2) >= seen.min(axis=2)).all()


@FORMS
def test_a_nearly_open_gate_keeps_its_digits(form):
    """g = -1e-12: the key is 1e-12 to the last digit, where 1 - e^g has four good ones."""
    x = make_inputs("hgrn2", T=10)
    x["g"] = np.full_like(x["g"], -1e-12)
    S = run_reference("hgrn2", x, form=form)[1]
    want = np.broadcast_to(1e-12 * x["v"].sum(axis=1)[:, :, None], S.shape)
    assert relative_error(S, want) < 1e-10


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_with_gates_side_by_side(impl, device):
    """The op in float32 against the sum over the past: no reference point overflows, no sum cancels."""
    x = with_gates(
        make_inputs("hgrn2", state=True, B=1, T=70, H=1, K=16, V=16, dtype="float32"), GATES["mixed"]
    )
    want = sum_over_past(**{name: t.astype(float) for name, t in x.items()})
    o, _ = hgrn2(**to_torch(x, dtype="float32", device=device), impl=impl)
    assert relative_error(o, want) < 1e-5


def test_layer_floor_rises_from_layer_to_layer():
    """0 in the first, the sum of all but one share in the last; a gate lies between its floor and 1."""
    bounds = torch.nn.Parameter(torch.randn(3, 32, dtype=torch.float64))
    shares = bounds.softmax(0)
    floors = (torch.zeros(32, dtype=torch.float64), shares[1], shares[1] + shares[2])
    shut = torch.full((1, 32), -1e4, dtype=torch.float64)
    for i, floor in enumerate(floors):
        layer = HGRN2(32, 4, bounds=bounds, layer=i).double()
        torch.nn.init.eye_(layer.f_proj.weight)
        if i:
            assert relative_error(layer.log_decay(shut).exp()[0], floor) < 1e-10
        f = layer.log_decay(torch.randn(50, 32, dtype=torch.float64)).exp()
        assert (f > floor).all() and (f < 1).all()
    layer(torch.randn(1, 9, 32, dtype=torch.float64)).square().sum().backward()
    assert bounds.grad.abs().max() > 0


def test_layer_refuses_bounds_of_another_width():
    with pytest.raises(ValueError, match=r"bounds has shape \(3, 16\), expected \[layers, H K = 32\]"):
        HGRN2(32, 4, bounds=torch.nn.Parameter(torch.zeros(3, 16)))
