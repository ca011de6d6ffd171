"""What is special to TTT-Linear: a state that is trained, gradients at a mini-batch's start."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.ttt_linear import TTTLinear
from effattn_lite.ops.ttt_linear import step, ttt_linear
from effattn_lite.reference.ttt_linear import gradient, normalised
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("ttt_linear").forms)


def draw(**sizes):
    return make_inputs("ttt_linear", **sizes)


def loss_of(z, target, weight, bias):
    return 0.5 * ((weight * normalised(z)[0] + bias - target) ** 2).sum(-1)


def test_gradient_is_the_slope_of_the_loss():
    """Central differences along every axis, where the norm's variance is large and where it is 0."""
    rng = np.random.default_rng(0)
    target, weight, bias = rng.normal(size=(3, 7))
    for z in (rng.normal(size=7), np.full(7, 3.0)):
        want = [
            (loss_of(z + e, target, weight, bias) - loss_of(z - e, target, weight, bias)) / 2e-6
            for e in 1e-6 * np.eye(7)
        ]
        assert relative_error(gradient(z, target, weight, bias), np.array(want)) < 1e-6


def test_a_mini_batch_is_autograd():
    """Three whole mini-batches, each one step of torch's own gradient of the summed losses."""
    x = to_torch(draw(B=1, T=12, H=1, K=6))
    w, b, gamma, beta = (x[name][0] for name in ("w", "b", "ln_weight", "ln_bias"))
    for j in range(0, 12, 4):
        k, v, eta = (x[name][0, j : j + 4, 0] for name in ("k", "v", "eta"))
        w, b = w.detach().requires_grad_(), b.detach().requires_grad_()
        y = torch.nn.functional.layer_norm(k @ w + b, (6,), gamma, beta, eps=1e-6)
        loss = 0.5 * eta * (k + y - v).square().sum(-1)
        dw, db = torch.autograd.grad(loss.sum(), (w, b))
        w, b = w - dw, b - db
    S, s, D, d, c = ttt_linear(**x, batch_size=4, output_final_state=True)[1]
    assert relative_error((x["w"][0] + S[0, 0], x["b"][0] + s[0, 0]), (w.detach(), b.detach())) < 1e-10
    assert D.abs().max() == 0 and d.abs().max() == 0 and c.item() == 0


@FORMS
def test_without_a_rate_nothing_is_learned(form):
    """eta = 0: o = q + LN(q w + b), whatever the keys."""
    x = draw(T=20)
    x["eta"] = 0 * x["eta"]
    o, state = run_reference("ttt_linear", x, form=form)
    z = np.einsum("bthk,hkv->bthv", x["q"], x["w"]) + x["b"]
    assert relative_error(o, x["q"] + x["ln_weight"] * normalised(z)[0] + x["ln_bias"]) < 1e-10
    assert all(np.abs(part).max() == 0 for part in state[:4])


@FORMS
def test_the_size_of_a_mini_batch_is_part_of_the_model(form):
    """The first token of a text is alone in any mini-batch; the second, with 1, sees a trained model."""
    x = draw(T=20)
    one, many = (run_reference("ttt_linear", x, form=form, batch_size=n)[0] for n in (1, 16))
    assert relative_error(many[:, 0], one[:, 0]) < 1e-10
    assert relative_error(many[:, 1], one[:, 1]) > 1e-4


def test_the_rate_is_that_of_the_source():
    """A token that is not learned from, eta = 0, is as good as absent for all later ones."""
    x = to_torch(draw(T=16))
    x["eta"][:, 5] = 0
    other = dict(x, k=x["k"].clone(), v=x["v"].clone())
    other["k"][:, 5], other["v"][:, 5] = 1.0, 2.0
    assert relative_error(ttt_linear(**x)[0], ttt_linear(**other)[0]) < 1e-10


def test_a_repeated_pair_is_learned():
    """The read-out comes near the value when the same key and value come again and again."""
    x = draw(B=1, T=64, H=1, K=8)
    x["k"][:], x["ln_weight"][:], x["ln_bias"][:] = x["k"][:, :1], 1, 0
    # a value that the norm can reach
    x["q"], x["v"] = x["k"], x["k"] + normalised(x["v"][:, :1])[0]
    x["eta"][:] = 0.05
    o = run_reference("ttt_linear", x, batch_size=4)[0]
    error = np.linalg.norm(o - x["v"], axis=-1)[0, :, 0]
    assert error[-1] < 0.2 * error[0]


@pytest.mark.parametrize("counts", ((0, 3), (7, 2), (15, 15)))
def test_rows_may_stop_anywhere_in_a_mini_batch(counts):
    """Rows of a batch whose states count different tokens go on as each would alone."""
    parts = [to_torch(draw(B=1, T=40, seed=n)) for n in range(2)]
    shared = {name: parts[0][name] for name in ("w", "b", "ln_weight", "ln_bias")}
    heads, tails, want = [], [], []
    for x, n in zip(parts, counts, strict=True):
        x |= shared
        whole, _ = ttt_linear(**x)
        first = {name: t[:, :n] if name not in shared else t for name, t in x.items()}
        heads.append(ttt_linear(**first, output_final_state=True)[1])
        tails.append({name: x[name][:, n : n + 20] for name in ("q", "k", "v", "eta")})
        want.append(whole[:, n : n + 20])
    state = tuple(torch.cat(part) for part in zip(*heads, strict=True))
    both = {name: torch.cat([tail[name] for tail in tails]) for name in tails[0]}
    assert state[-1].tolist() == list(counts)
    assert relative_error(ttt_linear(**both, **shared, initial_state=state)[0], torch.cat(want)) < 1e-10


def test_scale_multiplies_the_query():
    x = to_torch(draw(T=20))
    assert relative_error(ttt_linear(**x, scale=0.5)[0], ttt_linear(**x | {"q": x["q"] / 2})[0]) < 1e-10


def test_errors_name_both_sides():
    x = to_torch(draw(T=5))
    state = ttt_linear(**x, output_final_state=True)[1]
    with pytest.raises(ValueError, match="batch_size is 0"):
        ttt_linear(**x, batch_size=0)
    with pytest.raises(ValueError, match=r"w has shape \(2, 16, 8\), expected \[H, K, K\] = \(2, 16, 16\)"):
        ttt_linear(**x | {"w": x["w"][..., :8]})
    with pytest.raises(ValueError, match=r"initial_state has shape 2, expected a tuple \(S, s, D, d, c\)"):
        ttt_linear(**x, initial_state=state[:2])
    with pytest.raises(TypeError, match="D of state is torch.float32, expected torch.float64"):
        token = {n: t[:, 0] if n in ("q", "k", "v", "eta") else t for n, t in x.items()}
        step(**token, state=(*state[:2], state[2].float(), *state[3:]))


def test_packed_prefill_can_be_continued():
    layer, x = TTTLinear(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    assert cache["c"].tolist() == [0, 12, 2]
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert max_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10


def test_the_rate_of_the_layer_is_bounded():
    """eta lies in (0, base_rate / K), and begins near half of that."""
    layer = TTTLinear(64, 4, base_rate=1.0)
    eta = layer._project(torch.randn(1, 50, 64), torch.arange(50))[-1] * 16
    assert 0.3 < eta.min() and eta.max() < 0.7
