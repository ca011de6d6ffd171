"""What is special to RWKV-4: an average, a bonus, a running maximum that nobody sees, the token shift."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.rwkv4 import RWKV4
from effattn_lite.ops.rwkv4 import rwkv4
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, on_parts, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("rwkv4").forms)


@FORMS
def test_published_sum(form):
    """wkv_t of the paper, term by term and without a maximum: decays count from the token before."""
    x = make_inputs("rwkv4", T=20)
    o = np.zeros_like(x["v"])
    for t in range(20):
        weights = [np.exp((t - 1 - i) * x["g"] + x["k"][:, i]) for i in range(t)]
        weights.append(np.exp(x["u"] + x["k"][:, t]))
        o[:, t] = sum(w * x["v"][:, i] for i, w in enumerate(weights)) / sum(weights)
    assert relative_error(run_reference("rwkv4", x, form=form)[0], o) < 1e-10


@FORMS
def test_by_hand(form):
    """Weights 1 and e^u = 3: (1 + 3 * 5) / 4 = 4."""
    x = {"k": np.zeros((1, 2, 1)), "v": np.array([[[1.0], [5.0]]]), "g": np.array([-0.7])}
    o, (a, b, m) = run_reference("rwkv4", x | {"u": np.log([3.0])}, form=form)
    assert max_error(o[0, :, 0], np.array([1.0, 4.0])) < 1e-12
    # the first token has faded once when the second has been written
    assert max_error((a, b, m), (np.exp([[-0.7]]) + 5, np.exp([[-0.7]]) + 1, np.zeros((1, 1)))) < 1e-12


@FORMS
def test_reduces_to_aft(form):
    """g = 0, u = 0, times sigmoid(q): a past that does not fade, and a token without a bonus."""
    x = make_inputs("aft", T=37, state=True)
    q, zero = x.pop("q"), np.zeros(20)
    o, state = run_reference("rwkv4", x | {"g": zero, "u": zero}, form=form)
    want = run_reference("aft", {"q": q, **x})
    assert relative_error((o / (1 + np.exp(-q)), *state), (want[0], *want[1])) < 1e-10


@FORMS
def test_outputs_stay_among_the_values(form):
    """An average lies between the smallest and the largest value seen."""
    x = make_inputs("rwkv4", T=50)
    o, _ = run_reference("rwkv4", x, form=form)
    low, high = np.minimum.accumulate(x["v"], axis=1), np.maximum.accumulate(x["v"], axis=1)
    assert (o >= low - 1e-12).all() and (o <= high + 1e-12).all()


@FORMS
def test_maximum_is_a_unit_of_account(form):
    """The same memory in other units, (a, b, m) and (a / 2, b / 2, m + log 2): the same outputs."""
    x = make_inputs("rwkv4", T=30, state=True)
    a, b, m = x.pop("initial_state")
    one, other = (
        run_reference("rwkv4", x | {"initial_state": state}, form=form)[0]
        for state in ((a, b, m), (a / 2, b / 2, m + np.log(2)))
    )
    assert relative_error(one, other) < 1e-10


@FORMS
def test_keys_of_any_size(form):
    """A constant on all keys changes nothing, though e^1000 leaves float64."""
    x = make_inputs("rwkv4", T=30)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        loud = run_reference("rwkv4", x | {"k": x["k"] + 1000}, form=form)[0]
    assert relative_error(loud, run_reference("rwkv4", x, form=form)[0]) < 1e-10


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_gradient_through_a_carried_state(impl, device):
    """Backpropagation through two calls, linked by (a, b, m), is that through one call."""
    inputs = make_inputs("rwkv4", B=1, T=50, D=8, state=True, dtype="float32")

    def gradients(cut):
        x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
        state, total = x["initial_state"], 0
        for i, j in zip((0, *cut), (*cut, 50), strict=True):
            o, state = rwkv4(
                x["k"][:, i:j], x["v"][:, i:j], g=x["g"], u=x["u"], initial_state=state,
                output_final_state=True, impl=impl,
            )  # fmt: skip
            total = total + o.square().sum()
        # read the state as a reader would: its units must not matter
        total = total + (state[0] / state[1]).sum() + (state[2] + state[1].log()).sum()
        leaves = [x["k"], x["v"], x["g"], x["u"], *x["initial_state"]]
        return torch.autograd.grad(total, leaves)

    assert relative_error(gradients((19,)), gradients(())) < 1e-5


def test_state_is_not_an_alias():
    x = to_torch(make_inputs("rwkv4", T=1, state=True))
    before = on_parts(torch.clone, x["initial_state"])
    for part in rwkv4(**x, output_final_state=True)[1]:
        part.zero_()
    assert max_error(x["initial_state"], before) == 0


def test_layer_decay_is_a_decay():
    """e^g lies in (0, 1) whatever is learned, and begins between e^-e^3 and e^-e^-5."""
    w = (-RWKV4(64, 1, layer=1, layers=4).omega.detach().double().exp()).exp()
    assert w.min() == pytest.approx(np.exp(-np.exp(3)), rel=1e-4)
    assert w.max() == pytest.approx(np.exp(-np.exp(-5)), rel=1e-4)


def test_token_shift_stops_at_a_sequence():
    """Changing the last token of one packed sequence leaves the next sequence as it was."""
    layer, x = RWKV4(32, 1).double(), torch.randn(1, 20, 32, dtype=torch.float64)
    edges, other = torch.tensor([0, 9, 9, 20]), x.clone()
    other[:, 8] += 1
    assert torch.equal(layer(x, cu_seqlens=edges)[:, 9:], layer(other, cu_seqlens=edges)[:, 9:])


def test_packed_prefill_can_be_continued():
    layer, x = RWKV4(32, 1).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
