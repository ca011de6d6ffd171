"""What is special to fast weight programmers: features that rarely meet, and a state of 2 K nu rows."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.fwp import FWP
from effattn_lite.ops.deltanet import deltanet
from effattn_lite.ops.fwp import features, fwp
from effattn_lite.reference import deltanet as delta_reference
from effattn_lite.reference import fwp as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

FORMS = (reference.recurrent, reference.chunkwise)


def draw(nu, **sizes):
    x = make_inputs("fwp", **sizes)
    shape = *x["beta"].shape[:1], x["q"].shape[2], 2 * x["q"].shape[3] * nu, x["v"].shape[3]
    return x | {"initial_state": np.random.default_rng(1).normal(size=shape)}


def test_features_by_hand():
    """K = 2, nu = 2, x = (1, -2): r = (1, 0, 0, 2); of all products only r_3 r_0 = 2 is left."""
    x = np.array([1.0, -2.0])
    assert reference.features(x, nu=2).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    # x = (1, 2): r = (1, 2, 0, 0); r_0 r_1 = 2 at place 0, and by the third shift r_1 r_0 = 2 at place 9
    assert reference.features(np.array([1.0, 2.0]), nu=3).tolist() == [0.5] + 8 * [0] + [0.5] + 2 * [0]


@pytest.mark.parametrize("nu", (1, 2, 3, 7))
def test_features_are_a_distribution(nu):
    x = np.random.default_rng(0).normal(size=(50, 4))
    phi = reference.features(x, nu=nu)
    assert phi.shape == (50, 8 * nu) and (phi >= 0).all()
    total = phi.sum(-1)
    assert ((np.abs(total - 1) < 1e-12) | (total == 0)).all()
    # a length does not count
    assert max_error(reference.features(3 * x, nu=nu), phi) < 1e-12
    assert max_error(features(torch.tensor(x), nu=nu), phi) < 1e-12


def test_opposite_keys_are_orthogonal():
    """phi(k) . phi(-k) = 0: what is positive in one is 0 in the other; K axes hold more than K such keys."""
    x = np.random.default_rng(0).normal(size=(50, 4))
    assert (reference.features(x) * reference.features(-x)).sum(-1).max() == 0


@pytest.mark.parametrize("nu", (1, 3))
@pytest.mark.parametrize("form", FORMS)
def test_is_deltanet_on_features(nu, form):
    x = draw(nu, T=37, K=6)
    phi = {name: reference.features(x[name], nu=nu) for name in "qk"}
    want = delta_reference.recurrent(**x | phi, scale=6**-0.5)
    assert relative_error(form(**x, nu=nu), want) < 1e-12
    tensors = to_torch(x)
    got = fwp(**tensors, nu=nu, output_final_state=True)
    want = deltanet(**tensors | to_torch(phi), scale=6**-0.5, output_final_state=True)
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_a_key_without_features_writes_nothing(form):
    """One positive number and else 0: every product is 0, so is the map, and no 0 is divided by 0."""
    x = draw(2, T=5, K=6)
    x["k"][:] = 0
    x["k"][..., 2] = 1
    assert np.array_equal(form(**x, nu=2)[1], x["initial_state"])
    k = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    features(k).sum().backward()
    assert k.grad.isfinite().all()


def test_features_of_16_bits_sum_to_one():
    """They are made in float32 and rounded once."""
    x = torch.randn(100, 8, dtype=torch.float32).half()
    assert (features(x).float().sum(-1) - 1).abs().max() < 2e-3 and features(x).dtype == torch.float16


def test_errors():
    x = to_torch(make_inputs("fwp", B=1, T=3, H=1, K=4))
    with pytest.raises(ValueError, match=r"nu is 8, expected 1 to 2 K - 1 = 7"):
        fwp(**x, nu=8)
    with pytest.raises(ValueError, match=r"width is 30, expected a multiple of heads = 4"):
        FWP(30, 4)


def test_triton_holds_256_features(device):
    x = to_torch(make_inputs("fwp", B=1, T=3, H=1, K=48), dtype="float32", device=device)
    with pytest.raises(NotImplementedError, match=r"K and V <= 256, got 288 and 24"):
        fwp(**x, nu=3, impl="triton")
