"""What is special to Gated DeltaNet: the decay comes first, gates of any strength, shared heads."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.gated_deltanet import GatedDeltaNet
from effattn_lite.ops.deltanet import deltanet as deltanet_op
from effattn_lite.ops.gated_deltanet import gated_deltanet
from effattn_lite.reference import deltanet, lightning_attention
from effattn_lite.reference import gated_deltanet as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

FORMS = (reference.recurrent, reference.parallel, reference.chunkwise)


def draw(*, beta=None, **sizes):
    x = make_inputs("gated_deltanet", state=True, **sizes)
    if beta is not None:
        x["beta"][:] = beta
    return x


@pytest.mark.parametrize("form", FORMS)
def test_reduces_to_deltanet(form):
    """g = 0 keeps everything."""
    x = draw(T=37)
    g = np.zeros_like(x.pop("g"))
    assert relative_error(form(**x, g=g), deltanet.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_a_key_reads_the_value_it_has_just_written(form):
    """beta = 1 and keys of length 1: S_t^T k_t = v_t at every token, whatever the gate."""
    x = draw(T=37, beta=1)
    o, _ = form(**x | {"q": x["k"]}, scale=1.0)
    assert max_error(o, x["v"]) < 1e-12


def survey_step(x):
    """alpha S + beta (v - S k) k^T as arXiv:2507.19595 prints it, in the layout [K, V]."""
    k, S, beta = x["k"][:, 0], x["initial_state"], x["beta"][:, 0, :, None]
    write = beta * (x["v"][:, 0] - np.einsum("bhk,bhkv->bhv", k, S))
    return np.exp(x["g"][:, 0, :, None, None]) * S + np.einsum("bhk,bhv->bhkv", k, write)


def test_the_survey_order_is_another_recurrence():
    """It reads the state before the decay: one step differs by beta (1 - alpha) k k^T S."""
    x = draw(T=1)
    k, S, alpha = x["k"][:, 0], x["initial_state"], np.exp(x["g"][:, 0, :, None, None])
    between = x["beta"][:, 0, :, None, None] * (1 - alpha) * np.einsum("bhk,bhj,bhjv->bhkv", k, k, S)
    ours = reference.recurrent(**x)[1]
    assert relative_error(ours - survey_step(x), between) < 1e-12
    assert np.abs(between).max() > 0.01


def test_the_survey_order_does_not_overwrite():
    """beta = 1: it reads back v - (1 - alpha) times the old value, which is written with the wrong sign."""
    x = draw(T=1, beta=1)
    k, alpha = x["k"][:, 0], np.exp(x["g"][:, 0, :, None])
    old = np.einsum("bhk,bhkv->bhv", k, x["initial_state"])
    read = np.einsum("bhk,bhkv->bhv", k, survey_step(x))
    assert max_error(read, x["v"][:, 0] - (1 - alpha) * old) < 1e-12


def test_decay_after_the_write_fades_the_new_value():
    """alpha (S + beta k (v - S^T k)^T) differs from ours by (1 - alpha) beta k v^T."""
    x = draw(T=1)
    alpha = np.exp(x["g"][:, 0, :, None, None])
    late = alpha * reference.recurrent(**x | {"g": np.zeros_like(x["g"])})[1]
    write = np.einsum("bhk,bhv->bhkv", x["k"][:, 0], x["beta"][:, 0, :, None] * x["v"][:, 0])
    assert relative_error(reference.recurrent(**x)[1] - late, (1 - alpha) * write) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_beta_two_reflects_and_fades(form):
    """v = 0, S_0 = I: S S^T = e^(2 G) I with G the sum of the gates."""
    x = draw(T=37, K=16, V=16, beta=2)
    x["v"][:] = 0
    x["initial_state"][:] = np.eye(16)
    _, S = form(**x)
    want = np.exp(2 * x["g"].sum(1))[..., None, None] * np.eye(16)
    assert relative_error(S @ S.swapaxes(2, 3), want) < 1e-12


@pytest.mark.parametrize("form", (reference.recurrent, reference.chunkwise))
@pytest.mark.parametrize("hard", (None, "weak"))
@pytest.mark.parametrize("beta", (1, 2))
def test_repeated_keys_stay_finite(form, hard, beta):
    """One key 4096 times: beta = 1 reads v_t, beta = 2 reads 2 v_t - alpha_t r_{t-1}."""
    x = draw(B=1, T=4096, H=1, K=8, V=8, hard=hard, beta=beta)
    x["k"][:] = x["k"][:, :1]
    o, _ = form(**x | {"q": x["k"]}, scale=1.0)
    want, r = [], np.einsum("bhk,bhkv->bhv", x["k"][:, 0], x["initial_state"])
    for t in range(4096):
        r = beta * x["v"][:, t] + (1 - beta) * np.exp(x["g"][:, t, :, None]) * r
        want.append(r)
    assert relative_error(o, np.stack(want, axis=1)) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_orthogonal_keys_make_it_a_decayed_sum(form):
    """No key reads what another wrote: linear attention with the head's decay, of the values times beta."""
    x = draw(T=16, K=16)
    x["k"] = np.linalg.qr(x["k"].swapaxes(1, 2))[0].swapaxes(1, 2)
    x["g"][:] = rates = np.array([-0.5, -0.01])
    del x["initial_state"]
    want = lightning_attention.recurrent(
        x["q"], x["k"], x["beta"][..., None] * x["v"], g=rates, scale=16**-0.5
    )
    assert relative_error(form(**x), want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_gates_of_very_different_strength(form):
    """0, -1e-6, -1, -20 and -800 nats in turn, the last beyond float64: e^-800 is 0, e^800 overflows."""
    x = draw(T=50)
    x["g"][:] = np.resize([0.0, -1e-6, -1.0, -20.0, -800.0], 50)[:, None]
    with np.errstate(over="raise", invalid="raise"):
        assert relative_error(form(**x), reference.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_value_heads_share_keys(form):
    """Value head h reads key head h // (HV / H): the same as keys that are repeated by hand."""
    x = draw(T=20, H=2, HV=6)
    alone = x | {name: np.repeat(x[name], 3, axis=2) for name in "qk"}
    assert relative_error(form(**x), form(**alone)) < 1e-12
    # a query head reaches its own three value heads, and no other
    other = x | {"q": np.concatenate((x["q"][:, :, :1], x["q"][:, :, 1:] + 1), axis=2)}
    moved = np.abs(form(**other)[0] - form(**x)[0]).max(axis=(0, 1, 3)) > 0
    assert moved.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("chunk_size", (1, 2, 7, 64))
def test_any_chunk_size_gives_the_same(chunk_size):
    x = draw(T=37)
    assert relative_error(reference.chunkwise(**x, chunk_size=chunk_size), reference.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_reduces_to_deltanet(impl, device):
    x = to_torch(draw(B=1, T=70, H=2, K=16, V=16), dtype="float32", device=device)
    g = torch.zeros_like(x.pop("g"))
    want = deltanet_op(**x, output_final_state=True, impl=impl)
    assert relative_error(gated_deltanet(**x, g=g, output_final_state=True, impl=impl), want) < 1e-6


def test_layer_begins_with_decays_of_mamba2():
    """Where the projection is 0, g = -e^A softplus(c): e^A below 16, the step within (0.001, 0.1)."""
    torch.manual_seed(0)
    layer = GatedDeltaNet(64, 4, value_heads=64)
    g = layer.gates(torch.zeros(1, 1, 64))["g"][0, 0]
    step = -g / layer.A_log.exp()
    assert step.min() > 0.99e-3 and step.max() < 0.101 and g.min() > -1.6 and g.max() < 0


def test_layer_with_shared_heads_decodes():
    layer, x = GatedDeltaNet(32, 2, value_heads=6).double(), torch.randn(2, 9, 32, dtype=torch.float64)
    assert layer.proj["k"].out_features * 3 == layer.proj["v"].out_features // 2
    cache, outputs = None, []
    for t in range(9):
        y, cache = layer.step(x[:, t], cache)
        outputs.append(y)
    assert relative_error(torch.stack(outputs, dim=1), layer(x)) < 1e-10


def test_layer_refuses_heads_that_do_not_share():
    with pytest.raises(ValueError, match=r"value_heads is 6, expected a multiple of heads = 4"):
        GatedDeltaNet(32, 4, value_heads=6)
