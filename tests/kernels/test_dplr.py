"""The engine of a diagonal plus rank 1: its blocks against NumPy, hard keys and gates, packed, compiled."""

import numpy as np
import pytest
import torch

from effattn_lite.testing import budget, make_inputs, max_error, relative_error, run_op, to_torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
import triton.language as tl  # noqa: E402

from effattn_lite.kernels.dplr_blocks import mix, reader_decays, writer_decays  # noqa: E402
from effattn_lite.kernels.dplr_local import corner, undecayed  # noqa: E402
from effattn_lite.ops.engines import dplr  # noqa: E402
from effattn_lite.ops.rwkv7 import rwkv7, step  # noqa: E402

DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(**sizes):
    return make_inputs("rwkv7", **dict(B=1, T=70, H=2, K=16, V=16, state=True, dtype="float32") | sizes)


def both(inputs, *, impl, dtype, device, edges=None, **options):
    """Outputs, and gradients of all inputs from fixed cotangents on o and the final state."""
    x = to_torch(inputs, dtype=dtype, device=device, requires_grad=True)
    cu_seqlens = None if edges is None else torch.tensor(edges, device=device)
    out = run_op("rwkv7", x, impl=impl, cu_seqlens=cu_seqlens, **options)
    rng = np.random.default_rng(3)
    dout = [torch.tensor(np.round(rng.normal(size=y.shape) * 8) / 8).to(y) for y in out]
    grads = torch.autograd.grad(out, tuple(x.values()), dout)
    return dict(zip(("o", "S", *x), (*out, *grads), strict=True))


def hold(inputs, *, device, dtype="float32", edges=None, terms=0, **options):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    how = dict(edges=edges) | options
    want = both(inputs, impl="torch", dtype="float64", device="cpu", **how)
    plain = both(inputs, impl="torch", dtype=dtype, device=device, **how)
    got = both(inputs, impl="triton", dtype=dtype, device=device, **how)
    terms = max(terms, inputs["k"].shape[-1], inputs["v"].shape[-1])
    for what in want:
        factor = 2.0 if what in "oS" else 3.0
        limit = budget(want[what], plain[what], dtype, factor=factor, terms=terms)
        error = max_error(got[what].detach(), want[what].detach())
        assert error <= limit, f"{'' if what in 'oS' else 'd'}{what}: error {error:.2e}, budget {limit:.2e}"


