"""The TTT-Linear engine: odd sizes, kept models, packed texts, states inside a mini-batch, compiled."""

import numpy as np
import pytest
import torch

from effattn_lite.ops.engines.ttt_linear import EVERY
from effattn_lite.ops.ttt_linear import step, ttt_linear
from effattn_lite.testing import budget, flat, make_inputs, max_error, relative_error, run_op, to_torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))
NAMES = ("q", "k", "v", "w", "b", "eta", "ln_weight", "ln_bias", "S0", "s0", "D0", "d0", "c0")

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(*, N=1, **sizes):
    """Inputs of one text, with the states of N, each 3 tokens into a mini-batch of 5 (8 into one of 16)."""
    sizes = dict(B=1, H=2, K=16, state=True, dtype="float32") | sizes
    inputs = make_inputs("ttt_linear", **sizes)
    inputs["initial_state"] = make_inputs("ttt_linear", **sizes | dict(B=N, T=1))["initial_state"]
    return inputs


def both(inputs, *, impl, dtype, device, edges=None, **options):
    """Outputs, and gradients of all inputs from fixed cotangents on o and the final state."""
    x = to_torch(inputs, dtype=dtype, device=device, requires_grad=True)
    cu_seqlens = None if edges is None else torch.tensor(edges, device=device)
    out = flat(run_op("ttt_linear", x, impl=impl, cu_seqlens=cu_seqlens, **options))
    rng = np.random.default_rng(3)
    dout = [torch.tensor(np.round(rng.normal(size=y.shape) * 8) / 8).to(y) for y in out]
    grads = torch.autograd.grad(out, flat(tuple(x.values())), dout)
    return dict(zip(("o", "S", "s", "D", "d", "c", *("d" + n for n in NAMES)), (*out, *grads), strict=True))


def hold(inputs, *, device, dtype="float32", **how):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    want = both(inputs, impl="torch", dtype="float64", device="cpu", **how)
    plain = both(inputs, impl="torch", dtype=dtype, device=device, **how)
    got = both(inputs, impl="triton", dtype=dtype, device=device, **how)
    for what in want:
        factor = 3.0 if what[0] == "d" and what != "d" else 2.0
        limit = budget(want[what].detach(), plain[what].detach(), dtype, factor=factor, terms=16)
        error = max_error(got[what], want[what])
        assert error <= limit, f"{what}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.parametrize("T, K", ((1, 16), (17, 20), (40, 8)))
def test_sizes(T, K, device):
    hold(draw(T=T, K=K), device=device, batch_size=5)


@pytest.mark.parametrize("size", (1, 3, 20))
def test_sizes_of_a_mini_batch(size, device):
    """One token; a few; more than a tile of 16 holds."""
    inputs = draw(T=41, H=1)
    *state, c = inputs["initial_state"]
    inputs["initial_state"] = *state, c % size
    hold(inputs, device=device, batch_size=size)


def test_models_are_kept_and_made_again(device):
    """More mini-batches than one kept model serves: the backward makes three groups of them."""
    inputs = draw(T=4 * 2 * EVERY + 10, H=1)
    # 8 tokens are two mini-batches of 4
    inputs["initial_state"] = *inputs["initial_state"][:4], 0 * inputs["initial_state"][4]
    hold(inputs, device=device, batch_size=4)


@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 130]))
def test_packed(edges, device):
    hold(draw(N=len(edges) - 1, T=edges[-1], H=1), device=device, edges=edges, batch_size=5)


def test_packed_without_a_state(device):
    """Texts of one launch keep their models apart."""
    inputs = make_inputs("ttt_linear", B=1, T=90, H=1, K=16, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    edges = [0, 33, 33, 34, 90]
    o = ttt_linear(**x, batch_size=2, cu_seqlens=torch.tensor(edges, device=device), impl="triton")[0]
    got = torch.autograd.grad(o.square().sum(), tuple(x.values()))
    o = ttt_linear(**x, batch_size=2, cu_seqlens=torch.tensor(edges, device=device), impl="torch")[0]
    assert relative_error(got, torch.autograd.grad(o.square().sum(), tuple(x.values()))) < 1e-5


def _arguments(device):
    x = to_torch(draw(T=20), dtype="float32", device=device, requires_grad=True)
    *state, c = x.pop("initial_state")
    return (*x.values(), *state, c.detach().int())


def test_opcheck(device):
    """torch's own checks of an operator: schema, fake tensors, autograd, tracing with dynamic shapes."""
    torch.library.opcheck(torch.ops.effattn_lite.ttt_linear, (*_arguments(device), None, 16, True, 5))


def test_compiles_with_gradients(device):
    """torch.compile keeps one graph, forward and backward."""
    x = to_torch(draw(T=20), dtype="float32", device=device, requires_grad=True)
    names, tensors = tuple(x), flat(tuple(x.values()))

    def loss(*values):
        inputs = dict(zip(names, (*values[:8], values[8:]), strict=True))
        o, state = ttt_linear(**inputs, output_final_state=True, impl="triton")
        return o.square().sum() + sum(part.sum() for part in state)

    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert relative_error(got, want) < 1e-6


def test_steps(device, launches):
    """A text token by token, one launch each, over the ends of mini-batches, equals the op."""
    inputs = draw(T=9)
    want = run_op("ttt_linear", to_torch(inputs), batch_size=5)
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    for t in range(9):
        token = {name: part[:, t] if name in ("q", "k", "v", "eta") else part for name, part in x.items()}
        o, after = step(**token, state=state, out_state=state, batch_size=5, impl="triton")
        assert relative_error(o, want[0][:, t]) < 1e-5
        assert all(a is b for a, b in zip(after, state, strict=True))
    assert launches == ["ttt_linear_forward_kernel"] * 9
    assert relative_error(state, want[1]) < 1e-5


def test_no_model_is_kept_without_a_gradient(device, launches):
    x = to_torch(
        make_inputs("ttt_linear", B=1, T=20, H=1, K=16, dtype="float32"), dtype="float32", device=device
    )
    assert not ttt_linear(**x, impl="triton")[0].requires_grad
    x["q"].requires_grad_()
    ttt_linear(**x, impl="triton")[0].sum().backward()
    assert launches == ["ttt_linear_forward_kernel"] * 2 + ["ttt_linear_backward_kernel"]


@pytest.mark.parametrize(
    "K, size, match", ((33, 16, "K <= 32 in torch.float32, got 33"), (16, 65, "<= 64, got 65"))
)
def test_limits(K, size, match, device):
    x = to_torch(make_inputs("ttt_linear", B=1, T=2, H=1, K=K), dtype="float32", device=device)
    with pytest.raises(NotImplementedError, match=match):
        ttt_linear(**x, batch_size=size, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("K", (32, 64))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(K, dtype, device):
    if K > 32 and dtype == "float32":
        pytest.skip("float32 models have K <= 32")
    hold(draw(T=200, H=4, K=K, dtype=dtype), device=device, dtype=dtype)
