"""What is special to the Linear Transformer: features for a softmax, and what happens where they vanish."""

import numpy as np
import pytest
import torch

from effattn_lite.ops.lightning_attention import lightning_attention
from effattn_lite.ops.linear_transformer import linear_transformer, step
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_op, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("linear_transformer").forms)
IMPLS = pytest.mark.parametrize("impl", ("torch", "triton"))


def draw(**sizes):
    return make_inputs("linear_transformer", state=True, **sizes)


def column(*values):
    return np.array(values, float)[None, :, None, None]


def test_reduces_to_lightning_attention():
    """Without map and quotient it is lightning attention that forgets nothing, at the same scale."""
    x = to_torch(draw(T=37))
    S, z = x.pop("initial_state")
    o, (S_end, z_end) = linear_transformer(
        **x, initial_state=(S, z), feature_map=None, normalize=False, scale=0.3, output_final_state=True
    )
    want = lightning_attention(
        **x, g=torch.zeros(2, dtype=torch.float64), scale=0.3, initial_state=S, output_final_state=True
    )
    assert relative_error((o, S_end), want) < 1e-12
    assert relative_error(z_end, z + x["k"].sum(1)) < 1e-12


@FORMS
def test_by_hand(form):
    """Features 1 and 2, values 3 and 6: 3 / 1, then (3 + 12) / 3, whatever the query."""
    inputs = dict(q=column(-0.7, 1.3), k=column(0.0, 1.0), v=column(3.0, 6.0))
    o, (S, z) = run_reference("linear_transformer", inputs, form=form)
    assert max_error(o, column(3.0, 5.0)) < 1e-15
    assert (S.item(), z.item()) == (15.0, 3.0)


@FORMS
@pytest.mark.parametrize("options", ({"feature_map": "softmax"}, {"feature_map": None}))
def test_other_maps(form, options):
    """A map over K, and no map at all, whose denominators may be negative; the op agrees."""
    inputs = draw(T=37)
    want = run_reference("linear_transformer", inputs, **options)
    assert relative_error(run_reference("linear_transformer", inputs, form=form, **options), want) < 1e-10
    assert relative_error(run_op("linear_transformer", to_torch(inputs), **options), want) < 1e-10


def test_an_average_of_the_values():
    """With positive features no output leaves the range of the values seen, and equal values come back."""
    inputs = make_inputs("linear_transformer", T=50)
    o, _ = run_reference("linear_transformer", inputs)
    v = inputs["v"]
    top, low = np.maximum.accumulate(v, axis=1), np.minimum.accumulate(v, axis=1)
    assert (o <= top + 1e-12).all() and (o >= low - 1e-12).all()
    equal = run_reference("linear_transformer", inputs | {"v": np.full_like(v, 7.0)})[0]
    assert max_error(equal, np.full_like(v, 7.0)) < 1e-12


def test_order_of_the_past_does_not_matter():
    """The state is a sum: the last output stays if the tokens before it change places."""
    x = make_inputs("linear_transformer", T=30)
    order = np.r_[np.random.default_rng(0).permutation(29), 29]
    shuffled = {name: t[:, order] for name, t in x.items()}
    last = [run_reference("linear_transformer", y)[0][:, -1] for y in (x, shuffled)]
    assert relative_error(*last) < 1e-12


@IMPLS
def test_features_far_below_zero_keep_their_digits(impl, device):
    """elu(x) + 1 is e^-20 at x = -20, which adding 1 in float32 would round to 0."""
    x = to_torch(make_inputs("linear_transformer", B=1, T=20, H=1, dtype="float32"), dtype="float32")
    x = {name: t.to(device) for name, t in x.items()}
    x |= {"q": torch.full_like(x["q"], -20.0), "k": torch.full_like(x["k"], -20.0)}
    o = linear_transformer(**x, impl=impl)[0]
    mean = x["v"].cumsum(1) / torch.arange(1, 21, device=device)[:, None, None]
    assert max_error(o, mean) < 1e-5


