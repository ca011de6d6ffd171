"""What is special to RWKV-7: three vectors where the delta rule has one key, and a read before the decay."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from effattn_lite.layers.rwkv7 import RWKV7
from effattn_lite.ops.kda import kda as kda_op
from effattn_lite.ops.rwkv7 import rwkv7
from effattn_lite.reference import gla, kda
from effattn_lite.reference import rwkv7 as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

FORMS = pytest.mark.parametrize("form", (reference.recurrent, reference.parallel, reference.chunkwise))


def draw(**sizes):
    return make_inputs("rwkv7", state=True, **sizes)


def as_kda(x, beta):
    """KDA's tensors: its key, faded, reads the state of before; times beta it erases and writes."""
    return x | {"a": -np.exp(x["g"]) * x["k"], "b": beta * x["k"], "k": beta * x["k"]}


@FORMS
def test_reduces_to_kda(form):
    """a = -e^g k, b = k = beta k."""
    x = make_inputs("kda", state=True, T=37)
    want = kda.recurrent(**x)
    beta = x.pop("beta")[..., None]
    assert relative_error(form(**as_kda(x, beta), scale=16**-0.5), want) < 1e-12


@FORMS
def test_reduces_to_gla(form):
    """a = 0: nothing is read, so nothing is erased, whatever b."""
    x = draw(T=37)
    x["a"][:] = 0
    want = gla.recurrent(**{n: t for n, t in x.items() if n not in "ab"}, scale=16**-0.5)
    assert relative_error(form(**x, scale=16**-0.5), want) < 1e-12


@FORMS
def test_by_hand(form):
    """Two channels, two tokens: half of what the first holds moves to the second, a quarter is erased."""
    x = {
        "q": [[1, 0], [1, 1]],
        "k": [[1, 0], [0, 1]],
        "g": [[0, 0], [np.log(0.5), 0]],
        "a": [[0, 0], [-1, 0]],
        "b": [[0, 0], [0.25, -0.5]],
        "v": [[8], [3]],
    }
    o, S = form(**{name: np.array(t, float)[None, :, None] for name, t in x.items()})
    # S_1 = (8, 0); y_2 = -8; S_2 = (0.5 * 8 - 0.25 * 8, 0.5 * 8 + 3) = (2, 7)
    assert max_error(o[0, :, 0, 0], np.array([8.0, 9.0])) < 1e-12
    assert max_error(S[0, 0, :, 0], np.array([2.0, 7.0])) < 1e-12


def test_a_reads_before_the_decay():
    """With KDA's vectors but an unfaded a, one token differs by beta k ((1 - alpha) k)^T S."""
    x = make_inputs("kda", state=True, T=1)
    want = kda.recurrent(**x)[1]
    beta = x.pop("beta")[..., None]
    got = reference.recurrent(**as_kda(x, beta) | {"a": -x["k"]})[1]
    k, S = x["k"][:, 0], x["initial_state"]
    between = np.einsum("bhk,bhj,bhjv->bhkv", beta[:, 0] * k, (1 - np.exp(x["g"][:, 0])) * k, S)
    assert relative_error(want - got, between) < 1e-10
    assert np.abs(between).max() > 0.01


@FORMS
def test_rates_choose_the_channels_that_are_erased(form):
    """g = 0, v = 0, a along two channels, and a rate of 0 in one of them: only the other changes."""
    x = draw(T=1, K=4)
    for name in "gva":
        x[name][:] = 0
    x["a"][..., :2] = -(0.5**0.5)
    x["b"] = -x["a"] * np.array([1.0, 0.0, 1.0, 1.0])
    _, S = form(**x)
    S0 = x["initial_state"]
    assert max_error(S[:, :, 1:], S0[:, :, 1:]) == 0
    assert max_error(S[:, :, 0], S0[:, :, 0] - (S0[:, :, 0] + S0[:, :, 1]) / 2) < 1e-12


