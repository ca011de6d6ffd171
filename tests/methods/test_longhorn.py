"""What is special to Longhorn: the closed form of its objective, and the diagonal that it keeps of it."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.longhorn import Longhorn
from effattn_lite.ops.longhorn import longhorn
from effattn_lite.reference import deltanet
from effattn_lite.reference import longhorn as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

FORMS = (reference.recurrent, reference.scan)


def draw(**sizes):
    return make_inputs("longhorn", state=True, **sizes)


def closed_form(x):
    """The step before the approximation: s_i = (I - eps_i k k^T) s'_i + eps_i v_i k for value channel i."""
    k, v, beta, S = x["k"][:, 0], x["v"][:, 0], x["beta"][:, 0], x["initial_state"]
    eps = beta / (1 + beta * np.einsum("bhk,bhk->bh", k, k)[..., None])
    read = np.einsum("bhk,bhkv->bhv", k, S)
    return S + np.einsum("bhk,bhv->bhkv", k, eps * (v - read)), eps


def half_gradient(x, S):
    """Of |S - S'|_F^2 + |S^T k - v|^2 weighted with beta, at S."""
    k, v, beta = x["k"][:, 0], x["v"][:, 0], x["beta"][:, 0]
    error = np.einsum("bhk,bhkv->bhv", k, S) - v
    return S - x["initial_state"] + np.einsum("bhk,bhv->bhkv", k, beta * error)


def test_the_closed_form_zeroes_the_gradient():
    x = draw(T=1)
    S, _ = closed_form(x)
    assert np.abs(half_gradient(x, S)).max() < 1e-12
    assert np.abs(half_gradient(x, x["initial_state"])).max() > 1


@pytest.mark.parametrize("form", FORMS)
def test_the_diagonal_is_what_differs(form):
    """The method drops the off-diagonal part of k k^T: it differs by (k k^T - Diag(k^2)) S' Diag(eps)."""
    x = draw(T=1)
    exact, eps = closed_form(x)
    k = x["k"][:, 0]
    off = np.einsum("bhk,bhj->bhkj", k, k) * (1 - np.eye(16))
    between = (off @ x["initial_state"]) * eps[:, :, None]
    assert relative_error(form(**x)[1] - exact, between) < 1e-12
    assert np.abs(half_gradient(x, form(**x)[1])).max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_one_channel_are_solved_exactly(form):
    """k k^T is diagonal then, and the step zeroes the gradient."""
    x = draw(T=1)
    x["k"] *= np.arange(16) == 5
    assert np.abs(half_gradient(x, form(**x)[1])).max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_reduces_to_deltanet(form):
    """K = 1, beta equal in the value channels and b / (1 - b k^2) for DeltaNet's b."""
    x = make_inputs("deltanet", T=37, K=1, state=True)
    b = x["beta"][..., None]
    x["k"] *= np.random.default_rng(1).uniform(0.5, 1, size=x["k"].shape)
    beta = np.broadcast_to(b / (1 - b * x["k"] ** 2), x["v"].shape)
    assert relative_error(form(**x | {"beta": beta}), deltanet.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_no_factor_leaves_zero_to_one(form):
    """v = 0: no entry grows or changes its sign, not with keys a thousand times longer either."""
    x = draw(T=1)
    x["v"][:] = 0
    for length in (1e-3, 1, 1e3):
        kept = form(**x | {"k": length * x["k"]})[1] / x["initial_state"]
        assert (kept > 0).all() and (kept <= 1).all()


@pytest.mark.parametrize("form", FORMS)
def test_beta_zero_changes_nothing(form):
    x = draw(T=37)
    x["beta"][:] = 0
    assert np.array_equal(form(**x)[1], x["initial_state"])


def test_a_heavy_weight_is_limited_by_the_key():
    """beta to infinity: eps is 1 / |k|^2, and one channel alone is overwritten."""
    x = draw(T=1, K=1)
    x["beta"][:] = 1e15
    o, _ = reference.recurrent(**x | {"q": x["k"]})
    assert max_error(o, x["v"]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_repeated_keys_stay_finite(form):
    """One key 4096 times: every entry ends at the mean that its factor weighs, not beyond v / k."""
    x = draw(B=1, T=4096, H=1, K=4, V=4, hard="repeated")
    _, S = form(**x)
    far = np.abs(x["v"]).max() / np.abs(x["k"][0, 0, 0])[:, None]
    assert (np.abs(S) <= np.maximum(far, np.abs(x["initial_state"]))).all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_the_op_stays_within_zero_to_one(impl, device):
    """v = 0 and keys from tiny to huge: no entry of the op's state grows or changes its sign."""
    inputs = make_inputs("longhorn", B=1, T=20, H=2, K=8, V=12, state=True, dtype="float32")
    inputs["v"][:] = 0
    inputs["k"] *= np.logspace(-3, 3, 20, dtype=np.float32)[:, None, None]
    x = to_torch(inputs, dtype="float32", device=device)
    kept = longhorn(**x, output_final_state=True, impl=impl)[1] / x["initial_state"]
    # the largest entries of long keys are kept to the last bit of 1 - k^2 eps
    assert (kept >= -1e-6).all() and (kept <= 1).all()


def test_op_errors():
    x = to_torch(draw(T=9))
    with pytest.raises(ValueError, match=r"beta has shape \(2, 9, 2, 16\).*24.*as q"):
        longhorn(**x | {"beta": x["beta"][..., :16]})
    with pytest.raises(TypeError, match="beta is torch.float32, expected torch.float64 as q"):
        longhorn(**x | {"beta": x["beta"].float()})


def test_layer_has_one_head_as_its_authors():
    """By default one key and one query for all channels, 16 entries each, and weights that begin near 1/2."""
    torch.manual_seed(0)
    layer, x = Longhorn(64), torch.randn(2, 30, 64)
    state = layer.prefill(x)[1]["state"]
    assert state.shape == (2, 1, 16, 128)
    beta = layer._project(layer.conv.prefill(layer.in_proj(x)[..., :128])[0])[2]
    assert 0.3 < beta.min() and beta.max() < 0.7


def test_layer_skips_by_D():
    """Without keys the state stays empty, and what is left is the gated skip."""
    torch.manual_seed(0)
    layer, x = Longhorn(16).double(), torch.randn(1, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.x_proj.weight[1:] = 0
    v, z = layer.in_proj(x).chunk(2, dim=-1)
    v = layer.conv.prefill(v)[0]
    assert relative_error(layer(x), layer.out_proj(v * torch.nn.functional.silu(z))) < 1e-12
