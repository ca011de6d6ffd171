"""Attention over features: what enters the kernels, in how many launches, and what a step does to a state."""

import importlib

import numpy as np
import pytest
import torch

from effattn_lite.registry import find
from effattn_lite.testing import (
    budget,
    flat,
    make_inputs,
    max_error,
    on_parts,
    relative_error,
    run_op,
    run_reference,
    to_torch,
)

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.ops.engines.feature_map import attend, divide  # noqa: E402
from effattn_lite.ops.linear_transformer import linear_transformer  # noqa: E402

NAMES = ("linear_transformer", "performer", "rfa", "rfa_gate", "cosformer", "hedgehog")
DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


def options(name):
    return dict(find(name).options[0]) | ({"max_length": 1000} if name == "cosformer" else {})


def both(name, inputs, *, impl, dtype, device):
    """Output and state, and gradients of all inputs from fixed cotangents on them."""
    x = to_torch(inputs, dtype=dtype, device=device, requires_grad=True)
    found = flat(run_op(name, x, impl=impl, **options(name)))
    rng = np.random.default_rng(3)
    cotangents = [torch.tensor(np.round(rng.normal(size=y.shape) * 8) / 8).to(y) for y in found]
    wanted = [(n, part) for n in x for part in flat(x[n])]
    grads = torch.autograd.grad(found, [part for _, part in wanted], cotangents)
    names = ["o", "S", "z", *(f"d{n} {i}" for i, (n, _) in enumerate(wanted))]
    return dict(zip(names, (*found, *grads), strict=True))


def hold(name, inputs, *, device, dtype="float32"):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    want = both(name, inputs, impl="torch", dtype="float64", device="cpu")
    plain = both(name, inputs, impl="torch", dtype=dtype, device=device)
    got = both(name, inputs, impl="triton", dtype=dtype, device=device)
    terms = max(want["S"].shape[-2:])
    for what in want:
        factor = 3.0 if what[0] == "d" else 2.0
        limit = budget(want[what].detach(), plain[what], dtype, factor=factor, terms=terms)
        error = max_error(got[what].detach(), want[what].detach())
        assert error <= limit, f"{what}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T, K, V", ((17, 100, 36), (33, 20, 100), (20, 8, 8)))
def test_sizes(name, T, K, V, device):
    hold(name, make_inputs(name, B=1, T=T, H=2, K=K, V=V, M=10, state=True, dtype="float32"), device=device)


@pytest.mark.parametrize("name", ("performer", "hedgehog"))
def test_the_largest_sizes(name, device):
    """256 features and 256 values: a column of ones beside them would be the 257th."""
    M = 256 if name == "performer" else 128
    inputs = make_inputs(name, B=1, T=17, H=1, K=32, V=256, M=M, dtype="float32")
    want = run_reference(name, inputs)
    got = run_op(name, to_torch(inputs, dtype="float32", device=device), impl="triton")
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("V, launched", ((24, 1), (16, 2)))
def test_one_more_column_or_one_more_launch(V, launched, device, launches):
    """A column of ones joins 24 values in their tile of 32; beside 16 it would make a tile of 32."""
    inputs = make_inputs("linear_transformer", B=1, T=20, H=1, K=16, V=V, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device)
    o = linear_transformer(**x, impl="triton")[0]
    assert launches == ["decay_read_kernel"] * launched
    assert relative_error(o, run_reference("linear_transformer", inputs)[0]) < 1e-5


