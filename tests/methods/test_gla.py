"""What is special to gated linear attention: a decay a channel and token, whatever its strength."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.gla import GLA
from effattn_lite.ops.gla import gla
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("gla").forms)
GATES = {"open": [0.0], "shut": [-20.0], "mixed": [0.0, -1e-6, -1.0, -20.0]}


def draw(**sizes):
    return make_inputs("gla", state=True, **sizes)


def with_gates(x, gates):
    """Gates that differ from channel to channel, and every nine tokens."""
    b, t, *rest = np.indices(x["g"].shape)
    return x | {"g": np.take(gates, (b + t // 9 + sum(rest)) % len(gates))}


def sum_over_past(q, k, v, *, g, initial_state):
    """o_t = K^(-1/2) sum_{j <= t} (q_t * prod_{r = j+1..t} e^{g_r}) . k_j v_j, and S_0 before all."""
    o = np.zeros_like(v)
    for t in range(q.shape[1]):
        faded = q[:, t]
        for j in range(t, -1, -1):
            o[:, t] += (faded * k[:, j]).sum(-1, keepdims=True) * v[:, j]
            faded = faded * np.exp(g[:, j])
        o[:, t] += np.einsum("bhk,bhkv->bhv", faded, initial_state)
    return q.shape[-1] ** -0.5 * o


@FORMS
def test_reduces_to_retnet(form):
    """g = log(1 - 2^(-5-h)) in every channel, at every token."""
    x = draw(T=37, H=3)
    x["g"] = np.broadcast_to(np.log1p(-(2.0 ** (-5 - np.arange(3))))[:, None], x["g"].shape)
    got = run_reference("gla", x, form=form)
    del x["g"]
    assert relative_error(got, run_reference("retnet", x)) < 1e-10


@FORMS
def test_reduces_to_mamba2(form):
    """g equal in the channels of a head, scale 1, a value head for every query head."""
    x = draw(T=37)
    got = run_reference("gla", x | {"g": np.repeat(x["g"][..., :1], 16, axis=-1)}, form=form, scale=1.0)
    assert relative_error(got, run_reference("mamba2", x | {"g": x["g"][..., 0]})) < 1e-10


@FORMS
def test_reduces_to_hgrn2(form):
    """k = 1 - e^g, scale 1: the gate that keeps is the gate that does not write."""
    x = draw(T=37)
    got = run_reference("gla", x | {"k": 1 - np.exp(x["g"])}, form=form, scale=1.0)
    tied = {name: x[name] for name in ("q", "v", "g", "initial_state")}
    assert relative_error(got, run_reference("hgrn2", tied)) < 1e-10


@FORMS
@pytest.mark.parametrize("gates", GATES)
def test_sum_over_the_past(form, gates):
    """Gates of 0 and -20 nats side by side, to the last digits, and nothing overflows on the way."""
    x = with_gates(draw(T=70), GATES[gates])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        o, S = run_reference("gla", x, form=form)
    assert np.isfinite(S).all()
    assert relative_error(o, sum_over_past(**x)) < 1e-10


@FORMS
def test_open_gates_are_linear_attention(form):
    """g = 0 keeps everything: the causal sum of outer products, no decay."""
    x = draw(T=37)
    scores = np.tril(np.einsum("bthk,bjhk->bhtj", x["q"], x["k"]))
    past = np.einsum("bthk,bhkv->bthv", x["q"], x["initial_state"])
    want = (np.einsum("bhtj,bjhv->bthv", scores, x["v"]) + past) / 4  # K = 16
    assert relative_error(run_reference("gla", with_gates(x, [0.0]), form=form)[0], want) < 1e-10


def test_the_factored_scores_are_the_same_until_they_overflow():
    """(q e^G) . (k e^-G), one product, is the paper's parallel form; 40 tokens of -20 nats are too many."""
    x = make_inputs("gla", T=40)

    def factored(x):
        G = np.cumsum(x["g"], axis=1)
        scores = np.einsum("bthk,bjhk->bhtj", x["q"] * np.exp(G), x["k"] * np.exp(-G))
        return np.einsum("bhtj,bjhv->bthv", np.tril(scores), x["v"]) / 4  # K = 16

    assert relative_error(run_reference("gla", x, form="parallel")[0], factored(x)) < 1e-10
    strong = with_gates(x, [-20.0])
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(factored(strong)).all()
    assert np.isfinite(run_reference("gla", strong, form="parallel")[0]).all()


@FORMS
def test_a_channel_fades_alone(form):
    """One channel shut at the last token: its row of the state holds that token alone."""
    x = draw(T=20)
    x["g"] = np.zeros_like(x["g"])
    base = run_reference("gla", x, form=form)[1]
    x["g"][:, -1, :, 5] = -800.0
    got = run_reference("gla", x, form=form)[1]
    others = np.arange(16) != 5
    assert relative_error(got[:, :, others], base[:, :, others]) < 1e-10
    assert relative_error(got[:, :, 5], x["k"][:, -1, :, 5, None] * x["v"][:, -1]) < 1e-10


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_with_gates_side_by_side(impl, device):
    """The op in float32 against the sum over the past: no reference point overflows, no sum cancels."""
    x = with_gates(
        make_inputs("gla", state=True, B=1, T=70, H=1, K=16, V=16, dtype="float32"), GATES["mixed"]
    )
    want = sum_over_past(**{name: t.astype(float) for name, t in x.items()})
    o, _ = gla(**to_torch(x, dtype="float32", device=device), impl=impl)
    assert relative_error(o, want) < 1e-5


def test_layer_forgets_slowly_at_first():
    """A logit of 0 keeps 2^(-1/16) = 0.958 of a channel a token, where sigma alone would keep a half."""
    layer = GLA(32, 4).double()
    torch.nn.init.zeros_(layer.decay_proj[1].bias)
    g = layer._project(torch.zeros(1, 1, 32, dtype=torch.float64))[3]
    assert relative_error(g.exp(), torch.full_like(g, 2 ** (-1 / 16))) < 1e-12


def test_layer_keys_are_half_as_wide_as_values():
    cache = GLA(64, 4).prefill(torch.randn(3, 5, 64))[1]
    assert cache["state"].shape == (3, 4, 8, 16)
