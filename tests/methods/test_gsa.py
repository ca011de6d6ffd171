"""What is special to gated slot attention: slots, a softmax over them, and what they are in the limits."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.gsa import GSA
from effattn_lite.ops.gsa import gsa, step
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("gsa").forms)


def draw(**sizes):
    return make_inputs("gsa", state=True, **sizes)


@FORMS
def test_reduces_to_abc(form):
    """s = w and g = log(1 - w), with w the token's share of the running sum of e^s."""
    x = make_inputs("abc", T=37, state=True)
    past = x["initial_state"][2][:, None]
    z = np.logaddexp(past, np.logaddexp.accumulate(x["s"], axis=1))
    gates = {"s": np.exp(x["s"] - z), "g": np.concatenate((past, z[:, :-1]), axis=1) - z}
    o, state = run_reference("gsa", x | gates | {"initial_state": x["initial_state"][:2]}, form=form)
    want, last = run_reference("abc", x)
    assert relative_error((o, *state), (want, *last[:2])) < 1e-10


@FORMS
def test_two_passes_are_two_gated_linear_attentions(form):
    """The first with queries and values exchanged: GLA's gradient of q; the second GLA itself, read by p."""
    x = draw(T=37)
    q, k, v, s, g = (torch.tensor(x[n]) for n in "qkvsg")
    keys, values = (torch.tensor(part) for part in x["initial_state"])
    o, _ = run_reference("gsa", x, form=form)

    def attend(reader, writer, value, state):
        S, out = state, []
        for t in range(reader.shape[1]):
            S = g[:, t].exp()[..., None] * S + torch.einsum("bhm,bhv->bhmv", writer[:, t], value[:, t])
            out.append(torch.einsum("bhm,bhmv->bhv", reader[:, t], S))
        return torch.stack(out, dim=1)

    reader = torch.zeros_like(s).requires_grad_()
    x1 = torch.autograd.grad(attend(reader, s, k, keys.mT), reader, q)[0]
    p = (x1 / 4).softmax(-1)  # K = 16
    assert relative_error(o, attend(p, s, v, values)) < 1e-10


@FORMS
def test_a_slot_a_token_is_softmax_attention(form):
    """g = 0, and token j writes slot j alone: the last token has softmax attention, M = T."""
    x = make_inputs("gsa", T=12)
    x |= {"g": np.zeros_like(x["g"]), "s": np.broadcast_to(np.eye(12)[:, None], x["s"].shape)}
    o = run_reference("gsa", x, form=form)[0]
    want = run_reference("softmax_attention", {n: x[n] for n in "qkv"})[0]
    assert relative_error(o[:, -1], want[:, -1]) < 1e-10


@FORMS
def test_by_hand(form):
    """Two slots, K = V = 1: the first keeps the first token, the second is overwritten."""
    ln2, column = np.log(2.0), lambda *x: np.array(x)[None, :, None, None]
    s = np.array([[1.0, 1.0], [0.0, 1.0]])[None, :, None]
    g = np.array([[0.0, 0.0], [0.0, -800.0]])[None, :, None]
    o, (keys, values) = run_reference(
        "gsa", dict(q=column(1.0, 1.0), k=column(0.0, ln2), v=column(3.0, 9.0), s=s, g=g), form=form
    )
    # t = 1: both slots hold (0, 3); t = 2: scores 0 and ln 2, weights 1/3 and 2/3, 1/3 * 3 + 2/3 * 9
    assert np.allclose(o.ravel(), [3.0, 7.0], atol=1e-12)
    assert np.allclose(keys.ravel(), [0.0, ln2]) and np.allclose(values.ravel(), [3.0, 9.0])


@FORMS
def test_slots_may_be_renumbered(form):
    x = draw(T=20)
    order = np.random.default_rng(1).permutation(12)
    keys, values = x["initial_state"]
    moved = {n: x[n][..., order] for n in "sg"} | {"initial_state": (keys[..., order], values[:, :, order])}
    o, state = run_reference("gsa", x, form=form)
    got, (keys, values) = run_reference("gsa", x | moved, form=form)
    assert relative_error((got, keys, values), (o, state[0][..., order], state[1][:, :, order])) < 1e-10


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_with_gates_side_by_side(impl, device):
    """Gates of 0 and -20 nats in one chunk, and scores that reach 80: the op in float32."""
    x = make_inputs("gsa", B=1, T=70, H=1, K=16, V=16, M=8, dtype="float32")
    b, t, h, m = np.indices(x["g"].shape)
    x["g"] = np.take([0.0, -1e-6, -1.0, -20.0], (t // 9 + m) % 4).astype(np.float32)
    x["q"] = x["q"] * np.float32(4)
    want = run_reference("gsa", x)[0]
    o = gsa(**to_torch(x, dtype="float32", device=device), impl=impl)[0]
    # a softmax turns a score's absolute error into a relative one: 80 * 2^-24 a product, some 100 of them
    assert relative_error(o, want) < 1e-4


def test_a_gate_is_needed():
    x = to_torch(make_inputs("gsa", B=1, T=3, H=1)) | {"g": None}
    with pytest.raises(ValueError, match="g is None, expected a log decay"):
        gsa(**x)
    with pytest.raises(ValueError, match="g is None"):
        step(**{n: t[:, 0] if t is not None else t for n, t in x.items()}, state=None)


def test_a_state_has_two_parts():
    x = to_torch(make_inputs("gsa", B=1, T=3, H=1, state=True))
    with pytest.raises(ValueError, match="initial_state has shape .* expected a tuple"):
        gsa(**x | {"initial_state": x["initial_state"][0]})


def test_layer_writes_what_its_gate_leaves():
    """A logit of 0 keeps 2^(-1/8) = 0.917 of a slot a token, and writes the other 0.083."""
    layer = GSA(32, 4, slots=8).double()
    x = layer._project(torch.zeros(1, 1, 32, dtype=torch.float64))
    assert relative_error(x["g"].exp(), torch.full_like(x["g"], 2 ** (-1 / 8))) < 1e-12
    assert relative_error(x["s"], 1 - x["g"].exp()) < 1e-12


def test_layer_has_one_norm_over_all_heads():
    layer = GSA(32, 4, slots=8)
    assert layer.norm.weight.shape == (1, 32)
    cache = layer.prefill(torch.randn(3, 5, 32))[1]
    assert cache["keys"].shape == (3, 4, 8, 8) and cache["values"].shape == (3, 4, 8, 8)
