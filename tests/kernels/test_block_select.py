"""The estimates of the weights: hostile sizes, every dtype, the same bits from run to run."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.ops.engines import block_select as engine  # noqa: E402
from effattn_lite.testing import budget, flat, max_error, relative_error  # noqa: E402

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
SIZES = (
    dict(B=1, T=1, H=1, HKV=1, K=1),
    dict(B=2, T=63, H=4, HKV=2, K=17),
    dict(B=1, T=150, H=2, HKV=1, K=100),
    dict(B=1, T=257, H=1, HKV=1, K=256),
)

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(B, T, H, HKV, K, dtype, device):
    g = torch.Generator().manual_seed(0)
    shapes = (B, T, H, K), (B, T, HKV, K)
    return [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]


def hold(run, x, launches, magnitudes=(0.0, 0.0)):
    """Kernel against float64, within twice what plain torch loses in float32; and the same bits again."""
    want = flat((run(*(t.double().cpu() for t in x), impl="torch"),))
    plain = flat((run(*(t.float() for t in x), impl="torch"),))
    assert not launches
    got, again = (flat((run(*x, impl="triton"),)) for _ in range(2))
    assert launches
    for g, a, w, p, m in zip(got, again, want, plain, magnitudes[: len(got)], strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, a)
        # estimates are float32 whatever the inputs, which hold the same numbers in every run
        limit = budget(w, p, "float32", magnitude=m, terms=sum(x[0].shape[1::2]))
        assert max_error(g, w) <= limit, (max_error(g, w), limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("block_size, centred", ((8, False), (64, True), (100, True), (300, False)))
def test_block_means(sizes, block_size, centred, dtype, device, launches):
    _, k = draw(**sizes, dtype=dtype, device=device)

    def run(x, impl):
        wide = torch.promote_types(x.dtype, torch.float32)
        # rounded, so that all runs subtract the same
        centre = x.double().mean(1).float().to(wide) if centred else None
        return engine.block_means(x, block_size, centre=centre, impl=impl)

    # tokens and their mean cancel
    hold(run, [k], launches, magnitudes=(float(k.abs().max()) if centred else 0.0, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("block_size, stride", ((8, 4), (16, 16), (128, 8), (6, 3), (128, 2)))
def test_antidiagonal_mass(sizes, block_size, stride, dtype, device, launches):
    options = dict(block_size=block_size, stride=stride, scale=sizes["K"] ** -0.5)
    hold(
        lambda q, k, impl: engine.antidiagonal_mass(q, k, **options, impl=impl),
        draw(**sizes, dtype=dtype, device=device),
        launches,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("last", (1, 20, 64, 128))
def test_last_query_sums(sizes, last, dtype, device, launches):
    hold(
        lambda q, k, impl: engine.last_query_sums(q, k, last=last, scale=sizes["K"] ** -0.5, impl=impl),
        draw(**sizes, dtype=dtype, device=device),
        launches,
    )


@pytest.mark.parametrize("numbers", (2**12, 2**22))
def test_programs_share_scratch(numbers, device, monkeypatch):
    """A program turns one tile after the other in the same place."""
    from effattn_lite.kernels import block_select as kernels

    q, k = draw(B=1, T=300, H=2, HKV=2, K=16, dtype=torch.float32, device=device)
    want = kernels.last_query_sums(q, k, 32, 0.25)
    monkeypatch.setattr(kernels, "SCRATCH", numbers)
    assert max_error(kernels.last_query_sums(q, k, 32, 0.25), want) == 0


def test_large_scores(device):
    """Scores of some thousands: every exponential is of a number <= 0."""
    q, k = draw(B=1, T=80, H=1, HKV=1, K=16, dtype=torch.float32, device=device)
    sums = engine.last_query_sums(1e3 * q, k, last=16, scale=1.0, impl="triton")
    mass = engine.antidiagonal_mass(1e3 * q, k, block_size=8, stride=4, scale=1.0, impl="triton")
    assert all(x.isfinite().all() for x in (*sums, mass))
    assert (
        max_error(sums[0].sum(), torch.tensor(16.0)) < 1e-4
        and max_error(mass.sum(), torch.tensor(20.0)) < 1e-4
    )


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_int32_elements():
    """2^31 elements and more in q and k: the last head's estimates are those of the head alone.

    Up to rounding: torch sums one head's weights in another order than those of many.
    """
    T, H, K = 2**17 + 77, 128, 128
    q, k = (torch.randn(1, T, H, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    alone = [x[:, :, -1:].clone() for x in (q, k)]

    def estimates(q, k):
        means = engine.block_means(k, 128, impl="triton")
        sums = engine.last_query_sums(q, k, last=64, scale=0.1, impl="triton")
        mass = engine.antidiagonal_mass(q, k, block_size=1024, stride=16, scale=0.1, impl="triton")
        return [x[:, -1] for x in (*means, *sums, mass)]

    pairs = zip(estimates(q, k), estimates(*alone), strict=True)
    assert [relative_error(a, b) < 1e-5 for a, b in pairs] == [True] * 5
