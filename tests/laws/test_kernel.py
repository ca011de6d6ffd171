"""Laws of the kernels: `impl="triton"` on the GPU, or in Triton's interpreter.

The budget is derived: a kernel may be twice as wrong as plain torch in the same dtype, both against float64,
its gradients three times. Every `empty` is full of NaN meanwhile, and the launch is seen to happen.
"""

import importlib

import numpy as np
import pytest
import torch
from cases import cases, causal, changed, repeated, stateful, stressed, tokens

from effattn_lite.testing import budget, flat, max_error, on_parts, run_op, to_torch

CUDA = torch.cuda.is_available()
# bfloat16 products are wrong in the interpreter
DTYPES = ("float32", "float16", *(("bfloat16",) if CUDA else ()))
ODD = dict(B=2, T=63, H=2, K=32, V=48)
LONG = dict(B=1, T=150, H=1, K=16, V=16)
EDGES = (dict(B=1, T=1, H=1, K=16, V=16), dict(B=1, T=20, H=2, K=20, V=36))
PACKED = dict(B=1, T=90, H=2, K=16, V=16)
SMALL = dict(B=2, T=33, H=2, K=16, V=16)
GROUPED = dict(B=1, T=40, H=4, HKV=2, HV=8, K=16, V=16)

pytestmark = pytest.mark.usefixtures("nan_empty")


def run(case, inputs, *, impl, dtype, device="cpu", **more):
    """Named results of one call: o, the state or lse, and all inputs' gradients from fixed cotangents."""
    owed = case.row.differentiable
    tensors = to_torch(inputs, dtype=dtype, device=device, requires_grad=owed)
    more = {name: torch.as_tensor(x, dtype=torch.int32, device=device) for name, x in more.items()}
    o, other = run_op(case.name, tensors, impl=impl, **case.options, **more)
    found = {"o": o} | {
        f"{'state' if case.row.stateful else 'lse'} {i}": x for i, x in enumerate(flat(other))
    }
    if owed:
        rng = np.random.default_rng(7)
        # drawn on a grid that every dtype holds
        cotangents = [torch.tensor(np.round(rng.normal(size=x.shape) * 8) / 8).to(x) for x in found.values()]
        wanted = [(name, x) for name in tensors for x in flat(tensors[name])]
        grads = torch.autograd.grad(list(found.values()), [x for _, x in wanted], cotangents)
        found |= {f"d{name} {i}": grad for i, ((name, _), grad) in enumerate(zip(wanted, grads, strict=True))}
    return found


def hold_all(case, inputs, device, launches, **more):
    """Run three ways, and hold every result of the kernel to its budget."""
    want = run(case, inputs, impl="torch", dtype="float64", **more)
    plain = run(case, inputs, impl="torch", dtype=case.dtype, device=device, **more)
    assert not launches
    got = run(case, inputs, impl="triton", dtype=case.dtype, device=device, **more)
    assert launches, "no kernel was launched"
    assert got["o"].dtype == getattr(torch, case.dtype)
    # where attention differentiates a score, two numbers as large as the largest gradient are subtracted
    largest = max((max_error(x, 0 * x) for name, x in want.items() if name[0] == "d"), default=0.0)
    for what in got:
        magnitude = largest if what[:2] in ("dq", "dk") and not case.row.stateful else 0.0
        hold(got[what], want[what], plain[what], case, what, magnitude)


def hold(got, want, plain, case, what, magnitude=0.0):
    """Twice plain torch's error for outputs, three times for gradients."""
    factor, terms = 3.0 if what.startswith("d") else 2.0, max(case.sizes["K"], case.sizes["V"])
    error = max_error(got, want)
    limit = budget(want, plain, case.dtype, factor=factor, magnitude=magnitude, terms=terms)
    assert error <= limit, f"{what}: error {error:.2e}, budget {limit:.2e}"


