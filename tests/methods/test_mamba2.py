"""What is special to Mamba-2: the duality of a state space model and a mask, and shared queries and keys."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.mamba2 import Mamba2
from effattn_lite.ops.mamba2 import mamba2
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_numpy, to_torch

FORMS = pytest.mark.parametrize("form", find("mamba2").forms)
GATES = {"open": [0.0], "shut": [-20.0], "mixed": [0.0, -1e-6, -1.0, -20.0]}


def draw(**sizes):
    return make_inputs("mamba2", state=True, **sizes)


def with_gates(x, gates):
    """Gates that differ from head to head, and every nine tokens."""
    b, t, *rest = np.indices(x["g"].shape)
    return x | {"g": np.take(gates, (b + t // 9 + sum(rest)) % len(gates))}


def sum_over_past(q, k, v, *, g, initial_state):
    """o_t = sum_{j <= t} prod_{r = j+1..t} e^{g_r} (q_t . k_j) v_j, and S_0 before all; H = HV."""
    o = np.zeros_like(v)
    for t in range(q.shape[1]):
        kept = np.ones_like(g[:, t, :, None])
        for j in range(t, -1, -1):
            o[:, t] += kept * (q[:, t] * k[:, j]).sum(-1, keepdims=True) * v[:, j]
            kept = kept * np.exp(g[:, j, :, None])
        o[:, t] += kept * np.einsum("bhk,bhkv->bhv", q[:, t], initial_state)
    return o


def mask(form, g):
    """L of one head: with q = k = 1 and one value channel a token, the outputs are its rows."""
    T = len(g)
    one = np.ones((1, T, 1, 1))
    return run_reference(
        "mamba2", {"q": one, "k": one, "v": np.eye(T)[None, :, None], "g": g[None, :, None]}, form=form
    )[0][0, :, 0]


@FORMS
def test_reduces_to_lightning_attention(form):
    """g the same at every token, a value head for every query head."""
    x = draw(T=37, H=3)
    g = x["g"][0, 0]
    got = run_reference("mamba2", x | {"g": np.broadcast_to(g, x["g"].shape)}, form=form)
    assert relative_error(got, run_reference("lightning_attention", x | {"g": g})) < 1e-10


@FORMS
@pytest.mark.parametrize("gates", GATES)
def test_sum_over_the_past(form, gates):
    """Gates of 0 and -20 nats side by side, to the last digits, and nothing overflows on the way."""
    x = with_gates(draw(T=70, H=3), GATES[gates])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        o, S = run_reference("mamba2", x, form=form)
    assert np.isfinite(S).all()
    assert relative_error(o, sum_over_past(**x)) < 1e-10


@FORMS
def test_value_heads_share_q_and_k(form):
    """Value head h uses query head h // (HV / H): the same as q and k written out once a value head."""
    x = draw(T=37, H=2, HV=6)
    shared = run_reference("mamba2", x, form=form)
    alone = {tensor: np.stack([x[tensor][:, :, h // 3] for h in range(6)], axis=2) for tensor in "qk"}
    assert relative_error(run_reference("mamba2", x | alone, form=form), shared) < 1e-10


@FORMS
def test_the_mask_holds_products_of_decays(form):
    """L_tj = a_{j+1} ... a_t, 1 on the diagonal, 0 above."""
    g = make_inputs("mamba2", B=1, T=20, H=1)["g"][0, :, 0]
    L, a = mask(form, g), np.exp(g)
    want = [[np.prod(a[j + 1 : t + 1]) if j <= t else 0 for j in range(20)] for t in range(20)]
    assert relative_error(L, want) < 1e-10


@FORMS
def test_the_mask_is_semiseparable(form):
    """Every block of L on and below the diagonal has rank 1: one number carries the past to the future."""
    L = mask(form, make_inputs("mamba2", B=1, T=40, H=1)["g"][0, :, 0])
    for cut in (1, 16, 23, 39):
        singular = np.linalg.svd(L[cut:, : cut + 1], compute_uv=False)
        assert singular[1:].max(initial=0) < 1e-10 * singular[0]


@FORMS
def test_it_is_the_state_space_model_of_the_paper(form):
    """h_t = exp(dt A) h_{t-1} + dt x_t B_t^T, y_t = h_t C_t, with the state [P, N] as the paper writes it."""
    inputs = make_inputs("mamba2", B=1, T=40, H=1, HV=3)
    C, B, x = inputs["q"][0, :, 0], inputs["k"][0, :, 0], inputs["v"][0]  # [T, N], [T, N], [T, heads, P]
    A = np.array([-0.5, -1.0, -16.0])
    dt = inputs["g"][0] / -0.7  # [T, heads], in (0, 1]
    h, y = np.zeros((3, 24, 16)), np.zeros((40, 3, 24))
    for t in range(40):
        h = np.exp(dt[t] * A)[:, None, None] * h + dt[t, :, None, None] * x[t, :, :, None] * B[t]
        y[t] = h @ C[t]
    inputs |= {"v": inputs["v"] * dt[None, :, :, None], "g": (dt * A)[None]}
    o, S = run_reference("mamba2", inputs, form=form)
    assert relative_error((o[0], S[0].swapaxes(1, 2)), (y, h)) < 1e-10


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_op_with_gates_side_by_side(impl, device):
    """The op in float32 against the sum over the past: no reference point overflows, no sum cancels."""
    x = with_gates(
        make_inputs("mamba2", state=True, B=1, T=70, H=2, K=16, V=16, dtype="float32"), GATES["mixed"]
    )
    want = sum_over_past(**{name: t.astype(float) for name, t in x.items()})
    o, _ = mamba2(**to_torch(x, dtype="float32", device=device), impl=impl)
    assert relative_error(o, want) < 1e-5


def test_layer_is_the_block_of_the_paper():
    """Projection, convolution, softplus, recurrence, skip, gate and norm, written out token by token."""
    torch.manual_seed(0)
    layer, x = Mamba2(8, 4, state=6, groups=2).double(), torch.randn(1, 9, 8, dtype=torch.float64)
    p = {name: to_numpy(t) for name, t in layer.named_parameters()}
    z, xBC, dt = np.split(to_numpy(x)[0] @ p["in_proj.weight"].T, [16, 56], axis=1)

    def silu(a):
        return a / (1 + np.exp(-a))

    past = np.concatenate((np.zeros((3, 40)), xBC))
    xBC = silu(p["conv.bias"] + sum(past[i : i + 9] * p["conv.weight"][:, i] for i in range(4)))
    heads, B, C = np.split(xBC, [16, 28], axis=1)
    dt, A = np.log1p(np.exp(dt + p["dt_bias"])), -np.exp(p["A_log"])
    h, want = np.zeros((4, 6, 4)), []
    for t in range(9):
        y = np.zeros((4, 4))
        for n in range(4):
            group, value = slice(n // 2 * 6, n // 2 * 6 + 6), heads[t, 4 * n : 4 * n + 4]
            h[n] = np.exp(dt[t, n] * A[n]) * h[n] + np.outer(B[t, group], dt[t, n] * value)
            y[n] = C[t, group] @ h[n] + p["D"][n] * value
        y = (y.ravel() * silu(z[t])).reshape(2, 8)
        y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5) * p["norm.weight"]
        want.append(p["out_proj.weight"] @ y.ravel())
    assert relative_error(layer(x)[0], np.array(want)) < 1e-10


def test_layer_begins_with_steps_between_a_thousandth_and_a_tenth():
    layer = Mamba2(64, 64)
    steps, A = torch.nn.functional.softplus(layer.dt_bias), layer.A_log.exp()
    assert 0.99e-3 < steps.min() and steps.max() < 1.01e-1
    assert 1 <= A.min() and A.max() <= 16
