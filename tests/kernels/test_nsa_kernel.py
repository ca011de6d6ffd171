"""NSA's own kernels against eager torch: spans that end, packed sequences, decoding, the blocks chosen."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.kernels import nsa as kernels  # noqa: E402
from effattn_lite.kernels.common import launch  # noqa: E402
from effattn_lite.kernels.common.softmax_tuning import candidates  # noqa: E402
from effattn_lite.ops.engines import nsa as engine  # noqa: E402
from effattn_lite.testing import budget, max_error  # noqa: E402

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
# B, T, Tk, H, HKV, K, V, span, stride
SHAPES = (
    (2, 63, 63, 4, 2, 16, 24, 8, 4),
    (1, 130, 130, 3, 1, 33, 17, 6, 2),
    (1, 9, 70, 2, 2, 16, 16, 16, 16),
    (1, 1, 40, 16, 1, 16, 16, 8, 2),
    (1, 40, 40, 2, 1, 8, 8, 32, 8),
    (1, 40, 200, 2, 1, 8, 8, 4, 2),
    (1, 5, 5, 2, 1, 8, 8, 8, 4),
)
EDGES = [0, 0, 50, 51, 51, 60, 90]

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(shape, dtype, device, *, rows=None, seed=0):
    """q and summaries k, v; `rows` of them, or as many as the text has."""
    B, T, Tk, H, HKV, K, V, size, stride = shape
    g, NC = torch.Generator().manual_seed(seed), engine.count(Tk, size, stride) if rows is None else rows
    x = [torch.randn(s, generator=g) for s in ((B, T, H, K), (B, NC, HKV, K), (B, NC, HKV, V))]
    return [t.to(dtype).to(device).requires_grad_() for t in x], engine.Spans(size, stride, Tk, K**-0.5)


def both(x, spans, impl, dtype=None, device=None, cu_seqlens=None):
    """o, lse, dq, dk, dv from fixed cotangents; lse counts where it is finite."""
    x = [t.detach().to(dtype or t.dtype).to(device or t.device).requires_grad_() for t in x]
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(x[0].device)
    o, lse = engine.skim(*x, spans, cu_seqlens=cu_seqlens, impl=impl)
    g = torch.Generator().manual_seed(1)
    do, dlse = (((torch.randn(y.shape, generator=g) * 8).round() / 8).to(y) for y in (o, lse))
    seen = torch.where(lse.isfinite(), lse, 0.0)
    return o, lse, *torch.autograd.grad([o, seen], x, [do, dlse])


def within_budget(got, want, plain, x, note=""):
    """Twice plain torch's error, three times for gradients."""
    terms = max(x[0].shape[3], x[2].shape[3])
    # where a score is differentiated, numbers as large as the largest gradient are subtracted
    largest = max(max_error(w, 0 * w) for w in want[2:])
    for name, g, w, p in zip(("o", "lse", "dq", "dk", "dv"), got, want, plain, strict=True):
        assert torch.equal(g.isfinite().cpu(), w.isfinite()), f"{name}: other rows are empty {note}"
        g, w, p = (torch.where(t.isfinite(), t, 0.0).detach() for t in (g, w, p))
        size = dict(factor=3.0, magnitude=largest) if name in ("dq", "dk") else dict(factor=3.0)
        limit = budget(w, p, str(x[0].dtype).removeprefix("torch."), terms=terms, **size)
        error = max_error(g, w)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e} {note}"


def hold(x, spans, launches, **options):
    want = both(x, spans, "torch", torch.float64, "cpu", **options)
    plain = both(x, spans, "torch", **options)
    assert not launches
    got = both(x, spans, "triton", **options)
    assert launches, "no kernel was launched"
    within_budget(got, want, plain, x)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, dtype, device, launches):
    x, spans = draw(shape, dtype, device)
    o, lse, *_ = hold(x, spans, launches)
    before = max(spans.size - 1 - (shape[2] - shape[1]), 0)  # queries before the first span's end
    assert (lse[:, :before] == -torch.inf).all() and lse[:, before:].isfinite().all()
    assert (o[:, :before] == 0).all()


@pytest.mark.parametrize("more", (0, 3))
def test_packed_sequences(more, device, launches):
    """Summaries one sequence after another; further rows are not read and get no gradient."""
    edges = torch.tensor(EDGES, dtype=torch.int32)
    used = int(engine.count(edges.diff(), 8, 4).sum())
    x, spans = draw((1, 90, 90, 4, 2, 16, 16, 8, 4), torch.float32, device, rows=used + more)
    *_, dk, dv = hold(x, spans, launches, cu_seqlens=edges)
    assert (dk[:, used:] == 0).all() and (dv[:, used:] == 0).all()


def test_same_bits_from_run_to_run(device):
    x, spans = draw(SHAPES[0], torch.float32, device)
    for a, b in zip(both(x, spans, "triton"), both(x, spans, "triton"), strict=True):
        assert torch.equal(a, b)


