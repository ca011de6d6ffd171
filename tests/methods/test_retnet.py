"""What is special to RetNet: its fixed rates, and what follows from them."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.retnet import RetNet
from effattn_lite.ops.retnet import log_decay, retnet, step
from effattn_lite.reference import retnet as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

GAMMAS = (31 / 32, 63 / 64, 127 / 128, 255 / 256)


def test_published_gammas():
    """gamma = 1 - 2^(-5 - arange(0, h)), as the paper prints it: what a state keeps if nothing is written."""
    inputs = make_inputs("retnet", T=1, H=4, hard="zero", state=True)
    _, S = reference.recurrent(**inputs)
    kept = S / inputs["initial_state"]
    assert max_error(kept, np.broadcast_to(np.reshape(GAMMAS, (4, 1, 1)), kept.shape)) < 1e-15
    assert (
        max_error(log_decay(4, torch.zeros(1, dtype=torch.float64)).exp(), torch.tensor(GAMMAS).double())
        < 1e-15
    )


def test_half_life_of_the_first_head():
    """31/32 a token: half is gone between the 21st and the 22nd."""
    half = np.log(0.5) / np.log(31 / 32)
    assert 21 < half < 22
    for T, more in ((21, True), (22, False)):
        inputs = make_inputs("retnet", B=1, T=T, H=1, hard="zero", state=True)
        kept = reference.chunkwise(**inputs)[1] / inputs["initial_state"]
        assert ((kept > 0.5) == more).all()


def test_slow_heads_still_forget():
    """In float32 1 - 2^-29 is 1, but its logarithm is not 0."""
    g = log_decay(40, torch.zeros(1))
    assert (g < 0).all() and float(g[39]) == pytest.approx(-(2.0**-44), rel=1e-6)


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_gradient_through_a_carried_state(impl, device):
    """Backpropagation through two calls, linked by the state, is that through one call."""
    inputs = make_inputs("retnet", B=1, T=50, H=2, K=16, V=16, state=True, dtype="float32")

    def gradients(cut):
        x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
        state, total = x["initial_state"], 0
        for a, b in zip((0, *cut), (*cut, 50), strict=True):
            qkv = (x[n][:, a:b] for n in "qkv")
            o, state = retnet(*qkv, initial_state=state, output_final_state=True, impl=impl)
            total = total + o.square().sum()
        (total + state.sum()).backward()
        return tuple(t.grad for t in x.values())

    assert relative_error(gradients((19,)), gradients(())) < 1e-5


def test_state_is_not_an_alias():
    """Decoding from a copy must not write into the prompt's state."""
    x = to_torch(make_inputs("retnet", T=1, state=True))
    state = x.pop("initial_state")
    before = state.clone()
    step(*(t[:, 0] for t in x.values()), state=state)
    retnet(**x, initial_state=state, output_final_state=True)[1].zero_()
    assert torch.equal(state, before)


def test_layer_sees_distances_only():
    """Rotation by position: how many tokens an empty memory has seen does not matter."""
    layer, x = RetNet(32, 2).double(), torch.randn(1, 20, 32, dtype=torch.float64)
    state = torch.zeros(1, 2, 16, 32, dtype=torch.float64)
    late = layer.prefill(x, {"state": state, "length": torch.tensor([1000])})[0]
    assert relative_error(late, layer(x)) < 1e-10


def test_layer_angles():
    """Wavelengths from 1 to 1/10000 radian a token, both included, as in torchscale's RetNetRelPos."""
    layer = RetNet(64, 2)
    half = layer.head_dim // 2
    omega = layer.theta ** -(torch.arange(half) / half)
    assert max_error(omega, 1 / 10_000 ** torch.linspace(0, 1, half)) < 1e-6


def test_packed_prefill_can_be_continued():
    layer, x = RetNet(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 12, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
    assert cache["length"].tolist() == [12, 0, 18]


def test_layer_refuses_odd_heads():
    with pytest.raises(ValueError, match="width is 30.*2 heads = 4"):
        RetNet(30, 2)
