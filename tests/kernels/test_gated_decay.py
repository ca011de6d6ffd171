"""The engine of gates that a token chooses: odd sizes, gates of all strengths, packed, cut, compiled."""

import importlib

import numpy as np
import pytest
import torch
from held import both, hold

from effattn_lite.testing import (
    EPS,
    make_inputs,
    max_error,
    relative_error,
    run_op,
    to_numpy,
    to_torch,
)

pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
from effattn_lite.ops.engines import gated_decay  # noqa: E402
from effattn_lite.ops.rwkv6 import rwkv6  # noqa: E402

NAMES = ("mamba2", "gla", "hgrn2", "rwkv6")
DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))
MIXED = (0.0, -1e-6, -1.0, -20.0, -200.0)

pytestmark = pytest.mark.usefixtures("nan_empty")


def with_gates(inputs, gates):
    """Gates that differ from channel to channel, and every nine tokens."""
    b, t, *rest = np.indices(inputs["g"].shape)
    return inputs | {"g": np.take(gates, (b + t // 9 + sum(rest)) % len(gates)).astype(np.float32)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T, K, V", ((1, 16, 16), (17, 100, 36), (65, 20, 100)))
def test_sizes(name, T, K, V, device):
    hold(name, make_inputs(name, B=1, T=T, H=2, K=K, V=V, state=True, dtype="float32"), device=device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(name, dtype, device):
    """One long sequence is cut, so states and gradients cross from segment to segment."""
    inputs = make_inputs(name, B=1, T=200, H=1, K=16, V=16, state=True, dtype=dtype)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_side_by_side(name, dtype, device):
    """0, -1e-6, -1, -20 and -200 nats, changing from channel to channel and in the middle of a chunk."""
    inputs = with_gates(make_inputs(name, B=1, T=80, H=2, K=16, V=16, state=True, dtype=dtype), MIXED)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_gate_may_be_shut_for_good(name, device):
    """g = -inf, as a masked gate is: nothing passes, nothing is NaN, and g's gradient there is 0."""
    inputs = make_inputs(name, B=1, T=40, H=1, K=16, V=16, state=True, dtype="float32")
    inputs["g"][:, 5::7] = -np.inf
    got = both(name, inputs, impl="triton", dtype="float32", device=device)
    inputs["g"][:, 5::7] = -200.0
    want = both(name, inputs, impl="torch", dtype="float64", device="cpu")
    for what in want:
        assert relative_error(got[what].detach(), want[what].detach()) < 1e-5, what
    assert (got["g"][:, 5::7] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 170]))
def test_packed(name, edges, device):
    sizes = dict(H=1, K=16, V=16, state=True, dtype="float32")
    inputs = make_inputs(name, B=1, T=edges[-1], **sizes)
    inputs["initial_state"] = make_inputs(name, B=len(edges) - 1, T=1, **sizes)["initial_state"]
    hold(name, inputs, device=device, edges=edges)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_heads_share_q_and_k(dtype, device):
    inputs = make_inputs("mamba2", B=2, T=70, H=2, HV=6, K=16, V=16, state=True, dtype=dtype)
    hold("mamba2", inputs, device=device, dtype=dtype)


@pytest.mark.parametrize("name", ("mamba2", "gla"))
def test_gradient_of_g_over_a_long_text(name, device):
    """dg is right to half a step of float16, where the sum of q dq - k dk over the rest of a text is not.

    There a pair of tokens that g_t does not lie between is added and taken away, and its rounding stays.
    """
    inputs = make_inputs(name, B=1, T=500, H=1, K=16, V=16, state=True, dtype="float16")
    want = both(name, inputs, impl="torch", dtype="float64", device="cpu")
    got = both(name, inputs, impl="triton", dtype="float16", device=device)
    dg = want["g"].detach()
    half = EPS["float16"] / 2 * float(dg.abs().max())
    assert max_error(got["g"].detach(), dg) < half
    q, k, dq, dk = (torch.tensor(to_numpy(x)) for x in (inputs["q"], inputs["k"], got["q"], got["k"]))
    rest = (q * dq - k * dk).flip(1).cumsum(1).flip(1)
    rest = rest.sum(-1) if name == "mamba2" else rest
    # what the final state adds is the same for every token: taken from the right answer
    assert max_error(rest - rest[:, -1:], dg - dg[:, -1:]) > half


@pytest.mark.parametrize("name", ("mamba2", "rwkv6"))
def test_gradients_over_a_long_text(name, device):
    inputs = make_inputs(name, B=1, T=500, H=1, K=16, V=16, hard="weak", state=True, dtype="float16")
    hold(name, inputs, device=device, dtype="float16")


@pytest.mark.parametrize("name", ("mamba2", "gla"))
def test_chunk_size(name, device):
    inputs = make_inputs(name, B=1, T=70, H=1, K=16, V=16, state=True, dtype="float16")
    one, other = (
        both(name, inputs, impl="triton", dtype="float16", device=device, chunk_size=C) for C in (16, 64)
    )
    for what in one:
        # roundings to 16 bits of numbers that differ in their last bits of 32
        assert relative_error(one[what].detach(), other[what].detach()) < 2e-3, what
    with pytest.raises(NotImplementedError, match="chunk_size a power of two from 16, got 24"):
        both(name, inputs, impl="triton", dtype="float16", device=device, chunk_size=24)


def test_one_run_is_as_another(device):
    inputs = make_inputs("mamba2", B=1, T=150, H=1, HV=2, K=16, V=16, state=True, dtype="float16")
    one, other = (both("mamba2", inputs, impl="triton", dtype="float16", device=device) for _ in range(2))
    assert all(torch.equal(one[what], other[what]) for what in one)


def _arguments(device, *, packed):
    x = to_torch(make_inputs("rwkv6", B=1, T=20, H=2, K=16, V=16), dtype="float32", device=device)
    cu_seqlens = torch.tensor([0, 7, 20], device=device) if packed else None
    h0 = torch.randn(2 if packed else 1, 2, 16, 16, device=device)
    return [t.requires_grad_() for t in (*x.values(), h0)], cu_seqlens


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed, device):
    """torch's own checks of an operator: schema, fake tensors, autograd, tracing with dynamic shapes."""
    tensors, cu_seqlens = _arguments(device, packed=packed)
    torch.library.opcheck(torch.ops.effattn_lite.gated_decay, (*tensors, cu_seqlens, 0.5, True, None))
    x = [t.detach()[:, 0] if t.ndim == 4 and i < 4 else t.detach() for i, t in enumerate(tensors)]
    state = torch.randn(1, 2, 16, 16, device=device)
    step = torch.ops.effattn_lite.gated_decay_step
    torch.library.opcheck(step, (*x[:5], state, torch.empty_like(state), 0.5))


def test_compiles_with_gradients(device):
    """torch.compile keeps one graph through packed sequences, forward and backward."""
    tensors, cu_seqlens = _arguments(device, packed=True)
    names = ("q", "k", "v", "g", "u", "initial_state")

    def loss(*x):
        o, S = rwkv6(
            **dict(zip(names, x, strict=True)), output_final_state=True, cu_seqlens=cu_seqlens, impl="triton"
        )
        return o.square().sum() + S.sum()

    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_place(name, device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    inputs = make_inputs(name, B=2, T=5, H=2, HV=4, K=20, V=36, state=True, dtype="float32")
    want = run_op(name, to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    module = importlib.import_module(f"effattn_lite.ops.{name}")
    for t in range(5):
        token = {n: a[:, t] if n != "u" else a for n, a in x.items()}
        o, after = module.step(**token, state=state, out_state=state, impl="triton")
        assert after is state and relative_error(o, want[0][:, t]) < 1e-5
    assert launches == ["gated_decay_step_kernel"] * 5
    assert relative_error(state, want[1]) < 1e-5


def test_step_refuses_to_lose_a_gradient(device):
    x = to_torch(make_inputs("gla", B=1, T=1, H=1), dtype="float32", device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        gated_decay.gated_decay_step(
            *(t[:, 0] for n, t in x.items() if n != "g"), g=x["g"][:, 0], channel=True, scale=1.0,
            out_state=None, state=torch.zeros(1, 1, 16, 24, device=device), impl="triton",
        )  # fmt: skip


def test_no_launch_of_what_is_not_needed(device, launches):
    """A short text is one segment: one launch forward, two backward."""
    inputs = make_inputs("gla", B=1, T=40, H=1, K=16, V=16, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device)
    o, state = run_op("gla", x, impl="triton")
    assert launches == ["gated_decay_read_kernel"] and not o.requires_grad
    launches.clear()
    x["q"].requires_grad_()
    run_op("gla", x, impl="triton")[0].sum().backward()
    assert launches == ["gated_decay_read_kernel"] * 2 + ["gated_decay_gradient_kernel"]


def test_errors_name_the_gate():
    """A gate a head is no gate a channel, value heads are a multiple of heads."""
    x = to_torch(make_inputs("gla", B=1, T=3, H=2))
    with pytest.raises(ValueError, match=r"g has shape \(1, 3, 2\), expected 4 axes"):
        run_op("gla", x | {"g": x["g"][..., 0]})
    with pytest.raises(ValueError, match=r"v has shape \(1, 3, 1, 24\).*\(1, 3, 2, 24\)"):
        run_op("gla", x | {"v": x["v"][:, :, :1]})
    y = to_torch(make_inputs("mamba2", B=1, T=3, H=2, HV=3))
    with pytest.raises(ValueError, match="v has 3 heads, expected a multiple of q's 2"):
        run_op("mamba2", y)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("mamba2", "gla", "rwkv6"))
@pytest.mark.parametrize("K", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", (None, MIXED))
def test_every_configuration_of_the_table(name, K, dtype, gates, device):
    inputs = make_inputs(name, B=1, T=700, H=8, K=K, V=K, state=True, dtype=dtype)
    hold(name, with_gates(inputs, gates) if gates else inputs, device=device, dtype=dtype)


@pytest.mark.gpu
def test_step_replays_as_a_graph(device):
    x = to_torch(make_inputs("gla", B=2, T=1, H=2, K=64, V=64), dtype="bfloat16", device=device)
    q, k, v, g = (t[:, 0] for t in x.values())
    state = torch.zeros(2, 2, 64, 64, device=device)

    def run():
        return gated_decay.gated_decay_step(
            q, k, v, g=g, channel=True, state=state, scale=1.0, out_state=state, impl="triton"
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = run()
    state.zero_()
    graph.replay()
    once = state.clone()
    graph.replay()
    assert relative_error(state, once * g.exp()[..., None] + once) < 1e-5 and o.isfinite().all()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ("mamba2", "gla"))
def test_offsets_beyond_32_bits(name, device):
    """T H K past 2^31: the last tokens equal those of a short text, since g = -1 forgets the rest."""
    T, H, K = 2**20 + 100, 16, 128
    q, k, v = (torch.randn(1, T, H, K, dtype=torch.bfloat16, device=device) for _ in range(3))
    g = torch.full((1, T, H) if name == "mamba2" else (1, T, H, K), -1.0, device=device)
    x = dict(q=q, k=k, v=v, g=g)
    whole = run_op(name, x, impl="triton")
    want = run_op(name, {n: t[:, -256:] for n, t in x.items()}, impl="triton")
    assert relative_error(whole[0][:, -64:], want[0][:, -64:]) < 1e-2
    assert relative_error(whole[1], want[1]) < 1e-2