def scores_of(q, k, spans, block_size):
    """Score of each block in float64, [B, HKV, T, NK]; which are always read, which are to come, [T, NK]."""
    (T, H), HKV = q.shape[1:3], k.shape[2]
    q, k = q.double(), k.double().repeat_interleave(H // HKV, 2)
    t, i = (torch.arange(*r, device=q.device) for r in ((spans.tokens - T, spans.tokens), (k.shape[1],)))
    s = torch.einsum("bthk,bihk->bhti", q, k) * spans.scale
    p = s.masked_fill(i * spans.stride + spans.size > t[:, None] + 1, -torch.inf).softmax(-1).nan_to_num()
    j, own = torch.arange(-(-spans.tokens // block_size), device=q.device), t[:, None] // block_size
    score = engine.importance(p, j.numel(), block_size, spans.size, spans.stride)
    return score.unflatten(1, (HKV, -1)).sum(2), (j == 0) | (j > own - 2), j > own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("top_n", (4, 17))
def test_blocks_are_the_best(shape, dtype, top_n, device, launches):
    """No block left out has a larger score than one that was chosen, beyond float32's rounding."""
    (q, k, _), spans = draw(shape, dtype, device)
    B, T, _, H, HKV, *_ = shape
    block_size = 8 if 8 % spans.stride == 0 else spans.stride
    _, lse = engine.skim(q, k, k, spans, impl="torch")
    launches.clear()
    how = dict(block_size=block_size, top_n=top_n)
    got = engine.point(q, k, lse, spans, **how, impl="triton").long()
    assert launches == ["nsa_select_kernel"]
    score, always, future = scores_of(q, k, spans, block_size)
    score = score.masked_fill(always, torch.inf).masked_fill(future, -torch.inf)
    NK = score.shape[-1]
    n = min(top_n, NK)
    assert got.shape == (B, T, HKV, n)
    chosen = torch.zeros(B, HKV, T, NK + 1, dtype=torch.int64, device=q.device)
    index = got.transpose(1, 2)
    chosen.scatter_add_(3, torch.where(index < 0, NK, index), torch.ones_like(index))
    chosen = chosen[..., :NK]
    assert (chosen <= 1).all() and not chosen[future.expand_as(chosen)].any()
    assert torch.equal(chosen.sum(-1), (~future).sum(-1).clamp(max=n).expand(B, HKV, T))
    worst_in = score.masked_fill(chosen == 0, torch.inf).amin(-1)
    best_out = score.masked_fill((chosen == 1) | future, -torch.inf).amax(-1)
    # lse and products in float32: each of H / HKV weights <= 1, of as many shared strides as a span has
    slack = 1e-5 * (H // HKV) * (spans.size // spans.stride)
    assert (best_out <= worst_in + slack).all()


def test_blocks_of_packed_sequences(device):
    edges = torch.tensor(EDGES, dtype=torch.int32, device=device)
    used = int(engine.count(edges.diff(), 8, 4).sum())
    (q, k, _), spans = draw((1, 90, 90, 4, 2, 16, 16, 8, 4), torch.float32, device, rows=used)
    _, lse = engine.skim(q, k, k, spans, cu_seqlens=edges, impl="torch")
    got, want = (
        engine.point(q, k, lse, spans, block_size=8, top_n=4, cu_seqlens=edges, impl=impl)
        for impl in ("triton", "torch")
    )
    assert torch.equal(got.sort(-1)[0], want.sort(-1)[0])


def test_ties_go_to_the_lower_block(device):
    q, k = torch.zeros(1, 64, 2, 8, device=device), torch.zeros(1, 8, 1, 8, device=device)
    spans = engine.Spans(8, 8, 64, 1.0)
    _, lse = engine.skim(q, k, k, spans, impl="torch")
    got = engine.point(q, k, lse, spans, block_size=8, top_n=5, impl="triton")
    assert all(sorted(row) == [0, 1, 2, 6, 7] for row in got[0, 56:, 0].tolist())


def test_groups_larger_than_a_tile(device):
    """Heads of a group that do not fit beside each other are added up one tile after another."""
    (q, k, _), spans = draw((1, 40, 40, 80, 1, 16, 16, 8, 4), torch.float32, device)
    _, lse = engine.skim(q, k, k, spans, impl="torch")
    got, want = (
        engine.point(q, k, lse, spans, block_size=8, top_n=4, impl=impl) for impl in ("triton", "torch")
    )
    assert torch.equal(got.sort(-1)[0], want.sort(-1)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("width", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tuning(dtype, width, device):
    x, spans = draw((1, 2100, 2100, 4, 2, width, width, 8, 4), dtype, device)
    want = both(x, spans, "torch", torch.float64, "cpu")
    plain = both(x, spans, "torch")
    q, k, v = (t.detach() for t in x)
    g = torch.Generator().manual_seed(1)
    do, dlse = (((torch.randn(y.shape, generator=g) * 8).round() / 8).to(y) for y in plain[:2])
    dlse = torch.where(plain[1].isfinite(), dlse, 0.0)
    where = launch.capability(q)
    tunings = [candidates(kernel, where, width, q.element_size()) for kernel in ("fwd", "dq", "dkdv")]
    for i in range(max(map(len, tunings))):
        fwd, *pair = (each[min(i, len(each) - 1)] for each in tunings)
        out = kernels.forward(q, k, v, None, spans, tuning=fwd)
        grads = kernels.backward(do, dlse, q, k, v, *out, None, spans, tuning=pair)
        within_budget((*out, *grads), want, plain, x, note=f"{fwd}, {pair}")
