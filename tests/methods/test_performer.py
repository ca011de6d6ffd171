"""What is special to Performer: features that are right on average, positive, and held in float32's range."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.performer import Performer
from effattn_lite.layers.performer import draw_omega as draw_in_torch
from effattn_lite.ops.linear_transformer import linear_transformer
from effattn_lite.ops.performer import performer
from effattn_lite.reference.performer import draw_omega, features
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("performer").forms)
IMPLS = pytest.mark.parametrize("impl", ("torch", "triton"))


def phi(x, omega):
    """The map as the paper prints it, in torch."""
    x = x / x.shape[-1] ** 0.25
    return ((x @ omega.T) - x.square().sum(-1, keepdim=True) / 2).exp() / omega.shape[0] ** 0.5


def test_reduces_to_linear_transformer():
    """The subtracted exponents and the share of M cancel: the same as linear attention over the plain map."""
    x = to_torch(make_inputs("performer", T=37))
    omega = x.pop("omega")
    want = linear_transformer(**x, feature_map=lambda t: phi(t, omega), output_final_state=True)
    assert relative_error(performer(**x, omega=omega, output_final_state=True), want) < 1e-12


def products(draw, *, n, M, K=8, length=0.7):
    """n independent estimates of one kernel value, that value, and |q + k|^2; |q| = |k| = length, scaled."""
    rng = np.random.default_rng(0)
    q, k = (x / np.linalg.norm(x) * length * K**0.25 for x in rng.normal(size=(2, K)))
    omega = np.stack([draw(rng, M, K) for _ in range(n)])
    at = [features(np.broadcast_to(x, (n, K)), omega) for x in (q, k)]
    # read as n heads, each of them with its own frequencies
    return np.sum(at[0] * at[1], axis=-1), np.exp(q @ k / K**0.5), np.sum((q + k) ** 2) / K**0.5


def gaussian(rng, M, K):
    return rng.normal(size=(M, K))


@pytest.mark.parametrize("draw", (gaussian, draw_omega))
def test_unbiased(draw):
    """The mean of 4,000 estimates lies within four standard errors of e^(q . k / sqrt(K))."""
    found, exact, _ = products(draw, n=4000, M=16)
    assert abs(found.mean() - exact) < 4 * found.std() / 4000**0.5


def test_variance_of_independent_frequencies():
    """kappa^2 (e^(|q + k|^2) - 1) / M, within four standard errors of a sample variance."""
    found, exact, square = products(gaussian, n=20_000, M=16)
    want = exact**2 * (np.exp(square) - 1) / 16
    error = np.sqrt((np.mean((found - found.mean()) ** 4) - found.var() ** 2) / len(found))
    assert abs(found.var() - want) < 4 * error


def test_orthogonal_frequencies_vary_less():
    """With blocks of K, at M = K, the variance is smaller by more than the noise of both."""
    free, bound = (products(draw, n=4000, M=8, length=1.0)[0] for draw in (gaussian, draw_omega))
    assert bound.var() < 0.85 * free.var()


@pytest.mark.parametrize("draw", (draw_omega, lambda rng, M, K: draw_in_torch(M, K).numpy()))
def test_frequencies(draw):
    """Blocks of orthogonal rows, each by itself a Gaussian vector, whose squares add up to K on average."""
    rng, K = np.random.default_rng(0), 8
    drawn = np.stack([draw(rng, 20, K) for _ in range(500)])
    assert drawn.shape == (500, 20, K)
    for block in (drawn[:, :8], drawn[:, 8:16], drawn[:, 16:]):
        gram = np.einsum("nik,njk->nij", block, block)
        assert np.abs(gram * (1 - np.eye(block.shape[1]))).max() < 1e-4
    # of 10,000 lengths: chi-square, variance 2 K; of 10,000 entries in every channel: mean 0, variance 1
    assert abs(np.mean(np.sum(drawn**2, -1)) - K) < 4 * (2 * K / 10_000) ** 0.5
    assert np.abs(drawn.mean((0, 1))).max() < 4 / 100
    assert np.abs((drawn**2).mean((0, 1)) - 1).max() < 4 * (2 / 10_000) ** 0.5 * 2


def test_many_features_approach_softmax_attention():
    """64 times the features, an eighth of the error, within a factor of two."""
    x = make_inputs("performer", B=1, T=40, H=2, K=8, V=8)
    del x["omega"]
    # far apart, a product of features has rare values that are huge, and hundreds of features are few
    x |= {"q": x["q"] / 2, "k": x["k"] / 2}
    want = run_reference("softmax_attention", x)[0]
    errors = []
    for M in (64, 4096):
        runs = [
            run_reference("performer", x | {"omega": draw_omega(np.random.default_rng(i), M, 8)})[0]
            for i in range(8)
        ]
        errors.append(np.mean([np.sqrt(np.mean((o - want) ** 2)) for o in runs]))
    assert 4 < errors[0] / errors[1] < 16


@FORMS
def test_an_average_of_the_values(form):
    """Features are positive, so weights are: no output leaves the range of the values seen."""
    inputs = make_inputs("performer", T=50)
    o, _ = run_reference("performer", inputs, form=form)
    v = inputs["v"]
    assert (o <= np.maximum.accumulate(v, axis=1) + 1e-12).all()
    assert (o >= np.minimum.accumulate(v, axis=1) - 1e-12).all()


def test_a_head_may_have_its_own_frequencies():
    x = to_torch(make_inputs("performer", T=20))
    each = torch.stack((x["omega"], x["omega"].flip(0) + 1))
    o = performer(**x | {"omega": each})[0]
    for h in range(2):
        alone = {n: t[:, :, h : h + 1] for n, t in x.items() if n != "omega"}
        assert relative_error(o[:, :, h : h + 1], performer(**alone, omega=each[h])[0]) < 1e-12


@IMPLS
def test_queries_beyond_the_range_of_an_exponential(impl, device):
    """Queries of length 36: features around e^-160, beyond float32, but their largest exponent cancels."""
    inputs = make_inputs("performer", B=1, T=33, H=2, K=16, V=16, dtype="float32")
    inputs["q"] *= 36 / np.linalg.norm(inputs["q"], axis=-1, keepdims=True)
    want = run_reference("performer", inputs)[0]
    o = performer(**to_torch(inputs, dtype="float32", device=device), impl=impl)[0]
    assert relative_error(o, want) < 1e-4


@IMPLS
def test_keys_made_to_fit_a_frequency(impl, device):
    """k = omega K^(1/4) has a feature of e^200: it is cut, and the token wins, as it should."""
    inputs = make_inputs("performer", B=1, T=20, H=1, K=16, V=16, dtype="float32")
    omega = inputs["omega"]
    omega *= 20 / np.linalg.norm(omega, axis=-1, keepdims=True)
    inputs["k"][0, 5, 0] = inputs["q"][0, 8:, 0] = 2 * omega[3]
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    o = performer(**x, impl=impl)[0]
    assert relative_error(o[0, 8:, 0], x["v"][0, 5, 0].expand(12, -1)) < 1e-5
    o.sum().backward()
    assert all(t.grad.isfinite().all() for t in x.values())


@IMPLS
def test_keys_whose_features_underflow(impl, device):
    """Keys of length 52: features of e^-338, nothing that float32 could hold, so o is 0, not NaN."""
    inputs = make_inputs("performer", B=1, T=20, H=1, K=16, V=16, dtype="float32")
    inputs["k"] *= 52 / np.linalg.norm(inputs["k"], axis=-1, keepdims=True)
    inputs["omega"] /= 10
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    o = performer(**x, impl=impl)[0]
    assert (o == 0).all()
    o.sum().backward()
    assert all((t.grad == 0).all() for t in x.values())


def test_redrawn_frequencies():
    layer = Performer(32, 2)
    before = layer.omega.clone()
    assert "omega" in layer.state_dict() and layer.omega.shape == (32, 16)
    layer.redraw(generator=torch.Generator().manual_seed(1))
    assert max_error(before, layer.omega) > 1
    again = Performer(32, 2)
    again.redraw(generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.omega, layer.omega)


def test_errors_name_both_sides():
    x = to_torch(make_inputs("performer", T=4))
    with pytest.raises(ValueError, match=r"omega has shape \(12, 15\), expected \[M, K\] = \(12, 16\)"):
        performer(**x | {"omega": x["omega"][:, 1:]})
    with pytest.raises(
        ValueError, match=r"omega has shape \(3, 12, 16\), expected \[H, M, K\] = \(2, 12, 16\)"
    ):
        performer(**x | {"omega": x["omega"].expand(3, -1, -1)})
    with pytest.raises(ValueError, match=r"omega has shape \(12,\), expected 3 axes"):
        performer(**x | {"omega": x["omega"][:, 0]})
