"""Laws of the ops in plain torch: `impl="torch"`, float64, on the CPU."""

import importlib
import inspect
import re

import pytest
import torch
from cases import (
    SIZES,
    cases,
    causal,
    changed,
    differentiable,
    repeated,
    row_of,
    stateful,
    stressed,
    tokens,
)

from effattn_lite.testing import (
    WIDE,
    budget,
    flat,
    max_error,
    on_parts,
    relative_error,
    run_op,
    run_reference,
    to_torch,
)

RTOL = 1e-10
STRESSES = ("weak", "strong", "zero", "repeated")


def module_of(case):
    return importlib.import_module(f"effattn_lite.ops.{case.name}")


KERNELS = [p.values[0] for p in cases("kernel", dtypes=("float32",))]


def run(case, inputs, **more):
    """The op on NumPy inputs or tensors, with chunks of 16 where it has chunks, so that T holds several."""
    if not isinstance(next(iter(inputs.values())), torch.Tensor):
        inputs = to_torch(inputs)
    takes_chunks = "chunk_size" in inspect.signature(getattr(module_of(case), case.name)).parameters
    chunks = {"chunk_size": 16} if takes_chunks else {}
    return run_op(case.name, inputs, impl="torch", **chunks | dict(case.options) | more)


@pytest.mark.parametrize("case", cases("op", sizes=SIZES) + cases("op", stressed, hard=STRESSES))
def test_equals_reference(case):
    inputs = case.inputs()
    want = run_reference(case.name, inputs, **case.options)
    assert relative_error(run(case, inputs), want) < RTOL


@pytest.mark.parametrize("case", cases("op", dtypes=("float32", "float16", "bfloat16")))
def test_dtypes(case):
    inputs = case.tensors()
    o, other = run(case, inputs)
    assert o.dtype == next(iter(inputs.values())).dtype
    assert all(x.dtype == torch.float32 for x in flat(other))
    want = run_reference(case.name, case.inputs(), **case.options)[0]
    # accumulation is float32, so rounding the right answer is what a half-precision op may lose; in float32
    # a sum over T tokens is rounded T times, and roundings add up as their root
    rounded = torch.tensor(want).to(o.dtype)
    factor = case.sizes["T"] ** 0.5 if o.dtype == torch.float32 else 2.0
    assert max_error(o, want) <= budget(want, rounded, case.dtype, factor=factor)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("empty", ({"T": 0}, {"B": 0}))
@pytest.mark.parametrize("case", cases("op", dtypes=("float32",)))
def test_nothing_in_nothing_out(case, empty, impl, device):
    """No token or no sequence: empty outputs, the state as it came, gradients of the right shapes."""
    if impl == "triton" and case not in KERNELS:
        pytest.skip("no kernel is promised or written for it")
    tensors = case.tensors(device=device, requires_grad=True, **empty)
    o, other = run_op(case.name, tensors, impl=impl, **case.options)
    assert o.shape[:2] == next(iter(tensors.values())).shape[:2] and not o.numel()
    if case.row.stateful:
        assert max_error(other, tensors["initial_state"]) == 0
    if case.row.differentiable:
        (o.sum() + sum(x.sum() for x in flat(other))).backward()
    assert all(x.grad is None or x.grad.shape == x.shape for x in flat(tuple(tensors.values())))


@pytest.mark.parametrize("case", cases("op", causal))
def test_causality(case):
    inputs, t = case.inputs(), 40
    before, after = run(case, inputs)[0], run(case, changed(case, inputs, t))[0]
    assert relative_error(after[:, :t], before[:, :t]) < RTOL
    assert max_error(after[:, t], before[:, t]) > 1e-6


@pytest.mark.parametrize("case", cases("op", stateful, hard=(None, "strong")))
def test_halves(case):
    inputs, t = case.inputs(), 29
    whole, last = run(case, inputs)
    a, state = run(case, tokens(case, inputs, slice(0, t)))
    right = to_torch(tokens(case, inputs, slice(t, None))) | {"initial_state": state}
    b, state = run(case, right)
    assert relative_error((torch.cat((a, b), dim=1), *flat(state)), (whole, *flat(last))) < RTOL


@pytest.mark.parametrize("case", cases("op", stateful))
def test_step(case):
    inputs = to_torch(case.inputs())
    whole, last = run(case, inputs)
    state, step = inputs.pop("initial_state"), module_of(case).step
    start = on_parts(torch.clone, state)
    for t in range(whole.shape[1]):
        o, state = step(**tokens(case, inputs, t), state=state, impl="torch", **case.options)
        assert relative_error(o, whole[:, t]) < RTOL, t
    assert relative_error(state, last) < RTOL
    out = on_parts(torch.clone, start)
    first, same = step(**tokens(case, inputs, 0), state=out, out_state=out, impl="torch", **case.options)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(flat(same), flat(out), strict=True))
    assert relative_error(first, whole[:, 0]) < RTOL and max_error(out, start) > 0


@pytest.mark.parametrize("case", cases("op", stateful))
def test_state_only_on_request(case):
    op, inputs = getattr(module_of(case), case.name), to_torch(case.inputs())
    assert op(**inputs, **case.options, impl="torch")[1] is None


@pytest.mark.parametrize("case", cases("op", lambda case: not case.row.stateful))
def test_lse_only_on_request(case):
    op, inputs = getattr(module_of(case), case.name), to_torch(case.inputs())
    o, lse = run(case, inputs)
    assert torch.equal(op(**inputs, **case.options, impl="torch"), o)
    assert lse.shape == o.shape[:3]


@pytest.mark.parametrize("case", cases("op"))
def test_batch_row(case):
    inputs = case.inputs()
    batch, alone = run(case, inputs)[0], run(case, row_of(case, inputs, 1))[0]
    assert relative_error(alone[0], batch[1]) < RTOL