@FORMS
def test_a_reflection_swaps_two_channels(form):
    """g = 0, b = -2 a along e_i - e_j: what no decay can do, a permutation of the state's channels."""
    x, rng = draw(T=37, K=5), np.random.default_rng(0)
    x["g"][:], x["v"][:], x["a"][:] = 0, 0, 0
    S = x["initial_state"].copy()
    for t in range(37):
        i, j = rng.choice(5, size=2, replace=False)
        x["a"][:, t, :, i], x["a"][:, t, :, j] = 0.5**0.5, -(0.5**0.5)
        S[:, :, [i, j]] = S[:, :, [j, i]]
    assert relative_error(form(**x | {"b": -2 * x["a"]})[1], S) < 1e-12


def test_transitions_do_not_grow():
    """b = -eta a for a of length 1: real eigenvalues, none above 1 and none below -1."""
    x = make_inputs("rwkv7", T=50, K=8)
    transitions = np.exp(x["g"])[..., None] * np.eye(8) + x["b"][..., :, None] * x["a"][..., None, :]
    values = np.linalg.eigvals(transitions)
    assert max_error(values.imag, 0 * values.imag) < 1e-10
    assert np.abs(values.real).max() <= 1
    assert max_error((x["a"] ** 2).sum(-1), np.ones(x["a"].shape[:3])) < 1e-12
    rates = -x["b"] / x["a"]
    assert rates.min() > 0 and rates.max() < 1


