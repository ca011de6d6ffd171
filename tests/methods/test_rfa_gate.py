"""What is special to RFA-Gate: a share is kept, the rest is written, and a quotient of both is read."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.rfa_gate import RFAGate
from effattn_lite.reference.rfa_gate import features
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_op, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("rfa_gate").forms)
IMPLS = pytest.mark.parametrize("impl", ("torch", "triton"))


def draw(**sizes):
    return make_inputs("rfa_gate", **sizes)


@FORMS
def test_reduces_to_rfa(form):
    """A gate that is the same, nearly open, at every token writes them all alike, and the share cancels."""
    x = draw(T=37)
    x["g"] = np.full_like(x["g"], -1e-14)
    want = run_reference("rfa", {name: t for name, t in x.items() if name != "g"})[0]
    assert relative_error(run_reference("rfa_gate", x, form=form)[0], want) < 1e-10
    assert relative_error(run_op("rfa_gate", to_torch(x))[0], want) < 1e-10


@FORMS
def test_sum_over_the_past(form):
    """Without a floor: weights e^(g_(j+1) + ... + g_t) (1 - e^g_j) phi(q_t) . phi(k_j), over their sum."""
    x = draw(T=33)
    phi_q, phi_k = (features(x[n], x["omega"]) for n in "qk")
    o = np.zeros_like(x["v"])
    for t in range(33):
        weights = np.zeros((2, t + 1, 2))
        for j in range(t + 1):
            kept = np.exp(x["g"][:, j + 1 : t + 1].sum(axis=1))
            weights[:, j] = kept * (1 - np.exp(x["g"][:, j])) * np.sum(phi_q[:, t] * phi_k[:, j], axis=-1)
        o[:, t] = np.einsum("bjh,bjhv->bhv", weights, x["v"][:, : t + 1]) / weights.sum(axis=1)[..., None]
    assert relative_error(run_reference("rfa_gate", x, form=form)[0], o) < 1e-10
    assert relative_error(run_op("rfa_gate", to_torch(x))[0], o) < 1e-10


@FORMS
def test_an_open_gate_writes_nothing(form):
    x = draw(T=20, state=True)
    x["g"] = np.zeros_like(x["g"])
    _, state = run_reference("rfa_gate", x, form=form)
    assert max_error(state, x["initial_state"]) == 0


@FORMS
@pytest.mark.parametrize("floor", (0.0, 1e-3))
def test_a_shut_gate_holds_the_last_token_alone(form, floor):
    """g = -800 nats: the output is the token's own value, whatever its weight, if that is above the floor."""
    x = draw(T=20, state=True)
    x["g"] = np.full_like(x["g"], -800.0)
    own = np.sum(features(x["q"], x["omega"]) * features(x["k"], x["omega"]), axis=-1)
    o = run_reference("rfa_gate", x, form=form, floor=floor)[0]
    clear = own > floor if floor else own != 0
    assert clear.mean() > 0.8 and relative_error(o[clear], x["v"][clear]) < 1e-9


@IMPLS
def test_gates_from_open_to_shut(impl, device):
    """0, -1e-6, -1 and -20 nats side by side: finite, and the gradient of g too."""
    inputs = draw(B=1, T=40, H=4, K=16, V=16, state=True, dtype="float32")
    inputs["g"][:] = [0.0, -1e-6, -1.0, -20.0]
    want = run_reference("rfa_gate", inputs, floor=0.05)
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    o, (S, z) = run_op("rfa_gate", x, floor=0.05, impl=impl)
    assert relative_error((o.detach(), S.detach(), z.detach()), (want[0], *want[1])) < 1e-5
    (o.sum() + S.sum() + z.sum()).backward()
    assert all(t.grad.isfinite().all() for n, t in x.items() if n != "initial_state")


def test_layer_gate():
    """Between 0 and 1 in each head; a bias of 30 keeps everything, so nothing is written or read."""
    layer, x = RFAGate(32, 2).double(), torch.randn(1, 20, 32, dtype=torch.float64)
    g = layer.gate(x)
    assert g.shape == (1, 20, 2) and (g < 0).all()
    with torch.no_grad():
        layer.g_proj.bias.fill_(30)
    assert layer(x).abs().max() < 1e-8
