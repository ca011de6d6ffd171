"""The engine of memory slots: odd sizes, more slots than a tile, gates and controls of all strengths."""

import importlib

import numpy as np
import pytest
import torch

from effattn_lite.testing import (
    budget,
    flat,
    make_inputs,
    max_error,
    relative_error,
    run_op,
    run_reference,
    to_torch,
)

pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
from effattn_lite.ops.abc import abc  # noqa: E402

NAMES = ("gsa", "abc")
DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))
GATES = (0.0, -1e-6, -1.0, -20.0, -200.0)
CONTROLS = (-300.0, -20.0, 0.0, 3.0, 300.0)

pytestmark = pytest.mark.usefixtures("nan_empty")


def both(name, inputs, *, impl, dtype, device, edges=None, **options):
    """Outputs, and gradients of all inputs from fixed cotangents on o and the final state."""
    x = to_torch(inputs, dtype=dtype, device=device, requires_grad=True)
    cu_seqlens = None if edges is None else torch.tensor(edges, device=device)
    out = flat(run_op(name, x, impl=impl, cu_seqlens=cu_seqlens, **options))
    rng = np.random.default_rng(3)
    dout = [torch.tensor(np.round(rng.normal(size=y.shape) * 8) / 8).to(y) for y in out]
    grads = torch.autograd.grad(out, flat(tuple(x.values())), dout)
    names = [f"out {i}" for i in range(len(out))] + [f"d{n} {i}" for n in x for i in range(len(flat(x[n])))]
    return dict(zip(names, (*out, *grads), strict=True))


def hold(name, inputs, *, device, dtype="float32", edges=None):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    how = dict(edges=edges)
    want = both(name, inputs, impl="torch", dtype="float64", device="cpu", **how)
    plain = both(name, inputs, impl="torch", dtype=dtype, device=device, **how)
    got = both(name, inputs, impl="triton", dtype=dtype, device=device, **how)
    terms = max(inputs["q"].shape[-1], inputs["v"].shape[-1])
    for what in want:
        factor = 3.0 if what[0] == "d" else 2.0
        limit = budget(want[what], plain[what], dtype, factor=factor, terms=terms)
        error = max_error(got[what], want[what])
        assert error <= limit, f"{what}: error {error:.2e}, budget {limit:.2e}"


