"""The engine of the delta rule: its blocks against NumPy, hard keys and gates, packed, compiled, in place."""

import importlib

import numpy as np
import pytest
import torch
from held import both, hold

from effattn_lite.testing import make_inputs, max_error, relative_error, run_op, to_torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
import triton.language as tl  # noqa: E402

from effattn_lite.kernels.common.solve import unit_inverse  # noqa: E402
from effattn_lite.kernels.delta_blocks import find_sequence, mix, scores  # noqa: E402
from effattn_lite.ops.engines import delta  # noqa: E402
from effattn_lite.ops.kda import kda  # noqa: E402

NAMES = ("deltanet", "gated_deltanet", "kda")
DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


@triton.jit
def _inverse_kernel(A, M, C: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(M + o, unit_inverse(tl.load(A + o), C, PRECISION))


@pytest.mark.parametrize("C", (16, 32, 64))
@pytest.mark.parametrize("beta", (1.0, 2.0, None))
@pytest.mark.parametrize("precision", ("ieee", "tf32x3"))
def test_unit_inverse(C, beta, precision, device):
    """One key C times with beta = 1 or 2, where powers of A reach 10^14, and keys at random."""
    k = np.random.default_rng(0).normal(size=(C, 24))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    A = np.tril(np.full((C, C), beta) if beta else 2 * k @ k.T, -1).astype(np.float32)
    want = np.linalg.inv(np.eye(C) + A.astype(float))
    for matrix, inverse in ((A, want), (np.ascontiguousarray(A.T), want.T)):
        M = torch.empty(C, C, device=device)
        _inverse_kernel[(1,)](torch.tensor(matrix, device=device), M, C=C, PRECISION=precision)
        assert relative_error(M, inverse) < 1e-5


@triton.jit
def _channel_kernel(x, y, g, W, A, R, SIGN: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    o_c, o_k = tl.arange(0, C), tl.arange(0, K)
    o_ck, o_kc = o_c[:, None] * K + o_k[None, :], o_c[None, :] * K + o_k[:, None]
    o_cc = o_c[:, None] * C + o_c[None, :]
    b_L, b_Lt = tl.cumsum(tl.load(g + o_ck), 0), tl.cumsum(tl.load(g + o_kc), 1)
    b_x, b_y, b_yt = tl.load(x + o_ck), tl.load(y + o_ck), tl.load(y + o_kc)
    tl.store(A + o_cc, scores(b_x, b_yt, b_L, b_Lt, SIGN, 2, tl.float32, C))
    tl.store(R + o_ck, mix(tl.load(W + o_cc), b_y, b_L, SIGN, 2, tl.float32, C))


@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("g", (-1e-6, -0.4, -0.6, -20.0, -1000.0))
def test_products_by_channel(g, sign, device):
    """Scores and their transpose on both sides of the bound beyond which one product cannot hold them."""
    rng, C, K = np.random.default_rng(0), 16, 32
    x, y, W = (rng.normal(size=size).astype(np.float32) for size in ((C, K), (C, K), (C, C)))
    decay = (g * np.where(np.arange(K) % 2, 1, rng.uniform(0, 0.1, size=(C, K)))).astype(np.float32)
    seen = (np.tril if sign == 1 else np.triu)(np.ones((C, C)))
    L = np.cumsum(decay.astype(float), axis=0)
    D = np.where(seen[..., None], np.exp(np.minimum(sign * (L[:, None] - L), 0)), 0)
    A, R = torch.empty(C, C, device=device), torch.empty(C, K, device=device)
    tensors = [torch.tensor(t, device=device) for t in (x, y, decay, W * seen.astype(np.float32))]
    _channel_kernel[(1,)](*tensors, A, R, SIGN=sign, C=C, K=K)
    A = A.cpu().double().numpy()
    assert relative_error(np.where(seen, A, 0), np.einsum("ik,ijk,jk->ij", x, D, y, dtype=float)) < 1e-5
    assert relative_error(R, np.einsum("ij,ijk,jk->ik", W, D, y, dtype=float)) < 1e-5


@triton.jit
def _sequence_kernel(cu_seqlens, out, C: tl.constexpr, BS: tl.constexpr):
    first, length, begin = find_sequence(tl.program_id(0), cu_seqlens, 0, C, BS, True)
    p = out + tl.program_id(0) * 3
    tl.store(p, first)
    tl.store(p + 1, length)
    tl.store(p + 2, begin)


def test_find_sequence(device):
    """Chunks are numbered as `find_segment` numbers them: an empty sequence owns one."""
    edges = torch.tensor([0, 0, 16, 80, 80, 161], dtype=torch.int32, device=device)
    out = torch.empty(5, 3, dtype=torch.int64, device=device)
    _sequence_kernel[(5,)](edges, out, C=32, BS=8)
    assert out.tolist() == [[0, 0, 0], [0, 16, 1], [16, 64, 2], [80, 0, 4], [80, 81, 5]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T, K, V", ((1, 16, 16), (17, 100, 36), (65, 20, 100)))
def test_sizes(name, T, K, V, device):
    hold(name, make_inputs(name, B=1, T=T, H=2, K=K, V=V, state=True, dtype="float32"), device=device)


@pytest.mark.parametrize("name", ("gated_deltanet", "kda"))
def test_value_heads_share_queries(name, device):
    """No copy of a query or key a value head: the gradients of three value heads add up."""
    inputs = make_inputs(name, B=1, T=40, H=2, HV=6, K=16, V=16, state=True, dtype="float32")
    hold(name, inputs, device=device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 170]))
def test_packed(name, edges, device):
    sizes = dict(H=1, K=16, V=16, state=True, dtype="float32")
    inputs = make_inputs(name, B=1, T=edges[-1], **sizes)
    inputs["initial_state"] = make_inputs(name, B=len(edges) - 1, T=1, **sizes)["initial_state"]
    hold(name, inputs, device=device, edges=edges)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", (0.0, 1.0, 2.0))
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_keys(name, beta, dtype, device):
    """One key at every token: powers of A would overflow, M stays within 2."""
    inputs = make_inputs(name, B=1, T=70, H=2, K=16, V=16, state=True, dtype=dtype, hard="repeated")
    inputs["beta"][:] = beta
    # k k is one number, rounded alike at every token: T roundings add up themselves, not as their root
    hold(name, inputs, device=device, dtype=dtype, terms=70**2)


@pytest.mark.parametrize("name", ("gated_deltanet", "kda"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_all_strengths(name, dtype, device):
    """0, -1e-6, -1, -20 and -800 nats from token to token, and in KDA from channel to channel."""
    inputs = make_inputs(name, B=1, T=70, H=2, K=16, V=16, state=True, dtype=dtype)
    strengths = np.random.default_rng(0).choice([0.0, -1e-6, -1.0, -20.0, -800.0], size=inputs["g"].shape)
    hold(name, inputs | {"g": strengths.astype(inputs["g"].dtype)}, device=device, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_chunk_size(name, device):
    inputs = make_inputs(name, B=1, T=70, H=1, K=16, V=16, state=True, dtype="float32")
    one, other = (
        both(name, inputs, impl="triton", dtype="float32", device=device, chunk_size=C) for C in (32, 64)
    )
    for what in one:
        assert relative_error(one[what].detach(), other[what].detach()) < 1e-5, what
    with pytest.raises(NotImplementedError, match="chunk_size a power of two from 16, got 24"):
        both(name, inputs, impl="triton", dtype="float32", device=device, chunk_size=24)


def _arguments(device, *, packed):
    x = to_torch(make_inputs("kda", B=1, T=20, H=2, K=16, V=16), dtype="float32", device=device)
    cu_seqlens = torch.tensor([0, 7, 20], device=device) if packed else None
    h0 = torch.randn(2 if packed else 1, 2, 16, 16, device=device)
    return [t.requires_grad_() for t in (*x.values(), h0)], cu_seqlens


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("gated", (False, True))
def test_opcheck(packed, gated, device):
    """torch's own checks of an operator: schema, fake tensors, autograd, tracing with dynamic shapes."""
    tensors, cu_seqlens = _arguments(device, packed=packed)
    if not gated:
        tensors[3] = None
    torch.library.opcheck(torch.ops.effattn_lite.delta, (*tensors, cu_seqlens, 0.5, True, None))
    x = [t if t is None else t.detach()[:, 0] for t in tensors[:5]]
    state = torch.randn(1, 2, 16, 16, device=device)
    torch.library.opcheck(torch.ops.effattn_lite.delta_step, (*x, state, torch.empty_like(state), 0.5))


def test_compiles_with_gradients(device):
    """torch.compile keeps one graph through packed sequences, forward and backward."""
    tensors, cu_seqlens = _arguments(device, packed=True)
    names = ("q", "k", "v", "g", "beta", "initial_state")

    def loss(*x):
        named = dict(zip(names, x, strict=True))
        o, S = kda(**named, output_final_state=True, cu_seqlens=cu_seqlens, impl="triton")
        return o.square().sum() + S.sum()

    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert relative_error(got, want) < 1e-6


def test_exports(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, beta):
            return run_op("deltanet", dict(q=q, k=k, v=v, beta=beta), impl="triton")

    x = to_torch(make_inputs("deltanet", B=1, T=20, H=2, K=16, V=16), dtype="float32", device=device)
    exported = torch.export.export(Model(), tuple(x.values()))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("effattn_lite.delta" in target for target in targets) == 1
    assert relative_error(exported.module()(*x.values()), Model()(*x.values())) == 0


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_place(name, device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    heads = {} if name == "deltanet" else {"HV": 4}
    inputs = make_inputs(name, B=2, T=9, H=2, K=20, V=36, state=True, dtype="float32", **heads)
    want = run_op(name, to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    module = importlib.import_module(f"effattn_lite.ops.{name}")
    for t in range(9):
        token = {n: a[:, t] for n, a in x.items()}
        o, after = module.step(**token, state=state, out_state=state, impl="triton")
        assert after is state and relative_error(o, want[0][:, t]) < 1e-5
    assert launches == ["delta_step_kernel"] * 9
    assert relative_error(state, want[1]) < 1e-5


def test_step_refuses_to_lose_a_gradient(device):
    x = to_torch(make_inputs("deltanet", B=1, T=1, H=1), dtype="float32", device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        delta.delta_step(
            **{n: t[:, 0] for n, t in x.items()}, scale=1.0, out_state=None,
            state=torch.zeros(1, 1, 16, 24, device=device), impl="triton",
        )  # fmt: skip


def test_launches(device, launches):
    """Two forward, six backward, whatever the length."""
    inputs = make_inputs("deltanet", B=1, T=100, H=1, K=16, V=16, dtype="float32")
    x = to_torch(inputs, dtype="float32", device=device)
    o, _ = run_op("deltanet", x, impl="triton")
    assert launches == ["delta_prepare_kernel", "delta_states_kernel"] and not o.requires_grad
    x["q"].requires_grad_()
    o, _ = run_op("deltanet", x, impl="triton")
    launches.clear()
    o.sum().backward()
    assert launches == [
        "delta_prepare_kernel",
        "delta_states_kernel",
        "delta_prepare_right_kernel",
        "delta_gradients_kernel",
        "delta_rows_kernel",
        "delta_columns_kernel",
    ]


def test_refuses_what_it_cannot_hold():
    x = to_torch(make_inputs("deltanet", B=1, T=4, H=1, K=300, V=8), dtype="float32")
    assert delta._refusal(x["q"], x["v"], None) == "K and V <= 256, got 300 and 8"
    with pytest.raises(ValueError, match=r"v has 3 heads, expected a multiple of q's 2"):
        delta.delta(
            *(torch.zeros(1, 4, h, 8) for h in (2, 2, 3)), beta=torch.zeros(1, 4, 3), scale=1.0,
            initial_state=None, output_final_state=False, cu_seqlens=None, chunk_size=None, impl="torch",
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("K", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", (None, "weak", "strong", "repeated"))
def test_every_configuration_of_the_table(name, K, dtype, hard, device):
    inputs = make_inputs(name, B=1, T=700, H=4, K=K, V=K, state=True, dtype=dtype, hard=hard)
    # repeated keys: as in test_repeated_keys
    hold(name, inputs, device=device, dtype=dtype, terms=700**2 if hard == "repeated" else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_runs_are_identical(name, device):
    inputs = make_inputs(name, B=2, T=700, H=4, K=128, V=128, state=True, dtype="bfloat16")
    one, other = (both(name, inputs, impl="triton", dtype="bfloat16", device=device) for _ in range(2))
    assert all(torch.equal(one[what], other[what]) for what in one)


@pytest.mark.gpu
def test_step_replays_as_a_graph(device):
    x = to_torch(make_inputs("kda", B=2, T=1, H=2, K=64, V=64), dtype="bfloat16", device=device)
    token = {n: t[:, 0] for n, t in x.items()}
    state = torch.zeros(2, 2, 64, 64, device=device)

    def run():
        return delta.delta_step(**token, state=state, scale=1.0, out_state=state, impl="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = run()
    state.zero_()
    graph.replay()
    want = delta.delta_step(**token, state=state, scale=1.0, out_state=None, impl="torch")
    graph.replay()
    assert relative_error(state, want[1]) < 1e-5 and max_error(o, want[0]) < 0.05


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(device):
    """T H K past 2^31: the last tokens equal those of a short text, since g = -1 forgets the rest."""
    T, H, K = 2**20 + 100, 16, 128
    q, k, v = (torch.randn(1, T, H, K, dtype=torch.bfloat16, device=device) for _ in range(3))
    x = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v}
    x["beta"] = torch.rand(1, T, H, dtype=torch.bfloat16, device=device)
    x["g"] = torch.full((1, T, H), -1.0, device=device)
    whole = run_op("gated_deltanet", x, impl="triton")
    want = run_op("gated_deltanet", {n: t[:, -256:] for n, t in x.items()}, impl="triton")
    assert relative_error(whole[0][:, -64:], want[0][:, -64:]) < 1e-2
    assert relative_error(whole[1], want[1]) < 1e-2
