"""The engine of fixed decays: its blocks against NumPy, odd sizes, packed, cut, compiled, in place."""

import importlib

import numpy as np
import pytest
import torch
from held import both, hold

from effattn_lite.testing import make_inputs, relative_error, run_op, to_torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
import triton.language as tl  # noqa: E402

from effattn_lite.kernels.common.output import mix_by_channel, scores_by_channel  # noqa: E402
from effattn_lite.kernels.common.scan import find_segment  # noqa: E402
from effattn_lite.ops.engines import decay  # noqa: E402
from effattn_lite.ops.rwkv5 import rwkv5  # noqa: E402

NAMES = ("retnet", "lightning_attention", "rwkv5")
DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


@triton.jit
def _segments_kernel(cu_seqlens, out, T, L, N, BS: tl.constexpr, PACKED: tl.constexpr):
    i_n, i_j, first, length = find_segment(tl.program_id(0), cu_seqlens, T, L, N, BS, PACKED)
    p = out + tl.program_id(0) * 4
    tl.store(p, i_n)
    if i_n < N:
        tl.store(p + 1, i_j)
        tl.store(p + 2, first)
        tl.store(p + 3, length)


def test_find_segment(device):
    """Empty sequences own one segment, programs past the end own none."""
    edges, L = [0, 0, 16, 80, 80, 161], 64
    want = [
        (n, j, a, b - a)
        for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
        for j in range(max(1, -(-(b - a) // L)))
    ]
    out = torch.full((len(want) + 2, 4), -1, dtype=torch.int64, device=device)
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    _segments_kernel[(len(out),)](cu_seqlens, out, 161, L, 5, BS=8, PACKED=True)
    assert out[: len(want)].tolist() == [list(row) for row in want]
    assert (out[len(want) :, 0] >= 5).all()


@triton.jit
def _channel_kernel(q, k, g, W, A, R, n, SHIFT: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    o_c, o_k = tl.arange(0, C), tl.arange(0, K)
    m_c, o_ck, o_cc = (o_c < n)[:, None], o_c[:, None] * K + o_k[None, :], o_c[:, None] * C + o_c[None, :]
    b_g, m_k = tl.load(g + o_k), o_k < K
    b_q, b_k = tl.load(q + o_ck, mask=m_c, other=0), tl.load(k + o_ck, mask=m_c, other=0)
    b_kt = tl.load(k + o_c[None, :] * K + o_k[:, None], mask=(o_c < n)[None, :], other=0)
    tl.store(A + o_cc, scores_by_channel(b_q, b_kt, k + o_k, K, b_g, n, m_k, SHIFT, C))
    b_W = tl.load(W + o_cc)
    tl.store(R + o_ck, mix_by_channel(b_W, b_k, k + o_k, K, b_g, n, m_k, SHIFT, C))


@pytest.mark.parametrize("shift", (0, 1))
@pytest.mark.parametrize("g", (-1e-6, -0.5, -4.9, -5.1, -20.0, -1000.0))
def test_products_by_channel(g, shift, device):
    """Scores and their transpose on both sides of the bound beyond which one product cannot hold them."""
    rng, C, K, n = np.random.default_rng(0), 16, 32, 13
    q, k = rng.normal(size=(2, C, K)).astype(np.float32)
    decay_of = np.where(np.arange(K) % 2, g, g / 10).astype(np.float32)
    lag = np.arange(C)[:, None] - np.arange(C) - shift
    W = np.where(lag >= 0, rng.normal(size=(C, C)), 0).astype(np.float32)
    q[n:], k[n:], W[:, n:] = 0, 0, 0
    table = np.where(lag[..., None] >= 0, np.exp(decay_of * np.maximum(lag, 0)[..., None].astype(float)), 0)
    x = [torch.tensor(t, device=device) for t in (q, k, decay_of, W)]
    A, R = torch.empty(C, C, device=device), torch.empty(C, K, device=device)
    _channel_kernel[(1,)](*x, A, R, n, SHIFT=shift, C=C, K=K)
    assert relative_error(A, np.einsum("ik,ijk,jk->ij", q, table, k, dtype=float)) < 1e-5
    assert relative_error(R, np.einsum("ij,ijk,jk->ik", W, table, k, dtype=float)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T, K, V", ((1, 16, 16), (17, 100, 36), (65, 20, 100), (64, 8, 8)))
def test_sizes(name, T, K, V, device):
    # several heads: the budget of dg needs more than one sample of plain torch's error
    hold(name, make_inputs(name, B=1, T=T, H=4, K=K, V=V, state=True, dtype="float32"), device=device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(name, dtype, device):
    """One long sequence is cut, so states and gradients cross from segment to segment."""
    inputs = make_inputs(name, B=1, T=270, H=4, K=16, V=16, state=True, dtype=dtype)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 300]))
def test_packed(name, edges, device):
    sizes = dict(H=1, K=16, V=16, state=True, dtype="float32")
    inputs = make_inputs(name, B=1, T=edges[-1], **sizes)
    inputs["initial_state"] = make_inputs(name, B=len(edges) - 1, T=1, **sizes)["initial_state"]
    hold(name, inputs, device=device, edges=edges)


@pytest.mark.parametrize("name", ("lightning_attention", "rwkv5"))
def test_gradient_of_g_over_a_long_text(name, device):
    """Without decay a sum over T steps of nearly equal numbers would leave no digit of dg in 16 bits."""
    inputs = make_inputs(name, B=1, T=500, H=1, K=16, V=16, hard="weak", state=True, dtype="float16")
    hold(name, inputs, device=device, dtype="float16")


@pytest.mark.parametrize("name", NAMES)
def test_chunk_size(name, device):
    inputs = make_inputs(name, B=1, T=70, H=1, K=16, V=16, state=True, dtype="float32")
    one, other = (
        both(name, inputs, impl="triton", dtype="float32", device=device, chunk_size=C) for C in (16, 64)
    )
    for what in one:
        assert relative_error(one[what].detach(), other[what].detach()) < 1e-5, what
    with pytest.raises(NotImplementedError, match="chunk_size a power of two from 16, got 24"):
        both(name, inputs, impl="triton", dtype="float32", device=device, chunk_size=24)


def _arguments(device, *, packed):
    x = to_torch(make_inputs("rwkv5", B=1, T=20, H=2, K=16, V=16), dtype="float32", device=device)
    cu_seqlens = torch.tensor([0, 7, 20], device=device) if packed else None
    h0 = torch.randn(2 if packed else 1, 2, 16, 16, device=device)
    return [t.requires_grad_() for t in (*x.values(), h0)], cu_seqlens


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed, device):
    """torch's own checks of an operator: schema, fake tensors, autograd, tracing with dynamic shapes."""
    tensors, cu_seqlens = _arguments(device, packed=packed)
    torch.library.opcheck(torch.ops.effattn_lite.decay, (*tensors, cu_seqlens, 0.5, True, None))
    x = [t.detach()[:, 0] if i < 3 else t.detach() for i, t in enumerate(tensors)]
    state = torch.randn(1, 2, 16, 16, device=device)
    torch.library.opcheck(torch.ops.effattn_lite.decay_step, (*x[:5], state, torch.empty_like(state), 0.5))


def test_compiles_with_gradients(device):
    """torch.compile keeps one graph through packed sequences, forward and backward."""
    tensors, cu_seqlens = _arguments(device, packed=True)
    names = ("q", "k", "v", "g", "u", "initial_state")

    def loss(*x):
        o, S = rwkv5(
            **dict(zip(names, x, strict=True)), output_final_state=True, cu_seqlens=cu_seqlens, impl="triton"
        )
        return o.square().sum() + S.sum()

    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert relative_error(got, want) < 1e-6


def test_exports(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return run_op("retnet", dict(q=q, k=k, v=v), impl="triton")

    x = to_torch(make_inputs("retnet", B=1, T=20, H=2, K=16, V=16), dtype="float32", device=device)
    exported = torch.export.export(Model(), tuple(x.values()))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("effattn_lite.decay" in target for target in targets) == 1
    assert relative_error(exported.module()(*x.values()), Model()(*x.values())) == 0


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_place(name, device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    inputs = make_inputs(name, B=2, T=9, H=2, K=20, V=36, state=True, dtype="float32")
    want = run_op(name, to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    module = importlib.import_module(f"effattn_lite.ops.{name}")
    for t in range(9):
        token = {n: a[:, t] if a.ndim == 4 else a for n, a in x.items()}
        o, after = module.step(**token, state=state, out_state=state, impl="triton")
        assert after is state and relative_error(o, want[0][:, t]) < 1e-5
    assert launches == ["decay_step_kernel"] * 9
    assert relative_error(state, want[1]) < 1e-5


def test_step_refuses_to_lose_a_gradient(device):
    x = to_torch(make_inputs("retnet", B=1, T=1, H=1), dtype="float32", device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        decay.decay_step(
            *(t[:, 0] for t in x.values()), g=torch.zeros(1, device=device), scale=1.0, out_state=None,
            state=torch.zeros(1, 1, 16, 24, device=device), impl="triton",
        )  # fmt: skip


def test_no_launch_of_what_is_not_needed(device, launches):
    """A short text is one segment: one launch forward; a constant without gradient costs nothing."""
    inputs = make_inputs("lightning_attention", B=1, T=40, H=1, K=16, V=16, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device)
    o, state = run_op("lightning_attention", x, impl="triton")
    assert launches == ["decay_read_kernel"] and not o.requires_grad
    launches.clear()
    x["q"].requires_grad_()
    run_op("lightning_attention", x, impl="triton")[0].sum().backward()
    assert launches == ["decay_read_kernel"] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("lightning_attention", "rwkv5"))
@pytest.mark.parametrize("K", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", (None, "strong"))
def test_every_configuration_of_the_table(name, K, dtype, hard, device):
    inputs = make_inputs(name, B=1, T=700, H=8, K=K, V=K, state=True, dtype=dtype, hard=hard)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.gpu
def test_step_replays_as_a_graph(device):
    x = to_torch(make_inputs("rwkv5", B=2, T=1, H=2, K=64, V=64), dtype="bfloat16", device=device)
    token = [t[:, 0] if t.ndim == 4 else t for t in x.values()]
    state = torch.zeros(2, 2, 64, 64, device=device)

    def run():
        q, k, v, g, u = token
        return decay.decay_step(q, k, v, g=g, u=u, state=state, scale=1.0, out_state=state, impl="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = run()
    state.zero_()
    graph.replay()
    once = state.clone()
    graph.replay()
    want = once * token[3].exp()[..., None] + once
    assert relative_error(state, want) < 1e-5 and o.isfinite().all()


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(device):
    """T H K past 2^31: the last tokens equal those of a short text, since g = -1 forgets the rest."""
    T, H, K = 2**20 + 100, 16, 128
    q, k, v = (torch.randn(1, T, H, K, dtype=torch.bfloat16, device=device) for _ in range(3))
    g = torch.full((H,), -1.0, device=device)
    whole = run_op("lightning_attention", dict(q=q, k=k, v=v, g=g), impl="triton")
    tail = {n: x[:, -256:] for n, x in dict(q=q, k=k, v=v).items()} | {"g": g}
    want = run_op("lightning_attention", tail, impl="triton")
    assert relative_error(whole[0][:, -64:], want[0][:, -64:]) < 1e-2
    assert relative_error(whole[1], want[1]) < 1e-2
