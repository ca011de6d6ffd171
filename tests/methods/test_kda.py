"""What is special to KDA: a decay a key channel, before the delta step, and why the order matters."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.kda import KDA
from effattn_lite.ops.gated_deltanet import gated_deltanet as gated_deltanet_op
from effattn_lite.ops.kda import kda
from effattn_lite.reference import gated_deltanet
from effattn_lite.reference import kda as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

FORMS = (reference.recurrent, reference.parallel, reference.chunkwise)


def draw(*, beta=None, **sizes):
    x = make_inputs("kda", state=True, **sizes)
    if beta is not None:
        x["beta"][:] = beta
    return x


@pytest.mark.parametrize("form", FORMS)
def test_reduces_to_gated_deltanet(form):
    """g equal in the key channels of a head, shared heads too."""
    x = draw(T=37, H=2, HV=4)
    g = x["g"][..., :1]
    want = gated_deltanet.recurrent(**x | {"g": g[..., 0]})
    assert relative_error(form(**x | {"g": np.repeat(g, 16, axis=-1)}), want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_a_key_reads_the_value_it_has_just_written(form):
    """beta = 1 and keys of length 1: S_t^T k_t = v_t at every token, whatever the gates."""
    x = draw(T=37, beta=1)
    o, _ = form(**x | {"q": x["k"]}, scale=1.0)
    assert max_error(o, x["v"]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_beta_two_reflects(form):
    """v = 0, g = 0, S_0 = I: the state is a product of reflections, hence orthogonal."""
    x = draw(T=37, K=16, V=16, beta=2)
    x["v"][:], x["g"][:] = 0, 0
    x["initial_state"][:] = np.eye(16)
    _, S = form(**x)
    assert max_error(S @ S.swapaxes(2, 3), np.broadcast_to(np.eye(16), S.shape)) < 1e-12


def test_the_survey_order_is_another_recurrence():
    """The key reads before the decay: one step differs by beta k ((I - Diag(alpha)) k)^T S."""
    x = draw(T=1)
    k, S, beta = x["k"][:, 0], x["initial_state"], x["beta"][:, 0, :, None]
    alpha = np.exp(x["g"][:, 0])
    write = beta * (x["v"][:, 0] - np.einsum("bhk,bhkv->bhv", k, S))
    survey = alpha[..., None] * S + np.einsum("bhk,bhv->bhkv", k, write)
    between = np.einsum("bhk,bhj,bhjv->bhkv", beta * k, (1 - alpha) * k, S)
    assert relative_error(reference.recurrent(**x)[1] - survey, between) < 1e-12
    assert np.abs(between).max() > 0.01


def test_decay_and_delta_step_do_not_commute():
    """v = 0: decay last differs from ours by beta (Diag(alpha) k k^T - k k^T Diag(alpha)) S."""
    x = draw(T=1)
    x["v"][:] = 0
    k, alpha = x["k"][:, 0], np.exp(x["g"][:, 0])
    last = alpha[..., None] * reference.recurrent(**x | {"g": np.zeros_like(x["g"])})[1]
    kk = x["beta"][:, 0, :, None, None] * np.einsum("bhk,bhj->bhkj", k, k)
    between = (alpha[..., :, None] * kk - kk * alpha[..., None, :]) @ x["initial_state"]
    assert relative_error(reference.recurrent(**x)[1] - last, between) < 1e-12
    assert np.abs(between).max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_unit_keys_of_one_channel_are_gated_slots(form):
    """k_t = e_c: channel c of the state is a slot of its own, which fades and is overwritten."""
    x = draw(T=37, K=4)
    slot = np.random.default_rng(1).integers(4, size=37)
    x["k"][:] = np.eye(4)[slot][:, None]
    S = x["initial_state"].copy()
    for t, c in enumerate(slot):
        S *= np.exp(x["g"][:, t])[..., None]
        S[:, :, c] += x["beta"][:, t, :, None] * (x["v"][:, t] - S[:, :, c])
    assert relative_error(form(**x)[1], S) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_channels_of_very_different_decay(form):
    """0, -1e-6, -1, -20 and -800 nats side by side: keys divided by their decays would overflow."""
    x = draw(T=50, K=10)
    x["g"][:] = [0.0, -1e-6, -1.0, -20.0, -800.0] * 2
    with np.errstate(over="raise", invalid="raise"):
        assert relative_error(form(**x), reference.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("form", (reference.recurrent, reference.chunkwise))
@pytest.mark.parametrize("beta", (1, 2))
def test_repeated_keys_stay_finite(form, beta):
    """One key 4096 times with weak gates: beta = 1 reads v_t, beta = 2 does not leave its random walk."""
    x = draw(B=1, T=4096, H=1, K=8, V=8, hard="weak", beta=beta)
    x["k"][:] = x["k"][:, :1]
    o, S = form(**x | {"q": x["k"]}, scale=1.0)
    assert np.isfinite(o).all() and np.isfinite(S).all()
    if beta == 1:
        assert max_error(o, x["v"]) < 1e-12
    else:
        # r_t = 2 v_t - r_{t-1} without the gates: no more than r_0 and twice the values' lengths in sum
        assert np.abs(o).max() < 2 * np.abs(x["v"]).sum(1).max() + np.abs(x["initial_state"]).sum()


@pytest.mark.parametrize("form", FORMS)
def test_value_heads_share_keys(form):
    x = draw(T=20, H=2, HV=6)
    alone = x | {name: np.repeat(x[name], 3, axis=2) for name in "qk"}
    assert relative_error(form(**x), form(**alone)) < 1e-12


@pytest.mark.parametrize("chunk_size", (1, 2, 7, 64))
def test_any_chunk_size_gives_the_same(chunk_size):
    x = draw(T=37)
    assert relative_error(reference.chunkwise(**x, chunk_size=chunk_size), reference.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_reduces_to_gated_deltanet(impl, device):
    """A decay a channel by its own kernels, equal in all channels."""
    x = to_torch(draw(B=1, T=70, H=2, HV=4, K=16, V=16), dtype="float32", device=device)
    x["g"] = x["g"][..., :1].expand_as(x["g"])
    want = gated_deltanet_op(**x | {"g": x["g"][..., 0]}, output_final_state=True, impl=impl)
    assert relative_error(kda(**x, output_final_state=True, impl=impl), want) < 1e-6


def test_layer_decay_is_a_decay():
    """g <= 0 whatever is learned; it begins as a step of 0.001 to 0.1 times A of 1 to 16."""
    layer = KDA(32, 4)
    g = layer.gates(torch.zeros(1, 1, 32))["g"]
    assert g.shape == (1, 1, 4, 8)
    assert g.max() < -0.00099 and g.min() > -16 * 0.101
    assert (layer.gates(100 * torch.randn(1, 50, 32))["g"] <= 0).all()