RUNS = cases("kernel", sizes=(ODD,), dtypes=DTYPES) + cases(
    "kernel", sizes=(LONG, *EDGES, GROUPED), dtypes=("float32",)
)
HARD = cases(
    "kernel", stressed, sizes=(ODD,), hard=("weak", "strong", "zero", "repeated"), dtypes=("float32",)
)


@pytest.mark.parametrize("case", RUNS + HARD)
def test_outputs_and_gradients(case, device, launches):
    hold_all(case, case.inputs(), device, launches)


@pytest.mark.parametrize("case", cases("kernel", sizes=(PACKED,), dtypes=("float32",)))
def test_packed_sequences(case, device, launches):
    """Sequences laid end to end, one of them empty, one longer than a chunk."""
    edges = [0, 0, 70, 71, 90]
    inputs = case.inputs(state=False)
    if case.row.stateful:
        inputs["initial_state"] = case.inputs(B=len(edges) - 1)["initial_state"]
    hold_all(case, inputs, device, launches, cu_seqlens=edges)


@pytest.mark.parametrize("case", cases("kernel", causal, sizes=(SMALL,), dtypes=("float32",)))
def test_causality(case, device):
    inputs, t = case.inputs(), 20

    def outputs(values):
        return run_op(
            case.name, to_torch(values, dtype=case.dtype, device=device), impl="triton", **case.options
        )[0]

    before, after = outputs(inputs), outputs(changed(case, inputs, t))
    assert max_error(after[:, :t], before[:, :t]) == 0
    assert max_error(after[:, t], before[:, t]) > 1e-4


@pytest.mark.parametrize("case", cases("kernel", sizes=(SMALL,), dtypes=("float32",)))
def test_strides(case, device):
    tensors = to_torch(case.inputs(), device=device, dtype=case.dtype)
    want = run_op(case.name, tensors, impl="triton", **case.options)[0]
    # heads before tokens in memory, and a batch row seen twice
    turned = {n: on_parts(turn, x) for n, x in tensors.items()}
    assert max_error(run_op(case.name, turned, impl="triton", **case.options)[0], want) == 0
    twice = {n: on_parts(repeated(case, n), x) for n, x in tensors.items()}
    assert max_error(run_op(case.name, twice, impl="triton", **case.options)[0][1], want[0]) == 0


def turn(x):
    """The same tensor with its second and third axis exchanged in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x


@pytest.mark.parametrize("case", cases("kernel", stateful, sizes=(ODD,), dtypes=("float32",)))
def test_step(case, device, launches):
    """One token in the kernel equals one token in torch."""
    step = importlib.import_module(f"effattn_lite.ops.{case.name}").step
    inputs = case.inputs()
    state = inputs.pop("initial_state")

    def one(impl, dtype, where="cpu"):
        tensors = to_torch(inputs | {"initial_state": state}, dtype=dtype, device=where)
        begin = tensors.pop("initial_state")
        return step(**tokens(case, tensors, 0), state=begin, impl=impl, **case.options)

    want, plain, got = (
        one("torch", "float64"),
        one("torch", case.dtype, device),
        one("triton", case.dtype, device),
    )
    assert launches, "no kernel was launched"
    for g, w, p in zip(flat(got), flat(want), flat(plain), strict=True):
        hold(g, w, p, case, "step")


@pytest.mark.parametrize(
    "case", cases("kernel", sizes=(dict(B=1, T=21, H=2, K=16, V=16),), dtypes=("float32",))
)
def test_compiles_as_one_graph(case, device):
    """torch.compile sees one operator, and its shapes without running it."""
    op = getattr(importlib.import_module(f"effattn_lite.ops.{case.name}"), case.name)
    tensors = to_torch(case.inputs(), device=device, dtype=case.dtype)
    torch._dynamo.reset()  # a limit on recompilations counts all cases of the law
    traced = torch.compile(
        lambda **x: op(**x, **case.options, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    got, want = traced(**tensors), op(**tensors, **case.options, impl="triton")
    assert max_error(flat(got)[0], flat(want)[0]) < 1e-5
