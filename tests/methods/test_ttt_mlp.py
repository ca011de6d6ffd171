"""What is special to TTT-MLP: a state that is a network, its gradients by hand."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.ttt_mlp import TTTMLP
from effattn_lite.ops.ttt_mlp import ttt_mlp
from effattn_lite.reference.ttt_mlp import gelu, normalised
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("ttt_mlp").forms)


def draw(**sizes):
    return make_inputs("ttt_mlp", **sizes)


def test_gelu_and_its_derivative():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    want = torch.nn.functional.gelu(x, approximate="tanh")
    slope = torch.autograd.grad(want.sum(), x)[0]
    assert relative_error(gelu(x.detach().numpy()), (want, slope)) < 1e-10


def test_a_mini_batch_is_autograd():
    """Three whole mini-batches, each one step of torch's own gradient of the summed losses."""
    x = to_torch(draw(B=1, T=12, H=1, K=6, M=10))
    model = [x[name][0] for name in ("w1", "b1", "w2", "b2")]
    for j in range(0, 12, 4):
        k, v, eta = (x[name][0, j : j + 4, 0] for name in ("k", "v", "eta"))
        model = [part.detach().requires_grad_() for part in model]
        hidden = torch.nn.functional.gelu(k @ model[0] + model[1], approximate="tanh")
        z = hidden @ model[2] + model[3]
        y = torch.nn.functional.layer_norm(z, (6,), x["ln_weight"][0], x["ln_bias"][0], eps=1e-6)
        loss = (0.5 * eta * (k + y - v).square().sum(-1)).sum()
        model = [a - da for a, da in zip(model, torch.autograd.grad(loss, model), strict=True)]
    state = ttt_mlp(**x, batch_size=4, output_final_state=True)[1]
    got = tuple(
        x[name][0] + part[0, 0] for name, part in zip(("w1", "b1", "w2", "b2"), state[:4], strict=True)
    )
    assert relative_error(got, tuple(part.detach() for part in model)) < 1e-10
    assert all(part.abs().max() == 0 for part in state[4:])


@FORMS
def test_without_a_rate_nothing_is_learned(form):
    """eta = 0: o = q + LN(gelu(q w1 + b1) w2 + b2), whatever the keys."""
    x = draw(T=20)
    x["eta"] = 0 * x["eta"]
    o, state = run_reference("ttt_mlp", x, form=form)
    hidden = gelu(np.einsum("bthk,hkm->bthm", x["q"], x["w1"]) + x["b1"])[0]
    z = np.einsum("bthm,hmk->bthk", hidden, x["w2"]) + x["b2"]
    assert relative_error(o, x["q"] + x["ln_weight"] * normalised(z)[0] + x["ln_bias"]) < 1e-10
    assert all(np.abs(part).max() == 0 for part in state[:8])


@FORMS
def test_the_size_of_a_mini_batch_is_part_of_the_model(form):
    """The first token of a text is alone in any mini-batch; the second, with 1, sees a trained model."""
    x = draw(T=20)
    one, many = (run_reference("ttt_mlp", x, form=form, batch_size=n)[0] for n in (1, 16))
    assert relative_error(many[:, 0], one[:, 0]) < 1e-10
    assert relative_error(many[:, 1], one[:, 1]) > 1e-4


def test_there_is_no_kernel():
    with pytest.raises(NotImplementedError, match="no kernel"):
        ttt_mlp(**to_torch(draw(T=3), dtype="float32"), impl="triton")


def test_packed_prefill_can_be_continued():
    layer, x = TTTMLP(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    assert cache["c"].tolist() == [0, 12, 2]
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert max_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