def test_no_denominator_that_nobody_asks_for(device, launches):
    inputs = make_inputs("linear_transformer", B=1, T=20, H=1, K=16, V=16, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device)
    linear_transformer(**x, normalize=False, impl="triton")
    assert launches == ["decay_read_kernel"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_what_enters_the_kernels(dtype, signed, impl):
    """bfloat16 where kernels read nonnegative features of a bfloat16 text; otherwise float32."""
    seen = []

    def engine(q, k, v, **rest):
        seen.append((q.dtype, k.dtype, v.dtype))
        return torch.ones_like(v), None

    phi, v = torch.ones(1, 5, 2, 16), torch.zeros(1, 5, 2, 24, dtype=dtype)
    how = dict(initial_state=None, output_final_state=False, cu_seqlens=None, chunk_size=None, impl=impl)
    o, state = attend(phi, phi, v, engine=engine, signed=signed, **how)
    narrow = impl == "triton" and dtype == torch.bfloat16 and not signed
    assert seen == [(torch.bfloat16 if narrow else torch.float32,) * 3]
    assert o.dtype == dtype and state is None


def test_divide():
    """Where a denominator vanishes, 0 and no gradient, whatever the sign; a floor bounds it from below."""
    num = torch.tensor([3.0, 3.0, 3.0, 3.0], requires_grad=True)
    den = torch.tensor([2.0, 0.0, -1e-31, -2.0], requires_grad=True)
    o = divide(num, den, dtype=torch.float32)
    assert o.tolist() == [1.5, 0.0, 0.0, -1.5]
    o.sum().backward()
    assert num.grad.tolist() == [0.5, 0.0, 0.0, -0.5] and den.grad.tolist() == [-0.75, 0.0, 0.0, -0.75]
    assert divide(num, den, floor=1.0, dtype=torch.float32).tolist() == [1.5, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("V", (24, 16))
def test_steps_in_place(name, V, device, launches):
    """From the state that the op leaves: a text token by token, one launch each, the state in one place."""
    inputs = make_inputs(name, B=2, T=13, H=2, K=20, V=V, dtype="float32")
    want = run_op(name, to_torch(inputs), **options(name))
    x = to_torch(inputs, dtype="float32", device=device)
    axes = find(name).inputs
    first = {n: t[:, :6] if "T" in axes[n].split() else t for n, t in x.items()}
    state = run_op(name, first, impl="triton", **options(name))[1]
    assert all(part.is_contiguous() for part in state)
    places = [part.data_ptr() for part in state]
    launches.clear()
    step = importlib.import_module(f"effattn_lite.ops.{name}").step
    for t in range(6, 13):
        token = {n: a[:, t] if "T" in axes[n].split() else a for n, a in x.items()}
        o, state = step(**token, state=state, out_state=state, impl="triton", **options(name))
        assert relative_error(o, want[0][:, t]) < 1e-5
    assert launches == [f"{find(name).engine}_step_kernel"] * 7
    assert [part.data_ptr() for part in state] == places
    assert relative_error(state, want[1]) < 1e-5


def test_step_refuses_to_lose_a_gradient(device):
    inputs = make_inputs("performer", B=1, T=1, H=1, state=True)
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    state, omega = x.pop("initial_state"), x.pop("omega")
    step = importlib.import_module("effattn_lite.ops.performer").step
    with pytest.raises(NotImplementedError, match="no gradient"):
        step(*(t[:, 0] for t in x.values()), omega=omega, state=state, impl="triton")


@pytest.mark.parametrize("name", ("cosformer", "hedgehog"))
def test_compiles_with_gradients(name, device):
    """torch.compile keeps one graph through packed sequences and carried states, forward and backward."""
    inputs = make_inputs(name, B=1, T=20, H=1, K=16, V=16, M=8, dtype="float32")
    inputs["initial_state"] = make_inputs(name, B=2, T=1, H=1, K=16, V=16, M=8, state=True)["initial_state"]
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 7, 20], device=device)
    op, how = getattr(importlib.import_module(f"effattn_lite.ops.{name}"), name), options(name)
    names = [n for n in x if n != "initial_state"]

    def loss(*values):
        o, (S, z) = op(
            **dict(zip(names, values[:-2], strict=True)),
            **how,
            initial_state=values[-2:],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            impl="triton",
        )
        return o.square().sum() + S.sum() + z.sum()

    parts = flat(tuple(x.values()))
    want = torch.autograd.grad(loss(*parts), parts)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*parts), parts)
    assert relative_error(got, want) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("M", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_of_the_table(name, M, dtype, device):
    K = M // 2 if name == "cosformer" else M
    frequencies = M if name == "performer" else M // 2
    inputs = make_inputs(name, B=1, T=700, H=8, K=K, V=128, M=frequencies, state=True, dtype=dtype)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_step_replays_as_a_graph(name, device):
    """The same step captured and replayed moves the state on, token after token."""
    inputs = make_inputs(name, B=2, T=4, H=2, K=64, V=64, state=True, dtype="float32")
    x = to_torch(inputs, dtype="bfloat16", device=device)
    state = x.pop("initial_state")
    want = on_parts(torch.clone, state)
    axes = find(name).inputs
    token = {n: t[:, 0].clone() if "T" in axes[n].split() else t for n, t in x.items()}
    step = importlib.import_module(f"effattn_lite.ops.{name}").step

    def run(place):
        return step(**token, state=place, out_state=place, impl="triton", **options(name))

    for _ in range(3):
        expected, _ = run(want)
    spare = on_parts(torch.clone, state)
    run(spare)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = run(state)
    for _ in range(3):
        graph.replay()
    assert relative_error((o, *state), (expected, *want)) < 1e-5