@pytest.mark.parametrize("case", cases("op"))
def test_strides(case):
    inputs = to_torch(case.inputs())
    want = run(case, inputs)
    strided = {name: on_parts(scattered, x) for name, x in inputs.items()}
    assert relative_error(run(case, strided), want) == 0
    # one batch row, seen twice without a copy
    twice = {name: on_parts(repeated(case, name), x) for name, x in inputs.items()}
    o = run(case, twice)[0]
    assert relative_error(o[1], want[0][0]) < RTOL


@pytest.mark.parametrize("case", cases("op", sizes=(dict(B=1, T=37, H=2, K=8, V=12),)))
def test_packed_sequences(case):
    """Sequences laid end to end give what each gives alone; the empty one passes its state through."""
    edges = [0, 17, 17, 18, 37]
    inputs = case.inputs(state=False)
    if case.row.stateful:
        inputs["initial_state"] = case.inputs(B=len(edges) - 1)["initial_state"]
    packed, other = run(case, inputs, cu_seqlens=torch.tensor(edges))
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = tokens(case, inputs, slice(a, b))
        if case.row.stateful:
            alone["initial_state"] = on_parts(lambda x, n=n: x[n : n + 1], inputs["initial_state"])
            mine = on_parts(lambda x, n=n: x[n : n + 1], other)
            if a == b:
                assert max_error(mine, alone["initial_state"]) == 0
        if a < b:
            o, end = run(case, alone)
            assert relative_error(packed[:, a:b], o) < RTOL
            found = mine if case.row.stateful else other[:, a:b]
            assert relative_error(found, end) < RTOL


@pytest.mark.parametrize("case", cases("op", differentiable, sizes=(dict(B=1, T=6, H=2, K=3, V=2),)))
def test_gradient(case):
    """Central differences in float64, through o and the final state or lse, for every input."""
    tensors = case.tensors(requires_grad=True)
    takes_chunks = "chunk_size" in inspect.signature(getattr(module_of(case), case.name)).parameters
    chunks = {"chunk_size": 4} if takes_chunks else {}

    def function(*values):
        return finite(run(case, like(tensors, values), **chunks))

    assert torch.autograd.gradcheck(function, flat(tuple(tensors.values())))


@pytest.mark.parametrize("case", cases("op", differentiable, sizes=(dict(B=1, T=6, H=2, K=3, V=2),)))
def test_packed_gradient(case):
    tensors = case.tensors(state=False, requires_grad=True)
    edges = torch.tensor([0, 4, 4, 6])

    def function(*values):
        return finite(run(case, like(tensors, values), cu_seqlens=edges))

    assert torch.autograd.gradcheck(function, flat(tuple(tensors.values())))


@pytest.mark.parametrize("case", cases("op", sizes=(dict(B=1, T=9, H=2, K=8, V=8),)))
def test_errors_name_both_sides(case):
    inputs = to_torch(case.inputs(state=False))
    # tensors that must fit the first one: k and v, in most methods
    others = [n for n, axes in case.row.inputs.items() if "T" in axes.split()][1:]

    def raises(error, match, **more):
        with pytest.raises(error, match=match):
            run(
                case,
                inputs | {name: x for name, x in more.items() if name in inputs},
                **{name: x for name, x in more.items() if name not in inputs},
            )

    for name in others[:1]:
        short = inputs[name][:, :8]
        raises(ValueError, rf"{name}.*{re.escape(str(tuple(short.shape)))}.*9", **{name: short})
        raises(ValueError, rf"{name}.*meta.*cpu", **{name: inputs[name].to("meta")})
        if name not in WIDE:
            raises(TypeError, rf"{name}.*float32.*float64", **{name: inputs[name].float()})
    for name in others[-1:]:
        raises(ValueError, rf"{name}.*shape", **{name: inputs[name][0]})
    raises(ValueError, r"cu_seqlens.*T = 9", cu_seqlens=torch.tensor([0, 5, 3, 9]))
    raises(TypeError, r"cu_seqlens.*int32", cu_seqlens=torch.tensor([0.0, 9.0]))
    if case.row.stateful:
        cut = on_parts(lambda x: x[..., :-1], case.tensors()["initial_state"])
        raises(ValueError, r"initial_state.*shape", initial_state=cut)
    op = getattr(module_of(case), case.name)
    with pytest.raises(ValueError, match="impl is 'fast'"):
        op(**inputs, **case.options, impl="fast")
    with pytest.raises(
        TypeError if "kernel" in case.row.rooms else NotImplementedError, match="float64|kernel"
    ):
        op(**inputs, **case.options, impl="triton")


@pytest.mark.parametrize("case", cases("op", sizes=(dict(B=1, T=21, H=2, K=8, V=8),)))
def test_compiles_as_one_graph(case):
    op, inputs = getattr(module_of(case), case.name), to_torch(case.inputs(), dtype="float32")
    torch._dynamo.reset()  # a limit on recompilations counts all cases of the law
    traced = torch.compile(lambda **x: op(**x, **case.options, impl="torch"), fullgraph=True, backend="eager")
    got, want = traced(**inputs), op(**inputs, **case.options, impl="torch")
    assert relative_error(flat(got)[0], flat(want)[0]) < 1e-5


def like(tensors, values):
    """The tensors' names and parts, with other values in them."""
    values = iter(values)
    return {name: on_parts(lambda _: next(values), x) for name, x in tensors.items()}


def finite(out):
    """The parts of an output; an lse of -inf, of a row that sees nothing, has no differences."""
    return tuple(x.masked_fill(x.isneginf(), 0) for x in flat(out))


def scattered(x):
    """The same values with a gap between any two in memory."""
    wide = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]