def mixed(name, inputs):
    """Gates or controls that differ from slot to slot, and every nine tokens."""
    tensor, values = ("g", GATES) if name == "gsa" else ("s", CONTROLS)
    b, t, *rest = np.indices(inputs[tensor].shape)
    chosen = np.take(values, (b + t // 9 + sum(rest)) % len(values))
    return inputs | {tensor: chosen.astype(inputs[tensor].dtype)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T, K, V, M", ((1, 16, 16, 1), (17, 100, 36, 5), (65, 20, 100, 40)))
def test_sizes(name, T, K, V, M, device):
    """40 slots are more than a tile of 32 holds: their softmax is a launch of its own."""
    hold(name, make_inputs(name, B=1, T=T, H=2, K=K, V=V, M=M, state=True, dtype="float32"), device=device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(name, dtype, device):
    """One long sequence is cut, so states and gradients of both passes cross from segment to segment."""
    inputs = make_inputs(name, B=1, T=200, H=1, K=16, V=16, M=8, state=True, dtype=dtype)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_side_by_side(name, dtype, device):
    """Slots that keep all and slots that keep nothing, changing from slot to slot and inside a chunk."""
    inputs = mixed(name, make_inputs(name, B=1, T=80, H=2, K=16, V=16, M=8, state=True, dtype=dtype))
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 170]))
def test_packed(name, edges, device):
    sizes = dict(H=1, K=16, V=16, M=8, state=True, dtype="float32")
    inputs = make_inputs(name, B=1, T=edges[-1], **sizes)
    inputs["initial_state"] = make_inputs(name, B=len(edges) - 1, T=1, **sizes)["initial_state"]
    hold(name, inputs, device=device, edges=edges)


def shares_by_hand(s):
    """Every token's share of the running sum of e^s, and the log of the rest of it, in float64."""
    z = np.logaddexp.accumulate(s.astype(float), axis=1)
    odds = s - np.concatenate((np.full_like(z[:, :1], -np.inf), z[:, :-1]), axis=1)
    return 1 / (1 + np.exp(-odds)), -np.logaddexp(0, odds), z[:, -1]


def test_shares_keep_their_digits(device):
    """The 600th token of equal weight has a share of 1 / 600, and log(1 - share) is right to float32."""
    rng = np.random.default_rng(0)
    s = np.round(rng.normal(size=(1, 600, 2, 5)), 3).astype(np.float32)
    s[..., 1] = -7.0
    s[..., 2] = np.where(np.arange(600) % 50 == 7, 15.0, -15.0)[None, :, None]
    z, c = torch.zeros(1, 2, 5, device=device), torch.zeros(1, 2, device=device)
    w, g, last = torch.ops.effattn_lite.slots_shares(torch.tensor(s, device=device), z, c, None)
    share, rest, total = shares_by_hand(s)
    # every number, not the largest alone; z is right to some 2^-24 of 17, and so is a share's logarithm
    assert max_error(w.cpu() / torch.tensor(share), np.ones_like(share)) < 2e-5
    assert max_error(g[:, 1:].cpu() / torch.tensor(rest[:, 1:]), np.ones_like(rest[:, 1:])) < 2e-5
    assert relative_error(last, total) < 1e-6
    assert g[:, 0].exp().max() == 0


def test_an_empty_state_has_no_weight(device):
    """c = 0: whatever K~, V~ and z hold is not read, and gets no gradient through z."""
    x = make_inputs("abc", B=1, T=20, H=2, K=16, V=16, M=8, dtype="float32")
    want = run_reference("abc", x)
    tensors = to_torch(x, dtype="float32", device=device)
    state = [torch.zeros(1, 2, *n, device=device) for n in ((16, 8), (8, 16), (8,), ())]
    state[2] = torch.full_like(state[2], 50.0, requires_grad=True)
    o, last = abc(**tensors, initial_state=tuple(state), output_final_state=True, impl="triton")
    assert relative_error((o.detach(), *(part.detach() for part in last)), (want[0], *want[1])) < 1e-5
    assert float(torch.autograd.grad(o.sum(), state[2])[0].abs().max()) == 0


def test_one_run_is_as_another(device):
    inputs = make_inputs("abc", B=1, T=150, H=1, K=16, V=16, M=8, state=True, dtype="float16")
    one, other = (both("abc", inputs, impl="triton", dtype="float16", device=device) for _ in range(2))
    assert all(torch.equal(one[what], other[what]) for what in one)


def test_no_launch_of_what_is_not_needed(device, launches):
    """A short text is one segment: two launches forward; six backward, of which one is the softmax."""
    inputs = make_inputs("gsa", B=1, T=40, H=1, K=16, V=16, M=8, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device)
    o, _ = run_op("gsa", x, impl="triton")
    assert launches == ["slots_score_kernel", "gated_decay_read_kernel"] and not o.requires_grad
    launches.clear()
    x["q"].requires_grad_()
    run_op("gsa", x, impl="triton")[0].sum().backward()
    pair = ["gated_decay_read_kernel", "gated_decay_gradient_kernel"]
    backward = [*pair, "slots_softmax_gradient_kernel", "gated_decay_read_kernel", *pair]
    assert launches[2:] == backward


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_place(name, device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    inputs = make_inputs(name, B=2, T=5, H=2, K=20, V=36, M=12, state=True, dtype="float32")
    want = run_op(name, to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    module = importlib.import_module(f"effattn_lite.ops.{name}")
    for t in range(5):
        token = {n: a[:, t] for n, a in x.items()}
        o, after = module.step(**token, state=state, out_state=state, impl="triton")
        assert after is state and relative_error(o, want[0][:, t]) < 1e-5
    assert launches == ["slots_step_kernel"] * 5
    assert relative_error(state, want[1]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_step_refuses_to_lose_a_gradient(name, device):
    x = to_torch(make_inputs(name, B=1, T=1, H=1, state=True), dtype="float32", device=device)
    state = x.pop("initial_state")
    token = {n: t[:, 0].requires_grad_() for n, t in x.items()}
    module = importlib.import_module(f"effattn_lite.ops.{name}")
    with pytest.raises(NotImplementedError, match="no gradient"):
        module.step(**token, state=state, impl="triton")


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed, device):
    """torch's own checks of the operators: schema, fake tensors, autograd, tracing with dynamic shapes."""
    edges = torch.tensor([0, 7, 20], device=device) if packed else None
    N, sizes = 2 if packed else 1, dict(H=2, K=16, V=16, M=8, state=True, dtype="float32")
    x = to_torch(make_inputs("gsa", B=1, T=20, **sizes), dtype="float32", device=device)
    state = [torch.randn(N, 2, *n, device=device) for n in ((16, 8), (8, 16))]
    x.pop("initial_state")
    tensors = [t.requires_grad_() for t in (*x.values(), *state)]
    torch.library.opcheck(torch.ops.effattn_lite.slots, (*tensors, edges, 0.5, True, None))
    z, c = torch.randn(N, 2, 8, device=device, requires_grad=True), torch.ones(N, 2, device=device)
    torch.library.opcheck(torch.ops.effattn_lite.slots_shares, (x["s"], z, c, edges))
    token = [t[:, 0].detach() for t in x.values()]
    old = [t[:1].detach() for t in (*state, z, c)]
    new = [torch.empty_like(t) for t in old]
    step = torch.ops.effattn_lite.slots_step
    torch.library.opcheck(step, (*token, *old[:2], None, None, *new[:2], None, None, 0.5))
    torch.library.opcheck(step, (*token[:4], None, *old, *new, 0.5))


def test_compiles_with_gradients(device):
    """torch.compile keeps one graph through packed sequences, forward and backward."""
    x = to_torch(make_inputs("abc", B=1, T=20, H=1, K=16, V=16, M=8), dtype="float32", device=device)
    tensors = [t.requires_grad_() for t in x.values()]
    edges = torch.tensor([0, 7, 20], device=device)

    def loss(q, k, v, s):
        o, state = abc(q, k, v, s=s, output_final_state=True, cu_seqlens=edges, impl="triton")
        return o.square().sum() + sum(part.sum() for part in state)

    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert relative_error(got, want) < 1e-6


def test_sizes_that_no_kernel_takes(device):
    x = to_torch(make_inputs("gsa", B=1, T=3, H=1, M=300), dtype="float32", device=device)
    with pytest.raises(NotImplementedError, match="K, V and M <= 256, got 16, 24 and 300"):
        run_op("gsa", x, impl="triton")
    with pytest.raises(NotImplementedError, match="chunk_size a power of two from 16, got 24"):
        run_op("gsa", x | {n: x[n][..., :8] for n in "sg"}, impl="triton", chunk_size=24)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("K, M", ((64, 64), (128, 64), (128, 128), (256, 256), (64, 256)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strong", (False, True))
def test_every_configuration_of_the_table(name, K, M, dtype, strong, device):
    inputs = make_inputs(name, B=1, T=700, H=8, K=K, V=K, M=M, state=True, dtype=dtype)
    hold(name, mixed(name, inputs) if strong else inputs, device=device, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_step_replays_as_a_graph(name, device):
    x = to_torch(make_inputs(name, B=2, T=1, H=2, K=64, V=64, M=64), dtype="bfloat16", device=device)
    token = {n: t[:, 0] for n, t in x.items()}
    shapes = ((64, 64), (64, 64), (64,), ())[: 4 if name == "abc" else 2]
    state = tuple(torch.zeros(2, 2, *n, device=device) for n in shapes)
    step = importlib.import_module(f"effattn_lite.ops.{name}").step

    def run():
        return step(**token, state=state, out_state=state, impl="triton")[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = run()
    for part in state:
        part.zero_()
    want = tuple(part.clone() for part in state)
    for _ in range(3):
        graph.replay()
        expected, want = step(**token, state=want, impl="torch")
        assert relative_error(o, expected) < 1e-2 and relative_error(state, want) < 1e-5


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_offsets_beyond_32_bits(name, device):
    """T H M past 2^31: the last tokens equal those of a short text, since all before is forgotten."""
    T, H, K, M = 2**20 + 100, 16, 16, 128
    q, k, v = (torch.randn(1, T, H, K, dtype=torch.bfloat16, device=device) for _ in range(3))
    s = torch.randn(1, T, H, M, dtype=torch.bfloat16, device=device)
    if name == "gsa":
        x = dict(q=q, k=k, v=v, s=s, g=torch.full((1, T, H, M), -1.0, device=device))
    else:
        # a token of weight e^30 outweighs the million before it
        s[:, -200] = 30.0
        x = dict(q=q, k=k, v=v, s=s)
    whole = run_op(name, x, impl="triton")
    want = run_op(name, {n: t[:, -256:] for n, t in x.items()}, impl="triton")
    assert relative_error(whole[0][:, -64:], want[0][:, -64:]) < 1e-2
    assert relative_error(whole[1][:2], want[1][:2]) < 1e-2