@triton.jit
def _decay_kernel(g, out, n, REVERSE: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    o_c, o_k = tl.arange(0, C), tl.arange(0, K)
    p = out + o_c[:, None] * K + o_k[None, :]
    m_c = o_c < n
    b_x1, b_x2, b_l = reader_decays(g, o_c, m_c, o_k, 1, K, REVERSE)
    b_y1, b_y2 = writer_decays(g, o_c, m_c, o_k, 1, K, REVERSE, False)
    b_yt1, b_yt2 = writer_decays(g, o_c, m_c, o_k, 1, K, REVERSE, True)
    tl.store(p, b_x1)
    tl.store(p + C * K, b_x2)
    tl.store(p + 2 * C * K, b_y1)
    tl.store(p + 3 * C * K, b_y2)
    p_t = out + o_c[None, :] * K + o_k[:, None]
    tl.store(p_t + 4 * C * K, b_yt1)
    tl.store(p_t + 5 * C * K, b_yt2)
    tl.store(out + 6 * C * K + o_k, b_l)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("n", (1, 11, 16))
def test_decays(reverse, n, device):
    """n tokens of a half: a stands before its own decay, q, k and b behind theirs, whoever reads."""
    C, K = 16, 8
    g = -np.random.default_rng(0).exponential(size=(C, K))
    g[n:] = 0
    out = torch.empty(6 * C + 1, K, device=device)
    tensor = torch.tensor(g, dtype=torch.float32, device=device)
    _decay_kernel[(1,)](tensor, out, n, REVERSE=reverse, C=C, K=K)
    L = np.cumsum(g, axis=0)
    since, before, left = np.exp(L), np.exp(L - g), np.exp(L[-1] - L)
    # from the left a and q read, b and k write; from the right b and k read, a and q write
    want = (left, left, before, since) if reverse else (before, since, left, left)
    tables = out[:-1].view(6, C, K)[:, :n]
    assert relative_error((tables, out[-1]), (np.array((*want, *want[2:]))[:, :n], L[-1])) < 1e-6


@triton.jit
def _mix_kernel(y, g, W, R, SIGN: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    o_c, o_k = tl.arange(0, C), tl.arange(0, K)
    o_ck = o_c[:, None] * K + o_k[None, :]
    b_g = tl.load(g + o_ck)
    b_L = tl.cumsum(b_g, 0)
    b_La = tl.cumsum(tl.load(g + o_ck - K, mask=(o_c > 0)[:, None], other=0), 0)
    b_W = tl.load(W + o_c[:, None] * C + o_c[None, :])
    b_x, b_y = b_La, b_L
    if SIGN == -1:
        b_x, b_y = b_L, b_La
    tl.store(R + o_ck, mix(b_W, tl.load(y + o_ck), b_x, b_y, b_L, SIGN, tl.float32, C))


@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("g", (-1e-6, -0.4, -0.6, -20.0, -1000.0))
def test_mix(g, sign, device):
    """a reads, or with sign -1 writes; on both sides of the bound beyond which one product cannot hold it."""
    rng, C, K = np.random.default_rng(0), 16, 32
    y, W = rng.normal(size=(C, K)), rng.normal(size=(C, C))
    W = np.tril(W, -1) if sign == 1 else np.triu(W, 1)
    decay = g * np.where(np.arange(K) % 2, 1, rng.uniform(0, 0.1, size=(C, K)))
    y, W, decay = (x.astype(np.float32) for x in (y, W, decay))
    L = np.cumsum(decay.astype(float), axis=0)
    before = np.concatenate((np.zeros((1, K)), L[:-1]))
    x, w = (before, L) if sign == 1 else (L, before)
    D = np.exp(np.minimum(sign * (x[:, None] - w), 0))
    R = torch.empty(C, K, device=device)
    _mix_kernel[(1,)](*(torch.tensor(t, device=device) for t in (y, decay, W)), R, SIGN=sign, C=C, K=K)
    assert relative_error(R, np.einsum("ij,ijk,jk->ik", W, D, y, dtype=float)) < 1e-5


@triton.jit
def _pairs_kernel(A, out, p, REVERSE: tl.constexpr, C: tl.constexpr):
    o_c = tl.arange(0, C)
    o = o_c[:, None] * C + o_c[None, :]
    b_11, b_12, b_21, b_22 = (
        tl.load(A + o), tl.load(A + C * C + o), tl.load(A + 2 * C * C + o), tl.load(A + 3 * C * C + o)
    )  # fmt: skip
    b_p, b_left = corner(b_11, REVERSE)
    tl.store(out + 4 * C * C + o, b_left)
    tl.store(p + 4 * C + o_c[:, None], b_p)
    b_p1, b_p2, b_p3, b_p4, b_11, b_12, b_21, b_22 = undecayed(b_11, b_12, b_21, b_22, REVERSE)
    tl.store(out + o, b_11)
    tl.store(out + C * C + o, b_12)
    tl.store(out + 2 * C * C + o, b_21)
    tl.store(out + 3 * C * C + o, b_22)
    tl.store(p + o_c[:, None], b_p1)
    tl.store(p + C + o_c[:, None], b_p2)
    tl.store(p + 2 * C + o_c[:, None], b_p3)
    tl.store(p + 3 * C + o_c[:, None], b_p4)


@pytest.mark.parametrize("reverse", (False, True))
def test_pairs_that_do_not_decay(reverse, device):
    """Own token and neighbour are taken out of the tables; nothing is lost, nothing counted twice."""
    C = 16
    A = np.random.default_rng(0).normal(size=(4, C, C)).astype(np.float32)
    out, p = torch.empty(5, C, C, device=device), torch.empty(5, C, device=device)
    _pairs_kernel[(1,)](torch.tensor(A, device=device), out, p, REVERSE=reverse, C=C)
    step, tri = (1, np.triu) if reverse else (-1, np.tril)
    beside, own = np.eye(C, k=step), np.eye(C)
    with_a, other = (2, 1) if reverse else (1, 2)  # of 12 and 21, the table of a
    weights = [A[0] * beside, A[with_a] * beside, A[other] * own, A[3] * own]
    edge = np.zeros((C, C))
    edge[(C - 1, 0) if reverse else (0, C - 1)] = 1
    assert max_error(p, np.array([w.sum(1) for w in (*weights, A[0] * edge)])) == 0
    want = np.array([tri(x, step) for x in A])
    want[0] -= weights[0]
    want[with_a] -= weights[1]
    assert max_error(out, np.concatenate((want, (A[0] * (1 - edge))[None]))) == 0


@pytest.mark.parametrize("T, K, V", ((1, 16, 16), (17, 100, 36), (65, 20, 100)))
def test_sizes(T, K, V, device):
    hold(draw(T=T, K=K, V=V), device=device)


@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 170]))
def test_packed(edges, device):
    inputs = draw(T=edges[-1], H=1)
    inputs["initial_state"] = draw(B=len(edges) - 1, T=1, H=1)["initial_state"]
    hold(inputs, device=device, edges=edges)


