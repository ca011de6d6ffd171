"""What is special to Titans' memory: a momentum that carries surprise on, and forgetting."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.titans import Titans
from effattn_lite.ops.titans import titans
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("titans").forms)


def draw(**sizes):
    return make_inputs("titans", **sizes)


@FORMS
def test_reduces_to_deltanet(form):
    """g = 0, mu = 0, eta = beta and mini-batches of one token: the delta rule is one step of descent."""
    x = draw(T=37)
    o, (M, P, start, c) = run_reference(
        "titans", x | {"g": 0 * x["g"], "mu": 0 * x["mu"]}, form=form, batch_size=1
    )
    plain = {name: x[name] for name in "qkv"} | {"beta": x["eta"]}
    assert relative_error((o, M), run_reference("deltanet", plain, scale=1.0)) < 1e-10


@FORMS
def test_a_shock_by_hand(form):
    """One surprise of 1, then none: momentum halves each step, memory adds what is left of it."""
    T, one = 4, np.ones((1, 4, 1, 1))
    # a key of 0 is never surprised
    k = np.array([1.0, 0, 0, 0]).reshape(1, T, 1, 1)
    flat = one[..., 0]
    o, (M, P, *_) = run_reference(
        "titans", dict(q=one, k=k, v=one, g=0 * flat, mu=flat / 2, eta=flat), form=form
    )
    assert o[0, :, 0, 0].tolist() == pytest.approx([1, 1.5, 1.75, 1.875])
    assert P.item() == pytest.approx(0.125) and M.item() == pytest.approx(1.875)


@FORMS
def test_forgetting_is_of_the_memory_alone(form):
    """With nothing to learn, the memory fades by e^g and the momentum by mu."""
    x = draw(T=9)
    x["eta"] = 0 * x["eta"]
    M, P = np.random.default_rng(1).normal(size=(2, 2, 2, 16, 24))
    x["initial_state"] = M, P, M, np.zeros(2)
    _, (M1, P1, *_) = run_reference("titans", x, form=form)
    for t in range(9):
        P = x["mu"][:, t, :, None, None] * P
        M = np.exp(x["g"][:, t])[..., None, None] * M + P
    assert relative_error((M1, P1), (M, P)) < 1e-10


def test_the_surprise_is_the_gradient():
    """eta_t = 1 writes minus torch's own gradient of half the squared error into the momentum."""
    x = to_torch(draw(B=1, T=1, H=1))
    x["eta"] = torch.ones_like(x["eta"])
    M = torch.randn(16, 24, dtype=torch.float64, requires_grad=True)
    loss = 0.5 * (x["k"][0, 0, 0] @ M - x["v"][0, 0, 0]).square().sum()
    state = (M[None, None], 0 * M[None, None], M[None, None], torch.zeros(1, dtype=torch.float64))
    P = titans(**x, initial_state=state, output_final_state=True)[1][1]
    assert relative_error(P[0, 0].detach(), -torch.autograd.grad(loss, M)[0]) < 1e-10


def test_a_momentum_of_zero_has_a_gradient():
    """mu = 0 at a token: no logarithm of it is taken."""
    x = to_torch(draw(B=1, T=12, H=1, K=4, V=4), requires_grad=True)
    mu = x["mu"].detach().clone()
    mu[:, 5] = 0
    x["mu"] = mu.requires_grad_()
    titans(**x)[0].square().sum().backward()
    assert mu.grad.isfinite().all() and mu.grad[:, 5].abs().min() > 0


def test_there_is_no_kernel():
    with pytest.raises(NotImplementedError, match="no kernel"):
        titans(**to_torch(draw(T=3), dtype="float32"), impl="triton")


def test_packed_prefill_can_be_continued():
    layer, x = Titans(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert max_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
