"""The engine of selective scans: odd sizes, packed, cut into segments, compiled, in place, run to run."""

import importlib

import numpy as np
import pytest
import torch

from effattn_lite.testing import budget, make_inputs, max_error, relative_error, run_op, to_torch

pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.kernels import selective_scan_launch as launch  # noqa: E402
from effattn_lite.ops.engines import selective_scan as engine  # noqa: E402
from effattn_lite.ops.longhorn import longhorn  # noqa: E402
from effattn_lite.ops.mamba import mamba  # noqa: E402

NAMES = ("mamba", "longhorn")
DTYPES = ("float32", "float16", *(("bfloat16",) if torch.cuda.is_available() else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


def sized(name, T, states, channels, *, B=1, H=1, **more):
    """Inputs of a method with so many states and value channels."""
    axes = dict(M=states, D=channels) if name == "mamba" else dict(K=states, V=channels, H=H)
    return make_inputs(name, B=B, T=T, **axes, **more)


def both(name, inputs, *, impl, dtype, device, edges=None):
    """Outputs, and gradients of all inputs from fixed cotangents on o and the final state."""
    x = to_torch(inputs, dtype=dtype, device=device, requires_grad=True)
    cu_seqlens = None if edges is None else torch.tensor(edges, device=device)
    out = run_op(name, x, impl=impl, cu_seqlens=cu_seqlens)
    rng = np.random.default_rng(3)
    dout = [torch.tensor(np.round(rng.normal(size=y.shape) * 8) / 8).to(y) for y in out]
    grads = torch.autograd.grad(out, tuple(x.values()), dout)
    return dict(zip(("o", "S", *(f"d{n}" for n in x)), (*out, *grads), strict=True))


def hold(name, inputs, *, device, dtype="float32", edges=None):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    how = dict(edges=edges)
    want = both(name, inputs, impl="torch", dtype="float64", device="cpu", **how)
    plain = both(name, inputs, impl="torch", dtype=dtype, device=device, **how)
    got = both(name, inputs, impl="triton", dtype=dtype, device=device, **how)
    # the kernel goes from token to token, and rounds a state or a sum over them once each
    tokens = next(iter(inputs.values())).shape[1]
    for what in want:
        factor = 3.0 if what[0] == "d" else 2.0
        limit = budget(want[what], plain[what], dtype, factor=factor, terms=tokens)
        error = max_error(got[what].detach(), want[what].detach())
        assert error <= limit, f"{what}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "T, states, channels", ((1, 16, 16), (17, 1, 33), (18, 100, 3), (33, 5, 70), (5, 256, 20))
)
def test_sizes(name, T, states, channels, device):
    hold(name, sized(name, T, states, channels, B=2, state=True, dtype="float32"), device=device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(name, dtype, device):
    """One long sequence is cut, so states and gradients cross from segment to segment."""
    inputs = sized(name, 200, 16, 40, state=True, dtype=dtype)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_changes_little(name, device, monkeypatch, launches):
    """One segment, or as many as there are: the same numbers up to rounding, with a launch more."""
    inputs = sized(name, 200, 8, 16, state=True, dtype="float32")

    def run(least):
        monkeypatch.setattr(launch, "ROUND", least)
        launches.clear()
        return both(name, inputs, impl="triton", dtype="float32", device=device), list(launches)

    (cut, many), (whole, few) = run(64), run(512)
    assert few == ["selective_scan_read_kernel", "selective_scan_gradient_kernel"]
    assert many == [k for read in few for k in ("selective_scan_write_kernel", read)]
    for what in cut:
        assert relative_error(cut[what].detach(), whole[what].detach()) < 1e-5, what


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edges", ([0, 0, 16], [0, 15, 100, 300]))
def test_packed(name, edges, device):
    inputs = sized(name, edges[-1], 16, 20, dtype="float32")
    more = sized(name, 1, 16, 20, B=len(edges) - 1, state=True, dtype="float32")
    hold(name, inputs | {"initial_state": more["initial_state"]}, device=device, edges=edges)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_agree_to_the_bit(name, device):
    inputs = sized(name, 70, 16, 40, state=True, dtype="float32")
    one, two = (both(name, inputs, impl="triton", dtype="float32", device=device) for _ in range(2))
    assert all(torch.equal(one[what], two[what]) for what in one)


def test_keys_of_any_length(device):
    """beta |k|^2 from 1e-8 to 1e8: factors at both ends of [0, 1], and finite gradients."""
    inputs = sized("longhorn", 80, 8, 16, state=True, dtype="float32")
    inputs["k"] *= np.logspace(-4, 4, 80, dtype=np.float32)[:, None, None]
    hold("longhorn", inputs, device=device)


def test_no_state_of_every_token_is_kept(device):
    """The states that the backward holds at once are a small share of those of all tokens."""
    x = to_torch(sized("mamba", 4096, 64, 32, dtype="float32"), dtype="float32", device=device)
    run = launch.Launcher(*(x[n][:, :, None] for n in ("C", "B", "x", "dt")), x["A"], None, None, None)
    kept = run.programs * (run.L // launch.CHUNK + launch.CHUNK) * run.BK * run.BV
    assert run.programs * run.L * run.BK * run.BV == 4096 * 64 * 32 and kept < 4096 * 64 * 32 / 2


def _arguments(name, device, *, packed):
    x = to_torch(sized(name, 20, 16, 16), dtype="float32", device=device)
    cu_seqlens = torch.tensor([0, 7, 20], device=device) if packed else None
    h0 = torch.randn(2 if packed else 1, 1, 16, 16, device=device)
    if name == "mamba":
        tokens = [x[n][:, :, None] for n in ("C", "B", "x", "dt")]
        parameters = [x["A"], x["D"]]
    else:
        tokens, parameters = [x[n] for n in ("q", "k", "v", "beta")], [None, None]
    tensors = [t if t is None else t.detach().requires_grad_() for t in (*tokens, *parameters, h0)]
    return tensors, cu_seqlens


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(name, packed, device):
    """torch's own checks of an operator: schema, fake tensors, autograd, tracing with dynamic shapes."""
    tensors, cu_seqlens = _arguments(name, device, packed=packed)
    torch.library.opcheck(torch.ops.effattn_lite.selective_scan, (*tensors, cu_seqlens, 0.5, True))
    *tokens, A, D, _ = (None if t is None else t.detach() for t in tensors)
    state = torch.randn(1, 1, 16, 16, device=device)
    arguments = (*(t[:, 0] for t in tokens), A, D, state, torch.empty_like(state), 0.5)
    torch.library.opcheck(torch.ops.effattn_lite.selective_scan_step, arguments)


@pytest.mark.parametrize("op, name", ((mamba, "mamba"), (longhorn, "longhorn")))
def test_compiles_with_gradients(op, name, device):
    """torch.compile keeps one graph through packed sequences, forward and backward."""
    inputs = sized(name, 20, 16, 16) | {
        "initial_state": sized(name, 1, 16, 16, B=2, state=True)["initial_state"]
    }
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 7, 20], device=device)

    def loss(*values):
        named = dict(zip(x, values, strict=True))
        o, S = op(**named, output_final_state=True, cu_seqlens=cu_seqlens, impl="triton")
        return o.square().sum() + S.sum()

    values = tuple(x.values())
    want = torch.autograd.grad(loss(*values), values)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*values), values)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_place(name, device, launches):
    """A text token by token, one launch each, the state in one place, equals the op."""
    inputs = sized(name, 9, 20, 36, B=2, state=True, dtype="float32")
    want = run_op(name, to_torch(inputs))
    x = to_torch(inputs, dtype="float32", device=device)
    state = x.pop("initial_state")
    module = importlib.import_module(f"effattn_lite.ops.{name}")
    for t in range(9):
        token = {n: a[:, t] if a.ndim > 2 else a for n, a in x.items()}
        o, after = module.step(**token, state=state, out_state=state, impl="triton")
        assert after is state and relative_error(o, want[0][:, t]) < 1e-5
    assert launches == ["selective_scan_step_kernel"] * 9
    assert relative_error(state, want[1]) < 1e-5


