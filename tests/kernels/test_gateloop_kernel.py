"""GateLoop's own kernels: the turn and its gradient against NumPy, decoding in place, refusals."""

import numpy as np
import pytest
import torch

from effattn_lite.testing import budget, flat, make_inputs, max_error, relative_error, run_op, to_torch

pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.kernels.gateloop import turn, turn_backward  # noqa: E402
from effattn_lite.ops.gateloop import gateloop, step  # noqa: E402

pytestmark = pytest.mark.usefixtures("nan_empty")


@pytest.mark.parametrize("K", (1, 16, 20, 128))
def test_turn(K, device):
    """q and k times cosine and sine, g twice; the gradient is the transpose of that."""
    rng = np.random.default_rng(0)
    shape = (2, 5, 3, K)
    q, k, g, angle = rng.normal(size=(4, *shape)).astype(np.float32)
    angle *= 50
    x = [torch.tensor(t, device=device) for t in (q, k, g, angle)]
    cos, sin = np.cos(angle.astype(float)), np.sin(angle.astype(float))
    want = tuple(np.concatenate((a * cos, a * sin), -1) for a in (q, k)) + (np.concatenate((g, g), -1),)
    assert max_error(turn(*x), want) < 1e-5
    d = rng.normal(size=(3, *shape[:-1], 2 * K)).astype(np.float32)
    (q1, q2), (k1, k2), (g1, g2) = ((t[..., :K].astype(float), t[..., K:].astype(float)) for t in d)
    want = (cos * q1 + sin * q2, cos * k1 + sin * k2, g1 + g2)
    want += (q * (cos * q2 - sin * q1) + k * (cos * k2 - sin * k1),)
    got = turn_backward(*(torch.tensor(t, device=device) for t in d), x[0], x[1], x[3])
    assert max_error(got, want) < 1e-5


def test_opcheck(device):
    """torch's own checks of the operators: schema, fake tensors, autograd, tracing with dynamic shapes."""
    operators, check = torch.ops.effattn_lite, torch.library.opcheck
    x = to_torch(make_inputs("gateloop", B=1, T=20, H=2, K=16, V=16), dtype="float32", device=device)
    q, k, v, g, theta = x.values()
    check(operators.turn, tuple(t.clone().requires_grad_() for t in (q, k, g, theta)))
    token = [t[:, 0] for t in (q, k, v, g, theta)]
    parts = [torch.randn(1, 2, 16, 16, device=device) for _ in range(2)]
    check(operators.gateloop_step, (*token, *parts, *(torch.empty_like(p) for p in parts), 0.5))


@pytest.mark.parametrize("K, V", ((16, 16), (20, 36), (1, 5)))
def test_steps_in_place(K, V, device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    inputs = make_inputs("gateloop", B=2, T=9, H=2, K=K, V=V, state=True, dtype="float32")
    want = run_op("gateloop", to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    for t in range(9):
        o, after = step(**{n: a[:, t] for n, a in x.items()}, state=state, out_state=state, impl="triton")
        assert after is state and relative_error(o, want[0][:, t]) < 1e-5
    assert launches == ["gateloop_step_kernel"] * 9
    assert relative_error(state, want[1]) < 1e-5


def test_step_refuses_to_lose_a_gradient(device):
    inputs = make_inputs("gateloop", B=1, T=1, H=1, state=True, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    state = x.pop("initial_state")
    with pytest.raises(NotImplementedError, match="no gradient"):
        step(**{n: a[:, 0] for n, a in x.items()}, state=state, impl="triton")


def test_one_turn_a_call(device, launches):
    """The turn is one launch, its gradient another; between them runs the engine of gated decay alone."""
    x = to_torch(make_inputs("gateloop", B=1, T=12, H=1), dtype="float32", device=device, requires_grad=True)
    gateloop(**x, impl="triton")[0].sum().backward()
    assert launches.count("turn_kernel") == launches.count("turn_gradient_kernel") == 1
    others = [name for name in launches if not name.startswith("turn_")]
    assert others and all(name.startswith("gated_decay") for name in others)


def test_compiles_with_gradients(device):
    inputs = make_inputs("gateloop", B=1, T=20, H=1, K=16, V=16, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 7, 20], device=device)

    def loss(*values):
        named = dict(zip(x, values, strict=True))
        o, state = gateloop(**named, output_final_state=True, cu_seqlens=cu_seqlens, impl="triton")
        return o.square().sum() + state[0].sum() + state[1].sum()

    torch._dynamo.reset()
    leaves = list(x.values())
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert relative_error(got, want) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_long_text_with_large_angles(dtype, device):
    """Angles of 1 radian a token over 8,000 tokens: the error stays that of the dtype."""
    inputs = make_inputs("gateloop", B=1, T=8000, H=2, K=64, V=64, dtype=dtype)
    want = run_op("gateloop", to_torch(inputs))
    x = to_torch(inputs, dtype=dtype, device=device)
    plain, got = (run_op("gateloop", x, impl=impl) for impl in ("torch", "triton"))
    for g, w, p in zip(flat(got), flat(want), flat(plain), strict=True):
        assert max_error(g, w) <= budget(w, p, dtype, terms=64)
