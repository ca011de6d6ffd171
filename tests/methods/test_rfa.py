"""What is special to random feature attention: a Gaussian of distances on average, negative at times."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.rfa import RFA
from effattn_lite.ops.linear_transformer import linear_transformer
from effattn_lite.ops.rfa import rfa
from effattn_lite.reference.rfa import draw_omega, features
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_op, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("rfa").forms)
IMPLS = pytest.mark.parametrize("impl", ("torch", "triton"))


def test_reduces_to_linear_transformer():
    """Random features are a map like any other, here the same in all heads."""
    x = to_torch(make_inputs("rfa", T=37))
    omega = x.pop("omega")[0]

    def phi(t):
        u = t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() @ omega.T
        return torch.cat((u.sin(), u.cos()), dim=-1) / omega.shape[0] ** 0.5

    want = linear_transformer(**x, feature_map=phi, output_final_state=True)
    assert relative_error(rfa(**x, omega=omega, output_final_state=True), want) < 1e-12


@pytest.mark.parametrize("sigma", (0.7, 1.5))
def test_unbiased_with_the_variance_of_theory(sigma):
    """With s = sigma^2 |q - k|^2 / 2: mean e^(-s), variance ((1 + e^(-4 s)) / 2 - e^(-2 s)) / M."""
    rng, n, M, K = np.random.default_rng(0), 20_000, 16, 8
    q, k = rng.normal(size=(2, K))
    omega = draw_omega(rng, n * M, K, sigma=sigma).reshape(n, M, K)
    at = [features(np.broadcast_to(x, (n, K)), omega) for x in (q, k)]
    found = np.sum(at[0] * at[1], axis=-1)
    s = sigma**2 * np.sum((q / np.linalg.norm(q) - k / np.linalg.norm(k)) ** 2) / 2
    assert abs(found.mean() - np.exp(-s)) < 4 * found.std() / n**0.5
    variance = ((1 + np.exp(-4 * s)) / 2 - np.exp(-2 * s)) / M
    error = np.sqrt((np.mean((found - found.mean()) ** 4) - found.var() ** 2) / n)
    assert abs(found.var() - variance) < 4 * error


def test_many_frequencies_approach_softmax_attention_over_directions():
    """Scores sigma^2 q . k of unit vectors; 64 times the frequencies, an eighth of the error, within 2."""
    x = make_inputs("rfa", B=1, T=40, H=2, K=8, V=8)
    del x["omega"]
    unit = x | {n: x[n] / np.linalg.norm(x[n], axis=-1, keepdims=True) for n in "qk"}
    want = run_reference("softmax_attention", unit, scale=0.8**2)[0]
    errors = []
    for M in (128, 8192):
        runs = [
            run_reference("rfa", x | {"omega": draw_omega(np.random.default_rng(i), M, 8, sigma=0.8)})[0]
            for i in range(8)
        ]
        errors.append(np.mean([np.sqrt(np.mean((o - want) ** 2)) for o in runs]))
    assert 4 < errors[0] / errors[1] < 16


def test_features_have_length_one():
    """A product of equal features is exactly 1, whatever the frequencies; lengths of q and k do not count."""
    x = make_inputs("rfa", T=20)
    at = features(x["q"], x["omega"])
    assert max_error(np.sum(at * at, axis=-1), np.ones(at.shape[:-1])) < 1e-12
    longer = run_reference("rfa", x | {"q": 3e3 * x["q"], "k": 5e3 * x["k"]})[0]
    # the 1e-6 under the root is what is left of a length
    assert relative_error(longer, run_reference("rfa", x | {"q": 1e3 * x["q"], "k": 1e3 * x["k"]})[0]) < 1e-8


@FORMS
def test_weights_add_up_to_one(form):
    """Without a floor equal values come back, though some products and some denominators are negative."""
    x = make_inputs("rfa", T=50, M=3)
    A = np.einsum("bthm,bjhm->bhtj", *(features(x[n], x["omega"]) for n in "qk"))
    assert (A < 0).any() and (np.sum(np.tril(A), axis=-1) < 0).any()
    o = run_reference("rfa", x | {"v": np.full_like(x["v"], 7.0)}, form=form)[0]
    assert max_error(o, np.full_like(x["v"], 7.0)) < 1e-9


@FORMS
def test_a_floor_bounds_the_output(form):
    """Denominators are at least 1: where weights sum to less, the output is the weighted sum itself."""
    x = make_inputs("rfa", T=50)
    A = np.tril(np.einsum("bthm,bjhm->bhtj", *(features(x[n], x["omega"]) for n in "qk")))
    total = np.sum(A, axis=-1).swapaxes(1, 2)[..., None]
    want = np.einsum("bhtj,bjhv->bthv", A, x["v"]) / np.maximum(total, 1)
    assert (total < 1).any() and (total > 1).any()
    assert relative_error(run_reference("rfa", x, form=form, floor=1.0)[0], want) < 1e-12
    assert relative_error(run_op("rfa", to_torch(x), floor=1.0)[0], want) < 1e-12


@IMPLS
def test_zero_vectors(impl, device):
    """Padding of zeros has features too, sine 0 and cosine 1, and gradients that stay finite in float16."""
    inputs = make_inputs("rfa", B=1, T=20, H=1, K=16, V=16, dtype="float16")
    inputs["q"][:, :5], inputs["k"][:, :5] = 0, 0
    x = to_torch(inputs, dtype="float16", device=device, requires_grad=True)
    o = rfa(**x, impl=impl)[0]
    mean = inputs["v"].astype(float).cumsum(1) / np.arange(1, 21)[:, None, None]
    assert max_error(o[:, :5].detach(), mean[:, :5]) < 2e-3
    o.float().sum().backward()
    assert all(t.grad.isfinite().all() for t in x.values())


def test_layer_learns_the_spread_and_draws_anew():
    layer = RFA(32, 2)
    assert layer.omega.shape == (2, 16, 16) and "omega" in layer.state_dict()
    x, before = torch.randn(1, 9, 32), layer.omega.clone()
    y = layer(x)
    with torch.no_grad():
        layer.sigma.zero_()
    # no frequency, no direction: every token counts alike
    mean = layer.project(x)[2].cumsum(1) / torch.arange(1, 10)[:, None, None]
    assert max_error(layer(x), layer.o_proj(mean.flatten(2))) < 1e-5 < max_error(layer(x), y)
    layer.redraw(generator=torch.Generator().manual_seed(1))
    assert max_error(before, layer.omega) > 1
