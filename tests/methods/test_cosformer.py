"""What is special to cosFormer: a cosine of distances out of two products, and a state that turns."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.cosformer import CosFormer
from effattn_lite.ops.cosformer import cosformer, step
from effattn_lite.reference.cosformer import features, turn
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_op, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("cosformer").forms)
IMPLS = pytest.mark.parametrize("impl", ("torch", "triton"))


def column(*values):
    return np.array(values, float)[None, :, None, None]


@FORMS
def test_reduces_to_linear_transformer(form):
    """With a max_length of 10^9 every cosine is 1 to the last digit: linear attention over relu."""
    x = make_inputs("cosformer", T=37)
    o, (S, z) = run_reference("cosformer", x, form=form, max_length=10**9)
    want = run_reference("linear_transformer", x, feature_map="relu")
    assert relative_error((o, S[:, :, :16], z[:, :, :16]), (want[0], *want[1])) < 1e-12
    # what is left of the sines: 37 tokens of 10^9
    assert np.abs(S[:, :, 16:]).max() < 1e-6
    assert relative_error(run_op("cosformer", to_torch(x), max_length=10**9)[0], want[0]) < 1e-12


def test_the_cosine_of_a_difference():
    """cos a cos b + sin a sin b: products of features are nonnegative scores times cos(a - b)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1, 50, 3, 8))
    a, b = rng.uniform(0, np.pi / 2, size=(2, 50))
    products = np.sum(features(x, a) * features(y, b), axis=-1)
    want = np.sum(np.maximum(x, 0) * np.maximum(y, 0), axis=-1) * np.cos(a - b)[:, None]
    assert max_error(products, want) < 1e-14
    # a later token sees a state at smaller positions
    S = features(x, a).swapaxes(1, 2)[..., None][:, :, 7]
    assert max_error(turn(S, 0.3)[..., 0], features(x, a - 0.3)[:, 7]) < 1e-14


@FORMS
def test_by_hand(form):
    """max_length 3: a distance of 1 weighs cos 30 degrees, of 2 a half; the third key is below 0."""
    x = dict(q=column(1.0, 2.0, 3.0), k=column(2.0, 2.0, -1.0), v=column(1.0, 0.0, 9.0))
    o, (S, z) = run_reference("cosformer", x, form=form, max_length=3)
    half = 3**0.5 / 2
    assert max_error(o, column(1.0, half / (1 + half), 0.5 / (0.5 + half))) < 1e-14
    assert max_error(z[0, 0], np.array([2 * 0.5 + 2 * half, -2 * half - 2 * 0.5])) < 1e-14
    assert max_error(S[0, 0], np.array([[1.0], [-2 * half]])) < 1e-14


def test_a_weight_fades_to_nothing_at_max_length():
    """Among equal tokens the first one's weight falls as a cosine, nearly to 0 at the end."""
    x = dict(q=np.ones((1, 100, 1, 1)), k=np.ones((1, 100, 1, 1)), v=np.zeros((1, 100, 1, 1)))
    x["v"][:, 0] = 1
    o = run_reference("cosformer", x, max_length=100)[0][0, :, 0, 0]
    lag = np.arange(100)
    assert max_error(o, np.cos(np.pi * lag / 200) / np.cumsum(np.cos(np.pi * lag / 200))) < 1e-13


@IMPLS
def test_only_distances_count(impl, device):
    """The second half of a text continues the first without a count of its tokens; offset changes nothing."""
    x = to_torch(make_inputs("cosformer", T=60, K=16, V=16, dtype="float32"), dtype="float32", device=device)
    whole = run_op("cosformer", x, max_length=90, impl=impl)
    left, right = ({n: t[:, part] for n, t in x.items()} for part in (slice(0, 23), slice(23, 60)))
    a, state = run_op("cosformer", left, max_length=90, impl=impl)
    for offset in (0, 23):
        again = dict(max_length=90, offset=offset, initial_state=state, impl=impl)
        b, end = run_op("cosformer", right, **again)
        assert relative_error((torch.cat((a, b), dim=1), *end), (whole[0], *whole[1])) < 1e-5


@IMPLS
def test_vanishing_features_give_zero(impl, device):
    """No channel in which a query and a key are both positive: o = 0, and every gradient is finite."""
    inputs = make_inputs("cosformer", B=1, T=24, H=1, K=16, V=16, dtype="float32")
    q, k = np.abs(inputs["q"]), np.abs(inputs["k"])
    q[..., :8], k[..., 8:] = -1, -1
    x = to_torch(inputs | {"q": q, "k": k}, dtype="float32", device=device, requires_grad=True)
    o = cosformer(**x, max_length=24, impl=impl)[0]
    assert (o == 0).all()
    o.sum().backward()
    assert all((t.grad == 0).all() for t in x.values())


def test_long_decoding_keeps_its_digits():
    """3,000 turns of a float32 state lose no more than rounding does: the last output of a long text."""
    x = to_torch(make_inputs("cosformer", B=1, T=3000, H=1, K=4, V=4, dtype="float32"), dtype="float32")
    want = cosformer(**{n: t.double() for n, t in x.items()}, max_length=3000, chunk_size=500)[0]
    state = (torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8))
    for t in range(3000):
        token = [x[n][:, t] for n in "qkv"]
        o, state = step(*token, max_length=3000, state=state, out_state=state, offset=t)
    assert relative_error(o, want[:, -1]) < 1e-4


def test_texts_longer_than_max_length():
    x = make_inputs("cosformer", B=1, T=20)
    for form in find("cosformer").forms:
        with pytest.raises(ValueError, match="the text has 21 tokens, expected at most max_length = 20"):
            run_reference("cosformer", x, form=form, max_length=20, offset=1)
    x = to_torch(x)
    with pytest.raises(ValueError, match="the text has 20 tokens, expected at most max_length = 19"):
        cosformer(**x, max_length=19)
    # packed, the longest sequence counts
    cosformer(**x, max_length=12, cu_seqlens=torch.tensor([0, 8, 20]))
    with pytest.raises(ValueError, match="the text has 12 tokens, expected at most max_length = 11"):
        cosformer(**x, max_length=11, cu_seqlens=torch.tensor([0, 8, 20]))
    state = cosformer(**x, max_length=20, output_final_state=True)[1]
    with pytest.raises(ValueError, match="the text has 21 tokens"):
        step(*(x[n][:, 0] for n in "qkv"), max_length=20, state=state, offset=20)


def test_layer_counts():
    layer, x = CosFormer(32, 2, max_length=25), torch.randn(1, 20, 32)
    edges = torch.tensor([0, 0, 6, 20])
    assert int(layer.prefill(x, cu_seqlens=edges)[1]["length"]) == 14
    cache = layer.prefill(x)[1]
    for _ in range(5):
        cache = layer.step(x[:, 0], cache)[1]
    with pytest.raises(ValueError, match="the text has 26 tokens, expected at most max_length = 25"):
        layer.step(x[:, 0], cache)
