"""What is special to HGRN: an average that leaks, gates bounded from below, bounds that rise with depth."""

import numpy as np
import pytest
import torch
from torch import nn

from effattn_lite.layers.hgrn import HGRN, lower_bounds
from effattn_lite.ops.hgrn import hgrn
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("hgrn").forms)


@FORMS
def test_by_hand(form):
    """Keep 1/2, 1/4, all: 8 + 1 = 9 of h_0 = 16, then 9/4 + 1, then that + 1."""
    x, g = np.ones((1, 3, 1)), np.log([0.5, 0.25, 1.0])[None, :, None]
    o, h = run_reference("hgrn", {"x": x, "g": g, "initial_state": np.full((1, 1), 16.0)}, form=form)
    assert max_error(o[0, :, 0], np.array([9.0, 3.25, 4.25])) < 1e-12
    assert max_error(h, np.array([[4.25]])) < 1e-12


@FORMS
def test_tied_gates_average(form):
    """With x = (1 - e^g) c the state is an average of c: it stays among them, and a constant stays itself."""
    inputs = make_inputs("hgrn", T=60)
    c = inputs["x"]
    o, _ = run_reference("hgrn", inputs | {"x": (1 - np.exp(inputs["g"])) * c}, form=form)
    assert (np.abs(o) <= np.abs(c).max(axis=1, keepdims=True)).all()
    tied = {"x": 1 - np.exp(inputs["g"]), "g": inputs["g"], "initial_state": np.ones((2, 20))}
    assert max_error(run_reference("hgrn", tied, form=form)[0], np.ones_like(c)) < 1e-12


@FORMS
def test_a_constant_leak_is_a_geometric_sum(form):
    inputs = make_inputs("hgrn", T=40)
    keep = np.exp(-0.3)
    inputs["g"][:] = -0.3
    weight = np.tril(keep ** np.maximum(np.arange(40)[:, None] - np.arange(40), 0))
    want = np.einsum("tj,bjd->btd", weight, inputs["x"])
    assert relative_error(run_reference("hgrn", inputs, form=form)[0], want) < 1e-10


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_gradient_through_a_carried_state(impl, device):
    """Backpropagation through two calls, linked by the state, is that through one call."""
    inputs = make_inputs("hgrn", B=1, T=50, D=8, state=True, dtype="float32")

    def gradients(cut):
        x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
        state, total = x["initial_state"], 0
        for a, b in zip((0, *cut), (*cut, 50), strict=True):
            part = {n: x[n][:, a:b] for n in ("x", "g")}
            o, state = hgrn(**part, initial_state=state, output_final_state=True, impl=impl)
            total = total + o.square().sum()
        (total + state.sum()).backward()
        return tuple(t.grad for t in x.values())

    assert relative_error(gradients((19,)), gradients(())) < 1e-5


def test_bounds_rise_from_zero():
    """0 in the first layer, rising in every channel, below 1; Gamma = 0 gives equal shares."""
    gamma = lower_bounds(torch.randn(6, 32, dtype=torch.float64))
    assert (gamma[0] == 0).all() and (gamma.diff(dim=0) > 0).all() and (gamma < 1).all()
    assert max_error(lower_bounds(torch.zeros(4, 1))[:, 0], torch.tensor([0, 0.25, 0.5, 0.75])) < 1e-7


def test_layer_keeps_its_bound():
    """The gate of a layer lies between its bound and 1, and what it writes is what it does not keep."""
    bounds = nn.Parameter(torch.randn(3, 16, dtype=torch.float64))
    layer = HGRN(16, 1, layer=2, bounds=bounds).double()
    x = 30 * torch.randn(2, 50, 16, dtype=torch.float64)
    inputs, g = layer._gates(x)
    gamma = lower_bounds(bounds)[2]
    assert (g.exp() >= gamma - 1e-12).all() and (g <= 0).all()
    assert (g.exp() - gamma).min() < 1e-6, "the draw should reach the bound"
    written = ((1 - g.exp()) * nn.functional.silu(layer.c_proj(x))).detach()
    assert max_error(inputs.detach(), written) < 1e-12 * float(written.abs().max())
    layer(x).square().sum().backward()
    assert bounds.grad.abs().max() > 0


def test_layer_refuses_bounds_of_another_model():
    with pytest.raises(ValueError, match=r"bounds has shape \(2, 16\).*layers > 2"):
        HGRN(16, 1, layer=2, bounds=nn.Parameter(torch.zeros(2, 16)))


def test_packed_prefill_can_be_continued():
    layer, x = HGRN(32, 1).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
