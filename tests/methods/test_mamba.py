"""What is special to Mamba: steps that select, two discretisations, exact decay however strong."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.mamba import Mamba
from effattn_lite.ops.mamba import mamba, step
from effattn_lite.reference import mamba as reference
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", (reference.recurrent, reference.scan))


def draw(**sizes):
    return make_inputs("mamba", state=True, **sizes)


@FORMS
def test_by_hand(form):
    """One channel, one state, halved by a step of 1: 4 -> 2 + 3 -> 2.5 + 1; read with 1 and 10, skip 0.5."""
    x, dt = np.array([[[3.0], [1.0]]]), np.ones((1, 2, 1))
    y, h = form(
        x, dt, np.array([[np.log(0.5)]]), np.ones((1, 2, 1)), np.array([[[1.0], [10.0]]]),
        D=np.array([0.5]), initial_state=np.array([[[4.0]]]),
    )  # fmt: skip
    assert np.allclose(y[0, :, 0], (5 + 1.5, 35 + 0.5), rtol=1e-15) and np.allclose(h, 3.5, rtol=1e-15)


@FORMS
def test_reduces_to_mamba2(form):
    """A equal in a channel's states, no skip: every channel is a value head of one entry."""
    x = draw(T=37)
    x["A"] = np.broadcast_to(x["A"][:, :1], x["A"].shape)
    del x["D"]
    v, g = (x["dt"] * x["x"])[..., None], x["dt"] * x["A"][:, 0]
    q, k = x["C"][:, :, None], x["B"][:, :, None]
    h0 = x["initial_state"][..., None]
    o, S = run_reference("mamba2", {"q": q, "k": k, "v": v, "g": g, "initial_state": h0})
    y, h = form(**x)
    assert relative_error((y, h), (o[..., 0], S[..., 0])) < 1e-12


@FORMS
def test_constant_inputs_make_a_convolution(form):
    """dt, B and C the same at every token: time-invariant, so y is x convolved with C e^(l dt A) dt B."""
    x = draw(T=40)
    for name in ("dt", "B", "C"):
        x[name] = np.broadcast_to(x[name][:, :1], x[name].shape)
    del x["initial_state"], x["D"]
    lag = np.arange(40)[:, None, None, None]
    dt, B, C = x["dt"][:, 0, :, None], x["B"][:, 0, None], x["C"][:, 0, None]
    kernel = (C * np.exp(lag * dt * x["A"]) * dt * B).sum(-1)  # [T, B, D]
    want = np.stack([sum(kernel[t - j] * x["x"][:, j] for j in range(t + 1)) for t in range(40)], axis=1)
    assert relative_error(form(**x)[0], want) < 1e-12


@FORMS
def test_a_step_of_zero_skips_a_token(form):
    x = draw(T=1)
    assert np.array_equal(form(**x | {"dt": 0 * x["dt"]})[1], x["initial_state"])


@FORMS
def test_a_large_step_forgets_everything(form):
    """e^(-800) is no number: the state is the token's own write, without a NaN on the way."""
    x = draw(T=9)
    x["A"], x["dt"] = np.full_like(x["A"], -1e3), np.full_like(x["dt"], 0.8)
    with np.errstate(all="raise", under="ignore"):
        h = form(**x)[1]
    assert max_error(h, 0.8 * x["x"][:, -1, :, None] * x["B"][:, -1, None]) < 1e-15


def test_euler_and_zero_order_hold_differ():
    """dt B is written; over the exact (e^(dt A) - 1) / A B that is too much, by a / 2 to a for a = -dt A."""
    x = draw(T=1)
    del x["initial_state"]
    for size in (1e-3, 1.0):
        wrote = reference.recurrent(**x | {"dt": np.full_like(x["dt"], size)})[1]
        a = -size * x["A"]
        exact = -np.expm1(-a) / -x["A"] * (x["x"][:, 0, :, None] * x["B"][:, 0, None])
        excess = wrote / exact - 1
        assert (excess > a / 2).all() and (excess < a).all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("rate", (-1e-6, -1.0, -1e3))
def test_any_strength_of_decay(impl, rate, device):
    """Neighbouring channels that keep everything and nothing, over several segments, forward and backward."""
    inputs = make_inputs("mamba", B=1, T=150, D=8, M=4, state=True, dtype="float32")
    inputs["A"][:] = np.where(np.arange(8)[:, None] % 2, rate, -0.1)
    inputs["dt"][0, ::7] = 20.0
    want = run_reference("mamba", inputs)
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    got = mamba(**x, output_final_state=True, impl=impl)
    assert relative_error(tuple(t.detach() for t in got), want) < 1e-5
    (got[0].sum() + got[1].sum()).backward()
    assert all(t.grad.isfinite().all() for t in x.values())


def test_scale_and_skip_are_apart():
    x = to_torch(draw(T=20))
    plain, scaled = mamba(**x)[0], mamba(**x, scale=3.0)[0]
    skip = x["D"] * x["x"]
    assert relative_error(scaled - skip, 3 * (plain - skip)) < 1e-12
    del x["D"]
    assert relative_error(mamba(**x)[0], plain - skip) < 1e-12


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_steps_may_be_wide_or_narrow(dtype):
    """bfloat16 inputs with dt in either dtype: under autocast a layer has both."""
    x = to_torch(make_inputs("mamba", T=20, dtype="bfloat16"), dtype="bfloat16")
    y = mamba(**x | {"dt": x["dt"].to(dtype)})[0]
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_errors():
    x = to_torch(draw(T=9))
    with pytest.raises(ValueError, match=r"A has shape \(20, 11\).*\(20, 12\) as x|B has shape.*as x"):
        mamba(**x | {"A": x["A"][:, :11]})
    with pytest.raises(TypeError, match="dt is torch.float32, expected torch.float64 as x"):
        mamba(**x | {"dt": x["dt"].float()})
    token = {name: t[:, 0] if t.ndim == 3 and name != "initial_state" else t for name, t in x.items()}
    state = token.pop("initial_state")
    with pytest.raises(ValueError, match="out_state has shape"):
        step(**token, state=state, out_state=state[:1])
    with pytest.raises(TypeError, match="state is torch.float32, expected torch.float64"):
        step(**token, state=state.float())


def test_layer_begins_as_its_authors_say():
    """A = -1 .. -M in every channel, steps between 0.001 and 0.1, D = 1."""
    torch.manual_seed(0)
    layer = Mamba(64, states=16)
    assert relative_error(-layer.A_log.exp(), -torch.arange(1.0, 17).expand(128, 16)) < 1e-6
    dt = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert 0.99e-3 < dt.min() and dt.max() < 0.101 and dt.max() / dt.min() > 20
    assert layer.rank == 4 and bool((layer.D == 1).all())


def test_layer_selects():
    """A token changes what the layer keeps of an earlier one; fixed steps would make the effect add up."""
    torch.manual_seed(0)
    layer, x = Mamba(16).double(), torch.randn(1, 12, 16, dtype=torch.float64)

    def state(*changed):
        other = x.clone()
        for t in changed:
            other[:, t] *= -1
        return layer.prefill(other)[1]["state"]

    both = state(2, 9) - state()
    assert relative_error(both, (state(2) - state()) + (state(9) - state())) > 1e-3


def test_packed_prefill_can_be_continued():
    layer, x = Mamba(16).double(), torch.randn(1, 30, 16, dtype=torch.float64)
    edges = torch.tensor([0, 0, 2, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 16, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
