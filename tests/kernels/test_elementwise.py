"""The element-wise engine: odd sizes, many segments, packed, hostile keys, compiled, in place."""

import importlib

import numpy as np
import pytest
import torch

from effattn_lite.testing import (
    budget,
    flat,
    make_inputs,
    max_error,
    on_parts,
    relative_error,
    run_op,
    to_torch,
)

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.kernels.elementwise_launch import Launcher  # noqa: E402
from effattn_lite.ops.hgrn import hgrn, step  # noqa: E402
from effattn_lite.ops.rwkv4 import rwkv4  # noqa: E402

NAMES = ("hgrn", "rwkv4", "aft")
DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


def both(name, inputs, *, impl, dtype, device, edges=None):
    """Outputs, and gradients of all inputs from fixed cotangents on o and the final state."""
    x = to_torch(inputs, dtype=dtype, device=device, requires_grad=True)
    cu_seqlens = None if edges is None else torch.tensor(edges, device=device)
    out = flat(run_op(name, x, impl=impl, cu_seqlens=cu_seqlens))
    rng = np.random.default_rng(3)
    dout = [torch.tensor(np.round(rng.normal(size=y.shape) * 8) / 8).to(y) for y in out]
    leaves = flat(tuple(x.values()))
    return tuple(y.detach() for y in out), torch.autograd.grad(out, leaves, dout)


def hold(name, inputs, *, device, dtype="float32", edges=None):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    want = both(name, inputs, impl="torch", dtype="float64", device="cpu", edges=edges)
    plain = both(name, inputs, impl="torch", dtype=dtype, device=device, edges=edges)
    got = both(name, inputs, impl="triton", dtype=dtype, device=device, edges=edges)
    for part, factor in ((0, 2.0), (1, 3.0)):
        for i, (g, w, p) in enumerate(zip(got[part], want[part], plain[part], strict=True)):
            # a sum over T tokens is rounded T times
            limit = budget(w, p, dtype, factor=factor, terms=inputs[min(inputs, key=len)].shape[1])
            error = max_error(g, w)
            assert error <= limit, f"{'od'[part]} {i}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T, D", ((1, 1), (17, 100), (48, 7), (16, 64)))
def test_sizes(name, T, D, device):
    hold(name, make_inputs(name, B=2, T=T, D=D, state=True, dtype="float32"), device=device)


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_segments(name, dtype, device):
    """One long text is cut into more segments than are joined at a time."""
    inputs = make_inputs(name, B=1, T=290, D=8, state=True, dtype=dtype)
    run = Launcher(torch.empty(1, 290, 8, device=device), None)
    assert run.segments > 2 * run.tiles["BJ"]
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 100, 130], [*range(0, 21)]), ids=str)
def test_packed(name, edges, device):
    inputs = make_inputs(name, B=1, T=edges[-1], D=20, dtype="float32")
    state = make_inputs(name, B=len(edges) - 1, T=1, D=20, state=True, dtype="float32")["initial_state"]
    hold(name, inputs | {"initial_state": state}, device=device, edges=edges)


