"""The mLSTM engine: odd sizes, segments, packed, strong gates, compiled, in place."""

import numpy as np
import pytest
import torch

from effattn_lite.ops.mlstm import mlstm, step
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

DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(*, N=1, **sizes):
    """Inputs of one text, with the states of N."""
    sizes = dict(B=1, H=2, K=16, V=16, state=True, dtype="float32") | sizes
    inputs = make_inputs("mlstm", **sizes)
    inputs["initial_state"] = make_inputs("mlstm", **sizes | dict(B=N, T=1))["initial_state"]
    return inputs


def both(inputs, *, impl, dtype, device, edges=None, **options):
    """Outputs, and gradients of all inputs from fixed cotangents on o and the final state."""
    x = to_torch(inputs, dtype=dtype, device=device, requires_grad=True)
    cu_seqlens = None if edges is None else torch.tensor(edges, device=device)
    out = flat(run_op("mlstm", x, impl=impl, cu_seqlens=cu_seqlens, **options))
    rng = np.random.default_rng(3)
    dout = [torch.tensor(np.round(rng.normal(size=y.shape) * 8) / 8).to(y) for y in out]
    grads = torch.autograd.grad(out, flat(tuple(x.values())), dout)
    names = ("q", "k", "v", "i", "f", *(("C0", "n0", "m0") if "initial_state" in x else ()))
    return dict(zip(("o", "C", "n", "m", *("d" + n for n in names)), (*out, *grads), strict=True))


def hold(inputs, *, device, dtype="float32", edges=None):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    want = both(inputs, impl="torch", dtype="float64", device="cpu", edges=edges)
    plain = both(inputs, impl="torch", dtype=dtype, device=device, edges=edges)
    got = both(inputs, impl="triton", dtype=dtype, device=device, edges=edges)
    terms = max(inputs["k"].shape[-1], inputs["v"].shape[-1])
    for what in want:
        factor = 3.0 if what[0] == "d" else 2.0
        limit = budget(want[what].detach(), plain[what].detach(), dtype, factor=factor, terms=terms)
        error = max_error(got[what], want[what])
        assert error <= limit, f"{what}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.parametrize("T, K, V", ((1, 16, 16), (17, 100, 36), (65, 20, 100), (64, 8, 8)))
def test_sizes(T, K, V, device):
    hold(draw(T=T, K=K, V=V), device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(dtype, device):
    """One long sequence is cut, so states, stabilisers and gradients cross from segment to segment."""
    hold(draw(T=270, H=4, dtype=dtype), device=device, dtype=dtype)


@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 300]))
def test_packed(edges, device):
    hold(draw(N=len(edges) - 1, T=edges[-1], H=1), device=device, edges=edges)


def test_gates_that_jump(device):
    """Gates of -30 to 30 at random: the largest weight moves to and fro, over segments too."""
    inputs = draw(T=200, H=2)
    # a denominator that cancels would leave no digit to compare
    inputs["q"], inputs["k"] = abs(inputs["q"]), abs(inputs["k"])
    rng = np.random.default_rng(5)
    inputs["i"] = np.float32(rng.uniform(-30, 30, inputs["i"].shape))
    inputs["f"] = np.float32(rng.uniform(-10, 30, inputs["f"].shape))
    hold(inputs, device=device)


@pytest.mark.parametrize("first", (0, 100))
def test_the_final_stabiliser_finds_its_token(first, device):
    """m_T comes from one gate, in any segment, or from the initial m: so does its gradient."""
    inputs = draw(T=150, H=1, N=1)
    inputs["f"][:] = 20.0
    C, n, m = inputs["initial_state"]
    if first:
        inputs["i"][:, first] = 9.0
    else:
        inputs["initial_state"] = C, n, m + 9
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    *_, m = flat(run_op("mlstm", x, impl="triton"))
    di, df, *_, dm0 = torch.autograd.grad(m.sum(), (x["i"], x["f"], *x["initial_state"]))
    share = torch.sigmoid(-x["f"].detach())
    after = torch.arange(150, device=device)[:, None] > (first if first else -1)
    assert relative_error(df, share * after) < 1e-5
    assert di.sum().item() == pytest.approx(float(first > 0)) and di.count_nonzero() == (first > 0)
    assert dm0.item() == pytest.approx(float(first == 0), abs=1e-5)


