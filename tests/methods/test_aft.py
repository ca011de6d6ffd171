"""What is special to AFT: no product of q and k, and a full form with a bias for every pair of positions."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.aft import AFT
from effattn_lite.ops.aft import aft
from effattn_lite.reference import aft as reference
from effattn_lite.registry import find
from effattn_lite.testing import count_flops, make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("aft").forms)


def draw(T=30, P=30, **more):
    x = make_inputs("aft", T=T, **more)
    return x, np.random.default_rng(5).normal(size=(P, P))


def weighted(x, bias):
    """The published quotient, term by term: weights e^(k_j + w_tj), and the sigmoid of q."""
    o = np.zeros_like(x["v"])
    for t in range(o.shape[1]):
        w = np.exp(x["k"][:, : t + 1] + bias[t, : t + 1, None])
        o[:, t] = (w * x["v"][:, : t + 1]).sum(1) / w.sum(1) / (1 + np.exp(-x["q"][:, t]))
    return o


@FORMS
def test_published_sum(form):
    x, _ = draw()
    assert relative_error(run_reference("aft", x, form=form)[0], weighted(x, np.zeros((30, 30)))) < 1e-10


@FORMS
def test_equal_keys_are_a_running_mean(form):
    """1, (1 + 3) / 2, (1 + 3 + 8) / 3, halved by a sigmoid of 0."""
    x = {"q": np.zeros((1, 3, 1)), "k": np.full((1, 3, 1), 7.0), "v": np.array([[[1.0], [3.0], [8.0]]])}
    o, (_, b, m) = run_reference("aft", x, form=form)
    assert max_error(o.ravel(), np.array([0.5, 1.0, 2.0])) < 1e-12
    assert max_error((b, m), (np.full((1, 1), 3.0), np.full((1, 1), 7.0))) < 1e-12


def test_full_form_is_the_published_sum():
    x, w = draw(P=40)
    o, lse = reference.full(**x, w=w)
    assert relative_error(o, weighted(x, w)) < 1e-10
    assert lse[:, 0] == pytest.approx(x["k"][:, 0] + w[0, 0])
    assert relative_error(aft(**to_torch(x), w=torch.tensor(w))[0], o) < 1e-10


def test_full_form_with_no_bias_is_the_simple_form():
    x, w = draw()
    got = aft(**to_torch(x), w=torch.tensor(0 * w))[0]
    assert relative_error(got, run_reference("aft", x)[0]) < 1e-10


def test_a_row_of_biases_has_no_level():
    """A constant on the biases of one reader cancels; one on those of a key does not."""
    x, w = draw()
    base = reference.full(**x, w=w)[0]
    assert relative_error(reference.full(**x, w=w + np.arange(30)[:, None])[0], base) < 1e-10
    assert relative_error(reference.full(**x, w=w + np.arange(30))[0], base) > 0.1


def test_later_queries_alone():
    """With more keys than queries the queries are the last of the text."""
    x, w = draw()
    x, w = to_torch(x), torch.tensor(w)
    want = aft(**x, w=w)[0]
    assert relative_error(aft(x["q"][:, 23:], x["k"], x["v"], w=w, chunk_size=3)[0], want[:, 23:]) < 1e-10


def test_full_form_packed():
    """Row and column 0 of the biases belong to each sequence's first token."""
    x, w = draw(B=1)
    x, w, edges = to_torch(x), torch.tensor(w), [0, 13, 13, 14, 30]
    packed = aft(**x, w=w, cu_seqlens=torch.tensor(edges))[0]
    for a, b in zip(edges, edges[1:], strict=False):
        if a < b:
            alone = aft(*(t[:, a:b] for t in x.values()), w=w)[0]
            assert relative_error(packed[:, a:b], alone) < 1e-10


def test_full_form_gradient():
    x, w = draw(T=5, P=6, B=1, D=2)
    leaves = [t.requires_grad_() for t in (*to_torch(x).values(), torch.tensor(w))]
    assert torch.autograd.gradcheck(lambda q, k, v, w: aft(q, k, v, w=w, chunk_size=2)[0], leaves)


def test_full_form_cost():
    for T in (1, 9):
        x, w = draw(T=T, P=T, D=7)
        assert reference.cost(form="full", B=2, T=T, D=7)["flops"] == count_flops(
            reference.full, x | {"w": w}
        )


def test_full_form_errors():
    x, w = draw()
    x, w = to_torch(x), torch.tensor(w)
    with pytest.raises(ValueError, match="only AFT-simple"):
        aft(**x, w=w, output_final_state=True)
    with pytest.raises(ValueError, match=r"w has shape \(29, 29\).*P >= 30"):
        aft(**x, w=w[:29, :29])
    with pytest.raises(ValueError, match="k has 29 tokens, expected 30 as q"):
        aft(x["q"], x["k"][:, :29], x["v"][:, :29], w=w)
    with pytest.raises(TypeError, match="w is on|k is"):
        aft(x["q"], x["k"].float(), x["v"], w=w)
    with pytest.raises(NotImplementedError, match="no kernel"):
        aft(*(t.float() for t in x.values()), w=w.float(), impl="triton")


def test_layer_with_learned_positions():
    """AFT-full as a layer: forward, prefill and steps agree, packed sequences too; w gets a gradient."""
    layer, x = AFT(16, 1, max_length=30).double(), torch.randn(1, 24, 16, dtype=torch.float64)
    want = layer(x)
    _, cache = layer.prefill(x[:, :10])
    y, cache = layer.prefill(x[:, 10:20], cache)
    assert relative_error(y, want[:, 10:20]) < 1e-10
    for t in range(20, 24):
        y, cache = layer.step(x[:, t], cache)
        assert relative_error(y, want[:, t]) < 1e-10
    edges = [0, 9, 24]
    packed = layer(x, cu_seqlens=torch.tensor(edges))
    assert relative_error(packed[:, 9:], layer(x[:, 9:])) < 1e-10
    want.sum().backward()
    # of 24 positions all pairs j <= t, but not (0, 0): one weight alone is always 1
    assert (layer.w.grad.tril()[:24, :24] != 0).sum() == 24 * 25 // 2 - 1
    assert layer.w.grad.count_nonzero() == 24 * 25 // 2 - 1


def test_packed_prefill_can_be_continued():
    layer, x = AFT(32, 1).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
