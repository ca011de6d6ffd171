"""What is special to lightning attention: the decay is an argument, constant, and may be learned."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.lightning_attention import LightningAttention
from effattn_lite.ops.lightning_attention import lightning_attention
from effattn_lite.ops.retnet import log_decay, retnet
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch


def draw(**sizes):
    return to_torch(make_inputs("lightning_attention", state=True, **sizes))


def test_reduces_to_retnet():
    """g_h = log(1 - 2^(-5-h)) and scale K^(-1/2) give retention."""
    x = draw(T=37, H=4)
    x["g"] = log_decay(4, x["q"])
    scale = x["q"].shape[-1] ** -0.5
    got = lightning_attention(**x, scale=scale, output_final_state=True)
    del x["g"]
    assert relative_error(got, retnet(**x, output_final_state=True)) < 1e-12


def test_without_decay_it_is_a_causal_sum():
    """g = 0: o_t is the sum of (q_t . k_j) v_j over j <= t."""
    x = draw(T=33)
    o = lightning_attention(x["q"], x["k"], x["v"], g=torch.zeros(2, dtype=torch.float64))[0]
    A = torch.einsum("bthk,bjhk->bhtj", x["q"], x["k"]).tril()
    assert relative_error(o, torch.einsum("bhtj,bjhv->bthv", A, x["v"])) < 1e-12


def test_decay_that_forgets_at_once():
    """g = -1000: only the token itself is left, and nothing is NaN."""
    x = draw(T=33)
    o = lightning_attention(x["q"], x["k"], x["v"], g=torch.full((2,), -1000.0, dtype=torch.float64))[0]
    assert relative_error(o, (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]) < 1e-12


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_learned_decay(impl, device):
    """The gradient of g points where the decay that made the data lies."""
    x = to_torch(
        make_inputs("lightning_attention", B=1, T=40, H=1, K=16, V=16, dtype="float32"), dtype="float32"
    )
    x = {name: t.to(device) for name, t in x.items()}
    del x["g"]
    target = lightning_attention(**x, g=torch.tensor([-0.2], device=device), impl=impl)[0]
    for start, sign in ((-0.3, -1), (-0.1, 1)):
        g = torch.tensor([start], device=device, requires_grad=True)
        (lightning_attention(**x, g=g, impl=impl)[0] - target).square().sum().backward()
        assert np.sign(float(g.grad)) == sign


def test_released_slopes():
    """ALiBi's slopes in the first layer, from 2^(-8/H) down to 2^-8; the last layer all but never forgets."""
    first, last = LightningAttention(32, 4, layer=0, layers=8), LightningAttention(32, 4, layer=7, layers=8)
    assert max_error(first.g, -(1 + 1e-5) * torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])) < 1e-7
    assert max_error(last.g, 1e-5 / (1 + 1e-5) * first.g) < 1e-7


def test_layer_takes_other_slopes():
    g = -(2.0 ** -torch.arange(1, 5))
    assert torch.equal(LightningAttention(32, 4, g=g).g, g)


def test_errors_name_both_sides():
    x = draw(T=4)
    with pytest.raises(ValueError, match=r"g has shape \(3,\), expected \[H\] = \(2,\)"):
        lightning_attention(**x | {"g": torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(TypeError, match="initial_state is torch.float32, expected torch.float64"):
        lightning_attention(**x | {"initial_state": x["initial_state"].float()})
    with pytest.raises(ValueError, match="chunk_size is 0, expected at least 1"):
        lightning_attention(**x, chunk_size=0)
    wide = to_torch(make_inputs("lightning_attention", T=2, K=512), dtype="float32")
    with pytest.raises((NotImplementedError, ValueError), match="K and V <= 256, got 512 and 24|triton"):
        lightning_attention(**wide, impl="triton")