def test_limits_are_named(device):
    x = to_torch(sized("mamba", 2, 257, 4), dtype="float32", device=device)
    with pytest.raises(NotImplementedError, match="at most 256 states, got 257"):
        mamba(**x, impl="triton")
    x = to_torch(sized("longhorn", 1, 4, 4), dtype="float32", device=device, requires_grad=True)
    token = {n: t[:, 0] for n, t in x.items()}
    with pytest.raises(NotImplementedError, match="no gradient"):
        engine.selective_scan_step(
            *token.values(), state=torch.zeros(1, 1, 4, 4, device=device), scale=1.0, out_state=None,
            impl="triton",
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("states", (16, 32, 64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_of_the_table(name, states, dtype, device):
    inputs = sized(name, 700, states, 100, B=2, state=True, dtype=dtype)
    hold(name, inputs, device=device, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(device):
    """T D past 2^31: the last tokens equal those of a short text, since a rate of -1000 forgets the rest."""
    T, D, M = 2**19 + 100, 4100, 1
    x = torch.randn(1, T, D, dtype=torch.bfloat16, device=device)
    dt = torch.rand(1, T, D, dtype=torch.bfloat16, device=device)
    A = torch.full((D, M), -1e3, device=device)
    B, C = (torch.randn(1, T, M, dtype=torch.bfloat16, device=device) for _ in range(2))
    whole = mamba(x, dt, A, B, C, output_final_state=True, impl="triton")
    tail = mamba(
        *(t[:, -256:] for t in (x, dt)), A, B[:, -256:], C[:, -256:], output_final_state=True, impl="triton"
    )
    assert relative_error(whole[0][:, -64:], tail[0][:, -64:]) < 1e-2
    assert relative_error(whole[1], tail[1]) < 1e-2
