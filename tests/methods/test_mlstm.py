"""What is special to mLSTM: a stabiliser that changes nothing, a normaliser, gates of any size."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.mlstm import MLSTM
from effattn_lite.ops.mlstm import mlstm, step
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("mlstm").forms)
IMPLS = pytest.mark.parametrize("impl", ("torch", "triton"))


def draw(**sizes):
    return make_inputs("mlstm", state=True, **sizes)


def plain(q, k, v, *, i, f, initial_state):
    """The same memory without a stabiliser: sums of e^i, and a bound of 1."""
    C, n, m = initial_state
    C, n = np.exp(m)[..., None, None] * C, np.exp(m)[..., None] * n
    o, share = np.zeros_like(v), 1 / (1 + np.exp(-f))
    for t in range(q.shape[1]):
        bk = np.exp(i[:, t])[..., None] * k[:, t]
        C = share[:, t, :, None, None] * C + bk[..., None] * v[:, t, :, None]
        n = share[:, t, :, None] * n + bk
        num, den = (
            np.einsum("bhk,bhkv->bhv", q[:, t], C) / 4,
            np.einsum("bhk,bhk->bh", q[:, t], n) / 4,
        )  # K = 16
        o[:, t] = num / np.maximum(np.abs(den), 1)[..., None]
    return o, C, n


@FORMS
def test_the_stabiliser_changes_nothing(form):
    x = draw(T=37)
    o, (C, n, m) = run_reference("mlstm", x, form=form)
    want = plain(**x)
    got = o, np.exp(m)[..., None, None] * C, np.exp(m)[..., None] * n
    assert relative_error(got, want) < 1e-10


@FORMS
def test_one_token_by_hand(form):
    """s q k e^i = 2 * 3 * 2 = 12 is counted, so o = v; with e^i = 1/100 it is 0.06, so o = 0.06 v."""
    one = np.ones((1, 1, 1, 1))
    x = dict(q=2 * one, k=3 * one, v=5 * one, f=0 * one[..., 0])
    for gate, want in ((np.log(2), 5.0), (-np.log(100), 0.3)):
        o, (C, n, m) = run_reference("mlstm", x | {"i": one[..., 0] * gate}, form=form)
        assert o.item() == pytest.approx(want)
        # m_1 = max(log(1/2) + 0, i)
        assert m.item() == pytest.approx(max(np.log(0.5), gate))
        assert C.item() * np.exp(m.item()) == pytest.approx(15 * np.exp(gate))
        assert n.item() * np.exp(m.item()) == pytest.approx(3 * np.exp(gate))


@FORMS
def test_a_state_may_be_kept_at_any_stabiliser(form):
    """(e^c C, e^c n, m - c) is the same memory: same outputs, and the same memory at the end."""
    x = draw(T=20)
    C, n, m = x["initial_state"]
    o, (C1, n1, m1) = run_reference("mlstm", x, form=form)
    x["initial_state"] = 9 * C, 9 * n, m - np.log(9)
    other, (C2, n2, m2) = run_reference("mlstm", x, form=form)
    assert relative_error(other, o) < 1e-10
    shift = np.exp(m2 - m1)
    assert relative_error((shift[..., None, None] * C2, shift[..., None] * n2), (C1, n1)) < 1e-10


@FORMS
def test_equal_values_are_read_as_they_are(form):
    """Where the denominator is counted the read-out averages: equal values give the value, up to a sign."""
    x = make_inputs("mlstm", T=37)
    x["v"][:], x["i"] = x["v"][:1, :1, :1], x["i"] + 6
    o = run_reference("mlstm", x, form=form)[0]
    assert relative_error(np.abs(o), np.broadcast_to(np.abs(x["v"]), o.shape)) < 1e-10


@IMPLS
@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_one_token_can_shout(impl, dtype, device):
    """Whispers, a gate of e^100, more whispers: the shouted value is what every later query reads."""
    x = make_inputs("mlstm", B=1, T=120, H=1, K=16, V=16, dtype="float32")
    x["f"][:], x["i"][:, 70] = 40.0, 100.0
    t = to_torch(x, dtype=dtype, device=device, requires_grad=True)
    o, state = mlstm(**t, output_final_state=True, impl=impl)
    assert relative_error(o[:, 70:].abs(), t["v"][:, 70:71].abs().expand_as(o[:, 70:])) < 1e-3
    assert all(part.isfinite().all() for part in state) and state[2].item() == pytest.approx(100.0)
    (o.sum() + sum(part.sum() for part in state)).backward()
    assert all(part.grad.isfinite().all() for part in t.values())


@IMPLS
def test_a_shut_forget_gate_wipes(impl, device):
    """f = -200: the token after it is alone, and the first of a text."""
    x = make_inputs("mlstm", B=1, T=40, H=2, K=16, V=16, dtype="float32")
    x["f"][:, 25] = -200.0
    t = to_torch(x, dtype="float32", device=device)
    o = mlstm(**t, impl=impl)[0]
    tail = mlstm(**{name: part[:, 25:] for name, part in t.items()}, impl=impl)[0]
    assert relative_error(o[:, 25:], tail) < 1e-5


@IMPLS
def test_a_token_that_is_not_written(impl, device):
    """i = -inf masks a token, the first one too, without a NaN in any gradient."""
    x = make_inputs("mlstm", B=1, T=40, H=2, K=16, V=16, dtype="float32")
    x["i"][:, [0, 1, 30]] = -np.inf
    t = to_torch(x, dtype="float32", device=device, requires_grad=True)
    o = mlstm(**t, impl=impl)[0]
    o.sum().backward()
    assert all(part.grad.isfinite().all() for part in t.values()) and o[:, :2].abs().max() == 0
    assert all(t[name].grad[:, 30].abs().max() == 0 for name in "kvi")


def test_gradient_of_the_stabiliser():
    """o sees e^m C and e^m n only, so its gradient by m is that by (C, n) along (C, n)."""
    x = to_torch(draw(T=20), requires_grad=True)
    C, n, m = x["initial_state"]
    dC, dn, dm = torch.autograd.grad(mlstm(**x)[0].square().sum(), (C, n, m))
    assert relative_error((C * dC).sum((-2, -1)) + (n * dn).sum(-1), dm) < 1e-10


def test_far_below_the_bound_nothing_overflows():
    """m = -300: e^-m is no float32, and the answer, e^-300 of a value, is 0."""
    x = make_inputs("mlstm", B=1, T=5, H=1)
    x["i"][:], x["f"][:] = -300.0, -300.0
    t = to_torch(x, dtype="float32", requires_grad=True)
    o = mlstm(**t)[0]
    o.sum().backward()
    assert o.abs().max() < 1e-30 and all(part.grad.isfinite().all() for part in t.values())


@IMPLS
def test_nothing_read_is_not_a_number(impl, device):
    """A query of 0 under m = 200: 0 over a bound that float32 has not, which is 0."""
    x = make_inputs("mlstm", B=1, T=20, H=1, K=16, V=16, dtype="float32")
    x["q"][:, 5], x["i"][:, 0], x["f"][:] = 0, 200.0, 40.0
    t = to_torch(x, dtype="float32", device=device, requires_grad=True)
    o = mlstm(**t, impl=impl)[0]
    o.sum().backward()
    assert o[:, 5].abs().max() == 0 and all(t[name].grad.isfinite().all() for name in "kvif")


def test_errors_name_the_state():
    x = to_torch(draw(T=5))
    C, n, m = x["initial_state"]
    with pytest.raises(ValueError, match=r"initial_state has shape .* expected a tuple \(C, n, m\)"):
        mlstm(**x | {"initial_state": C})
    with pytest.raises(ValueError, match=r"n of initial_state has shape \(2, 2, 8\)"):
        mlstm(**x | {"initial_state": (C, n[..., :8], m)})
    with pytest.raises(TypeError, match=r"m of state is torch.float32, expected torch.float64"):
        token = {name: part[:, 0] for name, part in x.items() if name != "initial_state"}
        step(**token, state=(C, n, m.float()))


def test_layer_begins_with_long_memories():
    """The gates see nothing at first: sigmoid(f) from 0.95 to 0.998, e^i around 1."""
    layer = MLSTM(64, 4)
    i, f = layer.gates(torch.randn(100, 3 * 128)).chunk(2, dim=-1)
    keep = f.sigmoid()
    assert 0.95 < keep.min() and keep.max() < 0.998 and i.abs().max() < 1


def test_packed_prefill_can_be_continued():
    layer, x = MLSTM(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert max_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