def test_gradient_of_the_forget_gate_over_a_long_text(device):
    """Open gates: a plain sum of q . dq - k . dk over T would leave few digits in 16 bits."""
    inputs = draw(T=400, H=1, dtype="float16")
    inputs["f"][:] = 8.0
    hold(inputs, device=device, dtype="float16")


def test_chunk_size(device):
    inputs = draw(T=70, H=1)
    one, other = (both(inputs, impl="triton", dtype="float32", device=device, chunk_size=C) for C in (16, 64))
    for what in one:
        assert relative_error(one[what].detach(), other[what].detach()) < 1e-5, what
    with pytest.raises(NotImplementedError, match="chunk_size a power of two from 16, got 24"):
        both(inputs, impl="triton", dtype="float32", device=device, chunk_size=24)


def _arguments(device, *, packed):
    x = to_torch(draw(T=20, N=2 if packed else 1), dtype="float32", device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 7, 20], device=device) if packed else None
    return flat(tuple(x.values())), cu_seqlens


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed, device):
    """torch's own checks of an operator: schema, fake tensors, autograd, tracing with dynamic shapes."""
    tensors, cu_seqlens = _arguments(device, packed=packed)
    torch.library.opcheck(torch.ops.effattn_lite.mlstm, (*tensors, cu_seqlens, 0.25, True, None))
    x = [t.detach()[:, 0] for t in tensors[:5]]
    state = [torch.randn(1, 2, *shape, device=device) for shape in ((16, 16), (16,), ())]
    out = [torch.empty_like(part) for part in state]
    torch.library.opcheck(torch.ops.effattn_lite.mlstm_step, (*x, *state, *out, 0.25))


def test_compiles_with_gradients(device):
    """torch.compile keeps one graph through packed sequences, forward and backward."""
    tensors, cu_seqlens = _arguments(device, packed=True)

    def loss(q, k, v, i, f, *state):
        o, final = mlstm(
            q, k, v, i=i, f=f, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
            impl="triton",
        )  # fmt: skip
        return o.square().sum() + sum(part.sum() for part in final)

    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert relative_error(got, want) < 1e-6


def test_steps_in_place(device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    inputs = draw(T=9, K=20, V=36)
    want = run_op("mlstm", to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    for t in range(9):
        token = {name: part[:, t] for name, part in x.items()}
        o, after = step(**token, state=state, out_state=state, impl="triton")
        assert after is state and relative_error(o, want[0][:, t]) < 1e-5
    assert launches == ["mlstm_step_kernel"] * 9
    assert relative_error(state, want[1]) < 1e-5


def test_step_refuses_to_lose_a_gradient(device):
    x = to_torch(draw(T=1), dtype="float32", device=device, requires_grad=True)
    state = x.pop("initial_state")
    with pytest.raises(NotImplementedError, match="no gradient"):
        step(**{name: part[:, 0] for name, part in x.items()}, state=state, impl="triton")


def test_no_launch_of_what_is_not_needed(device, launches):
    """A short text is one segment: one launch forward, five back."""
    inputs = make_inputs("mlstm", B=1, T=40, H=1, K=16, V=16, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device)
    assert not mlstm(**x, impl="triton")[0].requires_grad and launches == ["mlstm_forward_kernel"]
    launches.clear()
    x["q"].requires_grad_()
    mlstm(**x, impl="triton")[0].sum().backward()
    gradients = ["mlstm_gradient_kernel"] * 3
    assert launches == ["mlstm_forward_kernel", "mlstm_rows_kernel", *gradients, "mlstm_gates_kernel"]


def test_same_bits_from_run_to_run(device):
    inputs = draw(T=200)
    one, other = (both(inputs, impl="triton", dtype="float32", device=device) for _ in "12")
    assert all(torch.equal(one[what], other[what]) for what in one)


@pytest.mark.gpu
@pytest.mark.parametrize("K", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_of_the_table(K, dtype, device):
    hold(draw(T=700, H=8, K=K, V=K, dtype=dtype), device=device, dtype=dtype)


@pytest.mark.gpu
def test_step_replays_as_a_graph(device):
    x = to_torch(draw(T=1, K=64, V=64), dtype="bfloat16", device=device)
    state = on_parts(torch.zeros_like, x.pop("initial_state"))
    token = {name: part[:, 0] for name, part in x.items()}
    step(**token, state=state, out_state=state, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(**token, state=state, out_state=state, impl="triton")
    for part in state:
        part.zero_()
    graph.replay()
    want = step(**token, state=on_parts(torch.zeros_like, state), impl="triton")[1]
    assert relative_error(state, want) < 1e-6