@FORMS
def test_channels_of_very_different_decay(form):
    """0, -1e-6, -1, -20 and -800 nats side by side: vectors divided by their decays would overflow."""
    x = draw(T=50, K=10)
    x["g"][:] = [0.0, -1e-6, -1.0, -20.0, -800.0] * 2
    with np.errstate(over="raise", invalid="raise"):
        assert relative_error(form(**x), reference.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("form", (reference.recurrent, reference.chunkwise))
def test_repeated_keys_stay_finite(form):
    """One key and one a 4096 times, weak gates: what a finds is halved or so every time."""
    x = draw(B=1, T=4096, H=1, K=8, V=8, hard="weak")
    x["k"] = x["a"] = np.repeat(x["a"][:, :1], 4096, axis=1)
    x["b"] = -x["a"] / 2
    o, S = form(**x | {"q": x["k"]})
    assert np.isfinite(S).all()
    # r_t = r_{t-1} / 2 + v_t, from r_0
    assert np.abs(o).max() < 2 * np.abs(x["v"]).max() + np.abs(x["initial_state"]).sum()


@pytest.mark.parametrize("chunk_size", (1, 2, 7, 64))
def test_any_chunk_size_gives_the_same(chunk_size):
    x = draw(T=37)
    assert relative_error(reference.chunkwise(**x, chunk_size=chunk_size), reference.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_reduces_to_kda(impl, device):
    """The general engine on KDA's transitions against KDA's own, weak and strong gates."""
    x = make_inputs("kda", B=1, T=70, H=2, K=16, V=16, state=True)
    x["g"][..., ::2] *= 30
    want = kda_op(**to_torch(x), output_final_state=True, impl="torch")
    beta = x.pop("beta")[..., None]
    tensors = to_torch(as_kda(x, beta), dtype="float32", device=device)
    got = rwkv7(**tensors, scale=0.25, output_final_state=True, impl=impl)
    assert relative_error(got, want) < 1e-5


def test_gradient_of_v_is_the_op_from_the_right():
    """dv is the same recurrence on the reversed text: q and k change places, and the next a and b."""
    x = to_torch(make_inputs("rwkv7", T=37))
    x["v"].requires_grad_()
    o, _ = rwkv7(**x)
    do = torch.randn_like(o)
    (dv,) = torch.autograd.grad(o, x["v"], do)
    later = {name: F.pad(x[name][:, 1:], (0, 0, 0, 0, 0, 1)).flip(1) for name in "gab"}
    q, k = x["q"].flip(1), x["k"].flip(1)
    turned = rwkv7(k, q, do.flip(1), g=later["g"], a=later["b"], b=later["a"])[0]
    assert relative_error(turned.flip(1), dv) < 1e-12


def test_errors_name_both_sides():
    x = to_torch(make_inputs("rwkv7", T=5, H=2, K=8))
    with pytest.raises(ValueError, match=r"b has shape \(2, 5, 1, 8\), expected .* = \(2, 5, 2, 8\)"):
        rwkv7(**x | {"b": x["b"][:, :, :1]})
    with pytest.raises(TypeError, match="a is torch.float32, expected torch.float64"):
        rwkv7(**x | {"a": x["a"].float()})
    with pytest.raises(ValueError, match="chunk_size is 0"):
        rwkv7(**x, chunk_size=0)


def authors_way(layer, x):
    """The layer's equations token by token for one text [T, D], with the paper's state [V, K]."""
    H, K = layer.rho.shape
    S, last, out = x.new_zeros(H, K, K), torch.zeros_like(x[0]), []
    for token in x:
        r, w, k, v, a, g = (token + mu * (last - token) for mu in layer.mu)
        r, k, v = layer.r_proj.weight @ r, layer.k_proj.weight @ k, layer.v_proj.weight @ v
        w = layer.decay.bias + torch.tanh(w @ layer.decay.a) @ layer.decay.b
        w = torch.exp(-torch.exp(-F.softplus(-w) - 0.5))
        a = torch.sigmoid(layer.rate.bias + a @ layer.rate.a @ layer.rate.b)
        g = torch.sigmoid(g @ layer.gate.a) @ layer.gate.b
        kk = F.normalize((k * layer.xi).view(H, K), dim=-1)
        k = k * (1 + (a - 1) * layer.alpha)
        r, w, k, v, a = (z.view(H, K) for z in (r, w, k, v, a))
        transition = torch.diag_embed(w) - kk[:, :, None] * (kk * a)[:, None]
        S = S @ transition + v[:, :, None] * k[:, None]
        y = F.group_norm((S @ r[..., None]).view(1, -1), H, eps=64e-5).view(H, K)
        y = y * layer.norm.weight + layer.norm.bias + (r * k * layer.rho).sum(-1, keepdim=True) * v
        out.append(layer.o_proj.weight @ (y.flatten() * g))
        last = token
    return torch.stack(out)


def test_layer_is_the_authors_recurrence():
    layer, x = RWKV7(32, 4, layer=1, layers=3).double(), torch.randn(2, 25, 32, dtype=torch.float64)
    for parameter in layer.parameters():
        # first values hide what is small in them
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert relative_error(layer(x), torch.stack([authors_way(layer, row) for row in x])) < 1e-10


def test_layer_decay_is_bounded():
    """log w in (-e^(-1/2), 0) whatever is learned; rates in (0, 1), a of length 1."""
    layer, x = RWKV7(32, 4), 100 * torch.randn(1, 50, 32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    tensors, _ = layer._project(x, torch.zeros_like(x))
    assert tensors["g"].max() <= 0 and tensors["g"].min() >= -np.exp(-0.5) * (1 + 1e-6)
    assert max_error(tensors["a"].norm(dim=-1), torch.ones(1, 50, 4)) < 1e-5
    rates = -tensors["b"] / tensors["a"]
    assert rates.min() >= 0 and rates.max() <= 1 + 1e-5


def test_token_shift_stops_at_a_sequence():
    """Changing the last token of one packed sequence leaves the next sequence as it was."""
    layer, x = RWKV7(32, 2).double(), torch.randn(1, 20, 32, dtype=torch.float64)
    edges, other = torch.tensor([0, 9, 9, 20]), x.clone()
    other[:, 8] += 1
    assert torch.equal(layer(x, cu_seqlens=edges)[:, 9:], layer(other, cu_seqlens=edges)[:, 9:])


def test_packed_prefill_can_be_continued():
    layer, x = RWKV7(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