@pytest.mark.parametrize("lengths", ([5], [16], [0, 7], [0, 0, 33, 0, 17]), ids=str)
def test_every_segment_has_a_program(lengths, device):
    """The bound on the number of segments, found without reading the edges, is never too low."""
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], device=device)
    run = Launcher(torch.empty(1, sum(lengths), 8, device=device), cu_seqlens)
    assert run.segments >= sum(max(1, -(-n // run.L)) for n in lengths)


@pytest.mark.parametrize("g", (0.0, -1e-6, -50.0, -1e4))
def test_leaks_of_any_strength(g, device):
    """Channels that keep all and channels that keep nothing, side by side, token by token."""
    inputs = make_inputs("hgrn", B=1, T=100, D=32, state=True, dtype="float32")
    inputs["g"][:, ::3, ::2] = g
    hold("hgrn", inputs, device=device)


@pytest.mark.parametrize("shift", (-500.0, 500.0))
def test_keys_that_would_overflow(shift, device):
    """e^500 leaves float32, and e^-500 vanishes in it: outputs do not see a constant on all keys."""
    inputs = make_inputs("rwkv4", B=1, T=60, D=16, dtype="float32")
    want = rwkv4(**to_torch(inputs))[0]
    x = to_torch(inputs | {"k": inputs["k"] + np.float32(shift)}, dtype="float32", device=device)
    got = rwkv4(**x, impl="triton")[0]
    # the shift itself costs digits of the keys
    assert relative_error(got, want) < 2 * 500 * 2.0**-23


def test_a_zero_state_has_no_exponent(device):
    """(0, 0, 0) is an empty past, though e^0 is far above the keys here; gradients stay finite."""
    inputs = make_inputs("rwkv4", B=1, T=40, D=16, dtype="float32")
    inputs["k"] -= 300
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    zeros = tuple(torch.zeros(1, 16, device=device, requires_grad=True) for _ in range(3))
    o, state = rwkv4(**x, initial_state=zeros, output_final_state=True, impl="triton")
    want = rwkv4(**to_torch(inputs), output_final_state=True)
    assert relative_error((o.detach(), *(s.detach() for s in state)), (want[0], *want[1])) < 1e-4
    (o.sum() + sum(s.sum() for s in state)).backward()
    assert all(t.grad.isfinite().all() for t in (*x.values(), *zeros))


def test_a_loud_token_takes_over(device):
    """A key of 80 among zeros: from its token on every output is its value, until it has faded."""
    inputs = make_inputs("rwkv4", B=1, T=90, D=8, hard="zero", dtype="float32")
    inputs["k"][:, 30] = 80
    inputs["g"][:] = -0.5
    o = rwkv4(**to_torch(inputs, dtype="float32", device=device), impl="triton")[0]
    loud = torch.tensor(inputs["v"][:, 30:31])
    assert relative_error(o[:, 31:60].cpu(), loud.expand(1, 29, 8)) < 1e-6
    hold("rwkv4", inputs, device=device)


def test_gradient_of_g_over_a_long_text(device):
    """Without decay a sum over T steps of nearly equal numbers would leave few digits of dg in 16 bits."""
    inputs = make_inputs("rwkv4", B=1, T=200, D=8, hard="weak", state=True, dtype="float16")
    hold("rwkv4", inputs, device=device, dtype="float16")


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_bit_identical(name, device):
    inputs = make_inputs(name, B=2, T=70, D=40, state=True, dtype="float32")
    one, other = (both(name, inputs, impl="triton", dtype="float32", device=device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


def _arguments(name, device, *, packed):
    x = to_torch(make_inputs(name, B=1, T=20, D=16), dtype="float32", device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 7, 20], device=device) if packed else None
    state = make_inputs(name, B=1 + packed, T=1, D=16, state=True, dtype="float32")["initial_state"]
    return x, on_parts(lambda part: torch.tensor(part, device=device), state), cu_seqlens


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed, device):
    """torch's own checks of the operators: schema, fake tensors, autograd, tracing with dynamic shapes."""
    operators, check = torch.ops.effattn_lite, torch.library.opcheck
    x, state, cu_seqlens = _arguments("hgrn", device, packed=packed)
    check(operators.leak, (*x.values(), state.requires_grad_(), cu_seqlens, True))
    token = [t.detach()[:, 0] for t in x.values()]
    check(operators.leak_step, (*token, torch.randn(1, 16, device=device), torch.empty(1, 16, device=device)))
    x, state, cu_seqlens = _arguments("rwkv4", device, packed=packed)
    check(operators.average, (*x.values(), torch.stack(state).requires_grad_(), cu_seqlens, True))
    k, v, g, u = (t.detach() for t in x.values())
    places = [torch.empty(1, 16, device=device) for _ in range(3)]
    check(operators.average_step, (k[:, 0], v[:, 0], g, u, *(s[:1] for s in state), *places))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_with_gradients(name, device):
    """torch.compile keeps one graph through packed sequences, forward and backward."""
    x, state, cu_seqlens = _arguments(name, device, packed=True)
    leaves = [*x.values(), *(s.requires_grad_() for s in flat(state))]
    op = getattr(importlib.import_module(f"effattn_lite.ops.{name}"), name)

    def loss(*values):
        parts = iter(values)
        inputs = {n: next(parts) for n in x} | {"initial_state": on_parts(lambda _: next(parts), state)}
        o, S = op(**inputs, output_final_state=True, cu_seqlens=cu_seqlens, impl="triton")
        return o.square().sum() + sum(part.sum() for part in flat(S))

    torch._dynamo.reset()
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_place(name, device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    inputs = make_inputs(name, B=2, T=9, D=300, state=True, dtype="float32")
    want = run_op(name, to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    one = importlib.import_module(f"effattn_lite.ops.{name}").step
    for t in range(9):
        token = {n: a[:, t] if a.ndim == 3 else a for n, a in x.items()}
        o, after = one(**token, state=state, out_state=state, impl="triton")
        assert relative_error(o, want[0][:, t]) < 1e-5
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(flat(after), flat(state), strict=True))
    assert launches == ["leak_step_kernel" if name == "hgrn" else "average_step_kernel"] * 9
    assert relative_error(state, want[1]) < 1e-5


def test_step_refuses_to_lose_a_gradient(device):
    x = torch.ones(1, 4, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        step(x, g=-x.detach(), state=x.detach(), impl="triton")


def test_no_launch_of_what_is_not_needed(device, launches):
    """A short text is one segment: one launch forward, one back; a state is stored if asked for."""
    x = to_torch(make_inputs("hgrn", B=1, T=12, D=8), dtype="float32", device=device, requires_grad=True)
    o, state = hgrn(**x, impl="triton")
    assert launches == ["leak_read_kernel"] and state is None
    o.sum().backward()
    assert launches == ["leak_read_kernel", "leak_gradient_kernel"]
    launches.clear()
    x = to_torch(make_inputs("rwkv4", B=1, T=12, D=8), dtype="float32", device=device, requires_grad=True)
    rwkv4(**x, impl="triton")[0].sum().backward()
    assert launches == ["average_read_kernel"] * 2 + ["average_gradient_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", (None, "strong", "weak"))
@pytest.mark.parametrize("T, D", ((700, 2048), (5000, 130), (2048, 257)))
def test_real_sizes(name, dtype, hard, T, D, device):
    inputs = make_inputs(name, B=2, T=T, D=D, state=True, dtype=dtype, hard=hard)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.gpu
def test_step_replays_as_a_graph(device):
    x, g = torch.randn(2, 64, device=device), torch.full((2, 64), -0.1, device=device)
    state = torch.zeros(2, 64, device=device)
    step(x, g=g, state=state, out_state=state, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = step(x, g=g, state=state, out_state=state, impl="triton")
    state.zero_()
    graph.replay()
    graph.replay()
    assert relative_error(state, x * (1 + g.exp())) < 1e-5 and relative_error(o, state) == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(device):
    """T D past 2^31: the last tokens equal those of a short text, since g = -1 forgets the rest."""
    T, D = 2**20 + 100, 2048
    x, g = torch.randn(1, T, D, dtype=torch.bfloat16, device=device), torch.tensor(-1.0, device=device)
    g = g.to(x.dtype).expand(1, T, D)
    whole = hgrn(x, g=g, output_final_state=True, impl="triton")
    tail = hgrn(x[:, -256:], g=g[:, -256:], output_final_state=True, impl="triton")
    assert relative_error(whole[0][:, -64:], tail[0][:, -64:]) < 1e-2
    assert relative_error(whole[1], tail[1]) < 1e-4
    g = torch.full((D,), -1.0, device=device)
    whole, tail = (rwkv4(x[:, -n:], x[:, -n:], g=g, u=g, impl="triton")[0] for n in (T, 256))
    assert relative_error(whole[:, -64:], tail[:, -64:]) < 1e-2