@IMPLS
@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_vanishing_features_give_zero(impl, dtype, device):
    """relu of negative queries, or of keys in other channels: o = 0, gradients 0, nothing NaN."""
    inputs = make_inputs("linear_transformer", B=1, T=24, H=1, K=16, V=16, dtype=dtype)
    q, k = np.abs(inputs["q"]), np.abs(inputs["k"])
    q[:, :8] *= -1  # no feature at all
    q[:, 8:16, :, :8], k[..., 8:] = -1, -1  # features that no key has
    x = to_torch(inputs | {"q": q, "k": k}, dtype=dtype, device=device, requires_grad=True)
    o = linear_transformer(**x, feature_map="relu", impl=impl)[0]
    assert (o[:, :16] == 0).all() and (o[:, 16:] != 0).any()
    o.float().square().sum().backward()
    assert all(t.grad.isfinite().all() for t in x.values())
    assert (x["q"].grad[:, :16] == 0).all() and (x["q"].grad[:, 16:] != 0).any()


@IMPLS
def test_float16_has_room_for_a_long_sum(impl, device):
    """A denominator of 80,000 and more: float16 ends at 65,504."""
    inputs = make_inputs("linear_transformer", B=1, T=220, H=1, K=16, V=16, dtype="float16")
    inputs["q"][:], inputs["k"][:] = 4, 4
    o = linear_transformer(**to_torch(inputs, dtype="float16", device=device), impl=impl)[0]
    mean = inputs["v"].astype(float).cumsum(1) / np.arange(1, 221)[:, None, None]
    assert max_error(o, mean) < 2e-3


def test_a_function_as_map():
    """It may have any number of features; the op and its step pass them on."""
    x = to_torch(make_inputs("linear_transformer", T=9))

    def phi(t):
        return torch.cat((t.exp(), (-t).exp(), torch.ones_like(t[..., :1])), dim=-1)

    o, state = linear_transformer(**x, feature_map=phi, output_final_state=True)
    assert state[0].shape == (2, 2, 33, 24) and state[1].shape == (2, 2, 33)
    A = torch.einsum("bthm,bjhm->bhtj", phi(x["q"]), phi(x["k"])).tril()
    assert relative_error(o, torch.einsum("bhtj,bjhv->bthv", A / A.sum(-1, keepdim=True), x["v"])) < 1e-12
    before = tuple(t - d for t, d in zip(state, _written(phi, x), strict=True))
    one = step(*(x[n][:, -1] for n in "qkv"), feature_map=phi, state=before)
    assert relative_error(one, (o[:, -1], state)) < 1e-12


def _written(phi, x):
    k = phi(x["k"][:, -1])
    return k[..., None] * x["v"][:, -1][..., None, :], k


def test_errors_name_both_sides():
    x = to_torch(draw(T=4))
    S, z = x["initial_state"]
    with pytest.raises(ValueError, match=r"feature_map is 'elu', expected one of \('elu1', 'relu'"):
        linear_transformer(**x, feature_map="elu")
    with pytest.raises(ValueError, match=r"makes \(2, 2, 16\) of q, expected \(2, 4, 2\) \+ \(M,\)"):
        linear_transformer(**x, feature_map=lambda t: t[:, 0])
    with pytest.raises(ValueError, match="initial_state is Tensor, expected a tuple"):
        linear_transformer(**x | {"initial_state": S})
    with pytest.raises(ValueError, match=r"initial_state\[1\] has shape \(2, 2, 15\), expected .*16"):
        linear_transformer(**x | {"initial_state": (S, z[..., 1:])})
    with pytest.raises(TypeError, match=r"initial_state\[0\] is torch.float32, expected torch.float64"):
        linear_transformer(**x | {"initial_state": (S.float(), z)})
    wide = to_torch(make_inputs("linear_transformer", T=2, K=512), dtype="float32")
    with pytest.raises((NotImplementedError, ValueError), match="K and V <= 256, got 512|triton"):
        linear_transformer(**wide, impl="triton")
