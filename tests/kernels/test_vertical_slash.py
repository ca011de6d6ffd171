"""Attention on columns and diagonals: the lists of tiles, hostile sizes and sets, every tuning."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.kernels import vertical_slash as kernels  # noqa: E402
from effattn_lite.kernels.common import launch  # noqa: E402
from effattn_lite.ops.engines.vertical_slash import attend, table  # noqa: E402
from effattn_lite.testing import budget, max_error, relative_error  # noqa: E402

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


@pytest.mark.parametrize("BM, BN", ((8, 8), (16, 4), (8, 4)))
@pytest.mark.parametrize("T", (1, 37, 64))
@pytest.mark.parametrize("share", (0.0, 0.05, 0.5, 1.0))
def test_lists_hold_the_tiles_that_diagonals_cross(T, BM, BN, share, device):
    """By brute force: a tile is filled, crossed or neither, and stands in its list once."""
    slash = (torch.rand(1, 2, T, generator=torch.Generator().manual_seed(0)) < share).to(torch.uint8)
    slash[:, 1] = 1
    slash[:, 1, T // 2] = 0  # tiles that lack a single diagonal
    NT = -(-T // BM)
    far, counts, crossed = (x.cpu() for x in kernels.distances(slash.to(device), NT, BM, BN))
    for h in range(2):
        chosen = set(slash[0, h].nonzero()[:, 0].tolist())
        for i in range(NT):
            last = i * (BM // BN) + BM // BN - 1
            full, some = (
                [last - u for u in far[0, h, n, : counts[0, h, n, last]].tolist()] for n in range(2)
            )
            assert full == sorted(full, reverse=True) and some == sorted(some, reverse=True)
            for j in range(last + 1):
                pairs = [t - s for t in range(i * BM, i * BM + BM) for s in range(j * BN, j * BN + BN)]
                hits = [p in chosen for p in pairs]
                assert (j in full) == all(hits), (h, i, j)
                assert (j in some) == (any(hits) and not all(hits)), (h, i, j)
                assert bool(crossed[0, h, last - j]) == any(hits)


def test_compacted(device):
    chosen = torch.rand(3, 2, 50, generator=torch.Generator().manual_seed(0)).to(device) < 0.3
    found = kernels.compacted(chosen, chosen.cumsum(-1))
    for row, mask in zip(found.flatten(0, 1), chosen.flatten(0, 1), strict=True):
        want = mask.nonzero()[:, 0].tolist()
        assert row.tolist() == want + [-1] * (50 - len(want))


def draw(B, T, H, HKV, K, V, nv, ns, dtype, device):
    g = torch.Generator().manual_seed(0)
    shapes = (B, T, H, K), (B, T, HKV, K), (B, T, HKV, V)
    x = [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]
    # in any order, some twice, some absent
    sets = [torch.randint(-1, T + 1, (B, H, n), generator=g).to(device) for n in (nv, ns)]
    return *x, *sets


def hold(q, k, v, columns, diagonals):
    want = attend(*(t.double().cpu() for t in (q, k, v)), columns.cpu(), diagonals.cpu(), impl="torch")
    plain = attend(q, k, v, columns, diagonals, impl="torch")
    got = attend(q, k, v, columns, diagonals, impl="triton")
    name = str(q.dtype).removeprefix("torch.")
    for g, w, p in zip(got, want, plain, strict=True):
        error, limit = max_error(g, w), budget(w, p, name, terms=max(q.shape[3], v.shape[3]))
        assert error <= limit, f"error {error:.2e}, budget {limit:.2e}"
    return got


HOSTILE = (
    dict(B=1, T=1, H=1, HKV=1, K=1, V=1, nv=1, ns=1),
    dict(B=2, T=77, H=4, HKV=2, K=20, V=36, nv=9, ns=5),
    dict(B=1, T=150, H=2, HKV=1, K=100, V=7, nv=70, ns=1),
    dict(B=1, T=150, H=2, HKV=1, K=16, V=16, nv=1, ns=120),
    dict(B=1, T=65, H=1, HKV=1, K=256, V=256, nv=20, ns=20),
    dict(B=1, T=90, H=2, HKV=2, K=16, V=16, nv=0, ns=4),
    dict(B=1, T=90, H=2, HKV=2, K=16, V=16, nv=4, ns=0),
    dict(B=1, T=33, H=1, HKV=1, K=16, V=16, nv=0, ns=0),
)


@pytest.mark.parametrize("sizes", HOSTILE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hostile_shapes(sizes, dtype, device):
    o, lse = hold(*draw(**sizes, dtype=dtype, device=device))
    empty = lse == -torch.inf
    assert not o[empty].any()
    if sizes["nv"] + sizes["ns"] == 0:
        assert empty.all()


def test_a_band_of_diagonals_is_filled(device):
    """Neighbouring diagonals, as of a window: tiles without a mask beside those with one."""
    q, k, v, columns, _ = draw(
        B=1, T=200, H=2, HKV=1, K=16, V=16, nv=6, ns=0, dtype=torch.float32, device=device
    )
    band = torch.arange(100, device=device).expand(1, 2, 100)
    _, counts, _ = kernels.distances(table(band, 200), 7, 32, 16)
    assert counts[..., 0, -1].min() > 1 and counts[..., 1, -1].min() > 1
    hold(q, k, v, columns, band)


def test_same_bits_from_run_to_run(device):
    x = draw(B=1, T=150, H=2, HKV=1, K=32, V=16, nv=20, ns=9, dtype=torch.float16, device=device)
    first, again = (attend(*x, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("width", (64, 128, 256))
@pytest.mark.parametrize("entry", sorted({*kernels.HALF, *kernels.FLOAT} - {launch.INTERPRETER}))
def test_every_tuning(dtype, width, entry, device, monkeypatch):
    """Tables of older GPUs are right on this one too."""
    size = torch.empty(0, dtype=dtype).element_size()
    choices = kernels.HALF if size == 2 else kernels.FLOAT
    if entry > launch.capability(torch.empty(0, device=device)) or width not in choices.get(entry, ()):
        pytest.skip("no entry for this GPU, dtype and width")
    monkeypatch.setattr(kernels, "tuning", lambda *_: choices[entry][width])
    for nv, ns in ((60, 20), (20, 400)):
        hold(*draw(B=1, T=700, H=2, HKV=1, K=width, V=width, nv=nv, ns=ns, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_int32_elements():
    """2^31 elements and more in q, k, v and o: the last head's rows are those of the head alone."""
    T, H, K = 2**17 + 77, 128, 128
    x = [torch.randn(1, T, H, K, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    sets = [torch.randint(T, (1, H, 100), device="cuda") for _ in range(2)]
    o = attend(*x, *sets, impl="triton")[0][:, -500:, -1:]
    alone = attend(*(t[:, :, -1:].clone() for t in x), *(s[:, -1:] for s in sets), impl="triton")[0][:, -500:]
    assert relative_error(o, alone) == 0
