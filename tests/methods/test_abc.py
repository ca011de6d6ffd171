"""What is special to ABC: slots are averages of the text, whatever the size of their weights."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.abc import ABC
from effattn_lite.ops.abc import abc, step
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("abc").forms)


def draw(**sizes):
    return make_inputs("abc", **sizes)


@FORMS
def test_memories_are_weighted_averages(form):
    """After the text: K~ and V~ by a softmax over all its tokens, slot by slot."""
    x = draw(T=37)
    _, (keys, values, z, c) = run_reference("abc", x, form=form)
    w = np.exp(x["s"]) / np.exp(x["s"]).sum(1, keepdims=True)
    assert relative_error(keys, np.einsum("bthk,bthm->bhkm", x["k"], w)) < 1e-10
    assert relative_error(values, np.einsum("bthm,bthv->bhmv", w, x["v"])) < 1e-10
    assert relative_error(z, np.log(np.exp(x["s"]).sum(1))) < 1e-10
    assert (c == 37).all()


@FORMS
def test_one_slot_is_the_running_mean(form):
    """M = 1 and equal weights: no query is asked, o_t is the mean of the values up to t."""
    x = draw(T=20, M=1)
    o = run_reference("abc", x | {"s": np.full_like(x["s"], -3.0)}, form=form)[0]
    mean = np.cumsum(x["v"], axis=1) / np.arange(1, 21)[:, None, None]
    assert relative_error(o, mean) < 1e-10


@FORMS
def test_a_slot_a_token_is_softmax_attention(form):
    """Token j outweighs all others in slot j: the last token has softmax attention, M = T."""
    x = draw(T=12)
    x["s"] = np.broadcast_to(1000.0 * np.eye(12)[:, None], x["s"].shape)
    o = run_reference("abc", x, form=form)[0]
    want = run_reference("softmax_attention", {n: x[n] for n in "qkv"})[0]
    assert relative_error(o[:, -1], want[:, -1]) < 1e-10


@FORMS
def test_a_constant_in_the_control_changes_nothing(form):
    """Weights count relative to each other, even where e^s is no number: only z moves along."""
    x = draw(T=30)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        o, (keys, values, z, _) = run_reference("abc", x, form=form)
        far, (keys2, values2, z2, _) = run_reference("abc", x | {"s": x["s"] + 2000.0}, form=form)
    assert relative_error((far, keys2, values2), (o, keys, values)) < 1e-10
    assert relative_error(z2, z + 2000.0) < 1e-12


@FORMS
def test_by_hand(form):
    """One slot, K = V = 1: weights 1 and 3, the mean of 4 and 8 is 7."""
    one = np.ones((1, 2, 1, 1))
    v, s = (np.array(x)[None, :, None, None] for x in ([4.0, 8.0], [0.0, np.log(3.0)]))
    o, (keys, values, z, c) = run_reference("abc", dict(q=one, k=one, v=v, s=s), form=form)
    assert np.allclose(o.ravel(), [4.0, 7.0]) and np.allclose(values.ravel(), 7.0)
    assert np.allclose(z.ravel(), np.log(4.0)) and np.allclose(keys.ravel(), 1.0) and c.ravel() == 2


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_with_weights_of_all_sizes(impl, device):
    """Controls of -300 to 300 side by side, in float32, from a state of the same kind."""
    x = draw(B=1, T=70, H=1, K=16, V=16, M=8, dtype="float32", state=True)
    b, t, h, m = np.indices(x["s"].shape)
    x["s"] = np.take([0.0, -300.0, 2.0, 300.0, -2.0], (t // 9 + m) % 5).astype(np.float32)
    want = run_reference("abc", x)
    tensors = to_torch(x, dtype="float32", device=device)
    got = abc(**tensors, output_final_state=True, impl=impl)
    assert relative_error((got[0], *got[1]), (want[0], *want[1])) < 1e-5


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_from_zeros_in_place(impl, device):
    """A decoder may begin with one state of zeros: the first token finds it empty, the second does not."""
    x = draw(B=1, T=6, H=2, K=8, V=8, M=4)
    want, last = run_reference("abc", x)
    tensors = to_torch(x, dtype="float32", device=device)
    state = tuple(torch.zeros(1, 2, *n, device=device) for n in ((8, 4), (4, 8), (4,), ()))
    for t in range(6):
        o, state = step(**{n: y[:, t] for n, y in tensors.items()}, state=state, out_state=state, impl=impl)
        assert relative_error(o, want[:, t]) < 1e-5
    assert relative_error(state, last) < 1e-5


def test_a_state_has_four_parts():
    x = to_torch(draw(B=1, T=3, H=1, state=True))
    with pytest.raises(ValueError, match=r"initial_state has shape 2, expected a tuple \(K~, V~, z, c\)"):
        abc(**x | {"initial_state": x["initial_state"][:2]})


def test_layer_controls_every_head_alone():
    layer = ABC(32, 4, slots=6)
    cache = layer.prefill(torch.randn(3, 5, 32))[1]
    assert cache["keys"].shape == (3, 4, 8, 6) and cache["values"].shape == (3, 4, 6, 8)
    assert cache["z"].shape == (3, 4, 6) and (cache["count"] == 5).all()
