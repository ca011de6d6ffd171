"""What is special to GateLoop: channels that turn, by angles that add up over the text."""

import math

import numpy as np
import pytest
import torch

from effattn_lite.layers.gateloop import GateLoop
from effattn_lite.ops.engines.gateloop import _running_angle
from effattn_lite.ops.gateloop import gateloop
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("gateloop").forms)


def draw(**sizes):
    return make_inputs("gateloop", state=True, **sizes)


@FORMS
def test_reduces_to_gla(form):
    """theta = 0, scale = K^(-1/2): nothing turns, and the imaginary part fades unread."""
    x = draw(T=37)
    o, (real, _) = run_reference("gateloop", x | {"theta": 0 * x["theta"]}, form=form, scale=0.25)  # K = 16
    start = x.pop("initial_state")[0]
    del x["theta"]
    assert relative_error((o, real), run_reference("gla", x | {"initial_state": start})) < 1e-10


@FORMS
def test_half_turns_alternate(form):
    """theta = pi, g = 0, K = V = 1: 1, 2 - 1, 3 - 2 + 1, ..."""
    one = np.ones((1, 6, 1, 1))
    v = np.arange(1.0, 7.0).reshape(one.shape)
    o, _ = run_reference(
        "gateloop", {"q": one, "k": one, "v": v, "g": 0 * one, "theta": np.pi * one}, form=form
    )
    assert max_error(o.ravel(), np.array([1, 1, 2, 2, 3, 3])) < 1e-10


@FORMS
def test_scores_are_cosines_of_what_lies_between(form):
    """The paper's surrogate attention, token by token: decays and angles are summed over j < r <= t."""
    x = make_inputs("gateloop", T=20)
    o = np.zeros_like(x["v"])
    for t in range(20):
        for j in range(t + 1):
            size = np.exp(x["g"][:, j + 1 : t + 1].sum(1))
            swing = np.cos(x["theta"][:, j + 1 : t + 1].sum(1))
            o[:, t] += (x["q"][:, t] * size * swing * x["k"][:, j]).sum(-1, keepdims=True) * x["v"][:, j]
    assert relative_error(run_reference("gateloop", x, form=form)[0], o) < 1e-10


@FORMS
def test_a_turn_keeps_the_size(form):
    """Nothing fades and nothing is written: the modulus of every entry of the state stays."""
    x = draw(T=37, hard="zero")
    _, end = run_reference("gateloop", x | {"g": 0 * x["g"]}, form=form)
    assert relative_error(np.hypot(*end), np.hypot(*x["initial_state"])) < 1e-10
    assert max_error(end[0], x["initial_state"][0]) > 0.1


@FORMS
def test_whole_turns_are_nothing(form):
    x = draw(T=37)
    got = run_reference("gateloop", x | {"theta": x["theta"] + 2 * np.pi}, form=form)
    assert relative_error(got, run_reference("gateloop", x)) < 1e-10


def test_angles_of_a_long_text_keep_their_digits():
    """3 radians a token over 20,000 tokens: a plain float32 sum is off by a hundredth and more."""
    theta = torch.full((1, 20_000, 1, 1), 3.0) + 0.1 * torch.rand(1, 20_000, 1, 1)
    want = theta.double().cumsum(1)

    def error(angle):
        return float(((angle.double() - want + math.pi) % (2 * math.pi) - math.pi).abs().max())

    # sums of up to 100 radians, rounded 32 times
    assert error(_running_angle(theta)) < 32 * 50 * 2.0**-23
    naive = torch.tensor(np.cumsum(theta.numpy(), axis=1, dtype=np.float32))
    assert error(naive) > 0.01


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_gradient_through_a_carried_state(impl, device):
    """Backpropagation through two calls, linked by both parts of the state, is that through one call."""
    inputs = draw(B=1, T=50, H=1, K=8, V=8, dtype="float32")

    def gradients(cut):
        x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
        state, total = x["initial_state"], 0
        for a, b in zip((0, *cut), (*cut, 50), strict=True):
            part = {n: t[:, a:b] for n, t in x.items() if n != "initial_state"}
            o, state = gateloop(**part, initial_state=state, output_final_state=True, impl=impl)
            total = total + o.square().sum()
        leaves = [*(t for n, t in x.items() if n != "initial_state"), *x["initial_state"]]
        return torch.autograd.grad(total + state[0].sum() + state[1].sum(), leaves)

    assert relative_error(gradients((19,)), gradients(())) < 1e-5


def test_wide_heads_are_refused_by_name(device):
    x = to_torch(make_inputs("gateloop", B=1, T=4, H=1, K=130, V=8), dtype="float32", device=device)
    with pytest.raises(NotImplementedError, match="K <= 128.*got 130 and 8"):
        gateloop(**x, impl="triton")


def test_layer_forgets_a_little_at_first():
    """The size of a transition is a sigmoid: never 0, never 1; its angle is free."""
    layer = GateLoop(32, 2).double()
    *_, g, theta = layer._project(50 * torch.randn(1, 40, 32, dtype=torch.float64))
    assert (g < 0).all() and g.isfinite().all() and theta.abs().max() > math.pi


def test_packed_prefill_can_be_continued():
    layer, x = GateLoop(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 12, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