@pytest.mark.parametrize("rate", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_keys(rate, dtype, device):
    """One key and one a at every token: the powers of the table would overflow, its inverse does not."""
    inputs = draw(dtype=dtype, hard="repeated")
    inputs["b"] = (-rate * inputs["a"].astype(np.float32)).astype(inputs["a"].dtype)
    # a b is one number, rounded alike at every token: T roundings add up themselves, not as their root
    hold(inputs, device=device, dtype=dtype, terms=70**2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_all_strengths(dtype, device):
    """0, -1e-6, -1, -20 and -800 nats from token to token and channel to channel."""
    inputs = draw(dtype=dtype)
    strengths = np.random.default_rng(0).choice([0.0, -1e-6, -1.0, -20.0, -800.0], size=inputs["g"].shape)
    hold(inputs | {"g": strengths.astype(inputs["g"].dtype)}, device=device, dtype=dtype)


@pytest.mark.parametrize("g", (-20.0, -0.2))
def test_gradient_of_a_steady_gate(g, device):
    """g alike everywhere: what passes over a token is far less than what touches it, or all of it."""
    inputs = draw(T=70)
    inputs["g"][:] = g
    hold(inputs, device=device)


def test_scale(device):
    hold(draw(T=40), device=device, scale=0.3)


def test_chunk_size_that_the_kernels_do_not_have(device):
    with pytest.raises(NotImplementedError, match="chunk_size a power of two from 32, got 24"):
        both(draw(), impl="triton", dtype="float32", device=device, chunk_size=24)


def _arguments(device, *, packed):
    x = to_torch(draw(T=20, state=False), dtype="float32", device=device)
    cu_seqlens = torch.tensor([0, 7, 20], device=device) if packed else None
    h0 = torch.randn(2 if packed else 1, 2, 16, 16, device=device)
    return [t.requires_grad_() for t in (*x.values(), h0)], cu_seqlens


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed, device):
    """torch's own checks of an operator: schema, fake tensors, autograd, tracing with dynamic shapes."""
    tensors, cu_seqlens = _arguments(device, packed=packed)
    torch.library.opcheck(torch.ops.effattn_lite.dplr, (*tensors, cu_seqlens, 0.5, True, None))
    x = [t.detach()[:, 0] for t in tensors[:6]]
    state = torch.randn(1, 2, 16, 16, device=device)
    torch.library.opcheck(torch.ops.effattn_lite.dplr_step, (*x, state, torch.empty_like(state), 0.5))


def test_compiles_with_gradients(device):
    """torch.compile keeps one graph through packed sequences, forward and backward."""
    tensors, cu_seqlens = _arguments(device, packed=True)
    names = ("q", "k", "v", "g", "a", "b", "initial_state")

    def loss(*x):
        named = dict(zip(names, x, strict=True))
        o, S = rwkv7(**named, output_final_state=True, cu_seqlens=cu_seqlens, impl="triton")
        return o.square().sum() + S.sum()

    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert relative_error(got, want) < 1e-6


def test_exports(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, g, a, b):
            return run_op("rwkv7", dict(q=q, k=k, v=v, g=g, a=a, b=b), impl="triton")

    x = to_torch(draw(T=20, state=False), dtype="float32", device=device)
    exported = torch.export.export(Model(), tuple(x.values()))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("effattn_lite.dplr" in target for target in targets) == 1
    assert relative_error(exported.module()(*x.values()), Model()(*x.values())) == 0


def test_steps_in_place(device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    inputs = draw(B=2, T=9, K=20, V=36)
    want = run_op("rwkv7", to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    for t in range(9):
        token = {n: tensor[:, t] for n, tensor in x.items()}
        o, after = step(**token, state=state, out_state=state, impl="triton")
        assert after is state and relative_error(o, want[0][:, t]) < 1e-5
    assert launches == ["dplr_step_kernel"] * 9
    assert relative_error(state, want[1]) < 1e-5


def test_step_refuses_to_lose_a_gradient(device):
    x = to_torch(draw(T=1, state=False), dtype="float32", device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        step(
            **{n: t[:, 0] for n, t in x.items()},
            state=torch.zeros(1, 2, 16, 16, device=device),
            impl="triton",
        )


def test_launches(device, launches):
    """Two forward, six backward, whatever the length; the same three kernels both ways."""
    x = to_torch(draw(T=100, H=1, state=False), dtype="float32", device=device)
    o, _ = run_op("rwkv7", x, impl="triton")
    assert launches == ["dplr_prepare_kernel", "dplr_states_kernel"] and not o.requires_grad
    x["q"].requires_grad_()
    o, _ = run_op("rwkv7", x, impl="triton")
    launches.clear()
    o.sum().backward()
    there_and_back = ["dplr_prepare_kernel", "dplr_states_kernel"] * 2
    assert launches == [*there_and_back, "dplr_gradients_kernel", "dplr_gradients_kernel"]


def test_refuses_what_it_cannot_hold():
    x = to_torch(draw(T=4, H=1, K=300, V=8), dtype="float32")
    assert dplr._refusal(x["q"], x["v"], None) == "K and V <= 256, got 300 and 8"


@pytest.mark.gpu
@pytest.mark.parametrize("K", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", (None, "weak", "strong", "repeated"))
def test_every_configuration_of_the_table(K, dtype, hard, device):
    inputs = draw(T=700, H=4, K=K, V=K, dtype=dtype, hard=hard)
    # repeated keys: as in test_repeated_keys
    hold(inputs, device=device, dtype=dtype, terms=700**2 if hard == "repeated" else 0)


@pytest.mark.gpu
def test_runs_are_identical(device):
    inputs = draw(B=2, T=700, H=4, K=128, V=128, dtype="bfloat16")
    one, other = (both(inputs, impl="triton", dtype="bfloat16", device=device) for _ in range(2))
    assert all(torch.equal(one[what], other[what]) for what in one)


@pytest.mark.gpu
def test_step_replays_as_a_graph(device):
    x = to_torch(draw(B=2, T=1, K=64, V=64, state=False), dtype="bfloat16", device=device)
    token = {n: t[:, 0] for n, t in x.items()}
    state = torch.zeros(2, 2, 64, 64, device=device)

    def run():
        return step(**token, state=state, out_state=state, impl="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = run()
    state.zero_()
    graph.replay()
    want = step(**token, state=state, impl="torch")
    graph.replay()
    assert relative_error(state, want[1]) < 1e-5 and max_error(o, want[0]) < 0.05


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(device):
    """T H K past 2^31: the last tokens equal those of a short text, since g = -1 forgets the rest."""
    T, H, K = 2**20 + 100, 16, 128
    x = {n: torch.randn(1, T, H, K, dtype=torch.bfloat16, device=device) for n in "qkva"}
    x["a"] = -torch.nn.functional.normalize(x["a"], dim=-1)
    x["b"] = -x["a"] / 2
    x["g"] = torch.full((1, 1, 1, 1), -1.0, device=device).expand(1, T, H, K).to(torch.bfloat16)
    whole = run_op("rwkv7", x, impl="triton")
    want = run_op("rwkv7", {n: t[:, -256:] for n, t in x.items()}, impl="triton")
    assert relative_error(whole[0][:, -64:], want[0][:, -64:]) < 1e-2
    assert relative_error(whole[1], want[1]) < 1e-2
