"""Attention with a filter in its softmax: hostile sizes and masks, every tuning, what is skipped."""

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.kernels import block_filter as kernels  # noqa: E402
from effattn_lite.kernels.common import launch  # noqa: E402
from effattn_lite.ops.engines.block_filter import attend  # noqa: E402
from effattn_lite.testing import budget, max_error  # noqa: E402

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(B, T, H, HKV, K, V, QS, BS, dtype, device, share=0.5):
    g = torch.Generator().manual_seed(0)
    shapes = (B, T, H, K), (B, T, HKV, K), (B, T, HKV, V)
    x = [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]
    return *x, (torch.rand(B, H, -(-T // QS), -(-T // BS), generator=g) < share).to(device)


def hold(x, skip, QS, BS, launches=None):
    options = dict(query_block_size=QS, block_size=BS, skip=skip)
    q, k, v, mask = x
    want = attend(*(t.double().cpu() for t in (q, k, v)), mask.cpu(), impl="torch", **options)
    plain = attend(q, k, v, mask, impl="torch", **options)
    got = attend(q, k, v, mask, impl="triton", **options)
    assert got[0].dtype == q.dtype
    name = str(q.dtype).removeprefix("torch.")
    for g, w, p in zip(got, want, plain, strict=True):
        error, limit = max_error(g, w), budget(w, p, name, terms=max(q.shape[3], v.shape[3]))
        assert error <= limit, f"error {error:.2e}, budget {limit:.2e}"
    return got


HOSTILE = (
    (dict(B=1, T=1, H=1, HKV=1, K=1, V=1), 4, 1, -1.0),
    (dict(B=2, T=63, H=4, HKV=2, K=20, V=36), 16, 5, -1.0),
    (dict(B=1, T=90, H=2, HKV=1, K=64, V=16), 8, 16, -0.7),
    (dict(B=1, T=200, H=1, HKV=1, K=16, V=48), 64, 48, -2.0),
    (dict(B=1, T=150, H=2, HKV=2, K=16, V=16), 256, 16, -1.5),
    (dict(B=1, T=140, H=1, HKV=1, K=256, V=17), 32, 32, -50.0),
    (dict(B=1, T=130, H=1, HKV=1, K=32, V=32), 128, 64, -math.inf),
)


@pytest.mark.parametrize("sizes, QS, BS, skip", HOSTILE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hostile_shapes(sizes, QS, BS, skip, dtype, device):
    hold(draw(**sizes, QS=QS, BS=BS, dtype=dtype, device=device), skip, QS, BS)


@pytest.mark.parametrize("share", (0.0, 0.1))
def test_rows_that_see_nothing(share, device):
    sizes = dict(B=1, T=70, H=2, HKV=1, K=16, V=16, QS=16, BS=8)
    o, lse = hold(draw(**sizes, dtype=torch.float32, device=device, share=share), -1.0, 16, 8)
    empty = lse == -torch.inf
    assert empty.any() and not o[empty].any()


def test_masked_blocks_are_not_read(device):
    """What no block of queries chose may be anything."""
    q, k, v, mask = draw(
        B=1, T=64, H=1, HKV=1, K=16, V=16, QS=16, BS=8, dtype=torch.float32, device=device, share=1.0
    )
    mask[..., 3] = False
    options = dict(query_block_size=16, block_size=8, skip=-1.0, impl="triton")
    want = attend(q, k, v, mask, **options)
    k[:, 24:32], v[:, 24:32] = float("nan"), float("nan")
    assert max_error(attend(q, k, v, mask, **options), want) == 0


def test_values_of_a_skipped_block_are_not_read(device):
    """Where all warps of a tile leave a block out, its values may be anything: the product is not formed."""
    q, k, v, mask = draw(
        B=1, T=64, H=1, HKV=1, K=16, V=16, QS=16, BS=16, dtype=torch.float32, device=device, share=1.0
    )
    q[..., 0], k[..., 0] = 8.0, 8.0
    k[:, 16:32, :, 0] = -8.0
    v[:, 16:32] = float("nan")
    options = dict(query_block_size=16, block_size=16, impl="triton")
    assert attend(q, k, v, mask, skip=-5.0, **options)[0][:, 32:].isfinite().all()
    assert attend(q, k, v, mask, skip=-500.0, **options)[0][:, 32:].isnan().any()


def test_packed_sequences(device):
    sizes = dict(B=1, T=90, H=2, HKV=1, K=16, V=16, QS=16, BS=8)
    q, k, v, _ = draw(**sizes, dtype=torch.float32, device=device)
    edges = [0, 0, 50, 51, 90]
    rows = sum(-(-(b - a) // 16) for a, b in zip(edges, edges[1:], strict=False))
    mask = torch.rand(1, 2, rows, 7, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    options = dict(query_block_size=16, block_size=8, skip=-1.0, impl="triton")
    packed = attend(q, k, v, mask, cu_seqlens=torch.tensor(edges, device=device), **options)
    row = 0
    for a, b in zip(edges, edges[1:], strict=False):
        mine = mask[:, :, row : row - (a - b) // 16, : -(-(b - a) // 8)]
        row -= (a - b) // 16
        if a < b:
            alone = attend(q[:, a:b], k[:, a:b], v[:, a:b], mine, **options)
            assert max_error(tuple(x[:, a:b] for x in packed), alone) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("width", (64, 128, 256))
@pytest.mark.parametrize("entry", sorted({*kernels.HALF, *kernels.FLOAT} - {launch.INTERPRETER}))
def test_every_tuning(dtype, width, entry, device, monkeypatch):
    """Tables of older GPUs are right on this one too."""
    size = torch.empty(0, dtype=dtype).element_size()
    table = kernels.HALF if size == 2 else kernels.FLOAT
    if entry > launch.capability(torch.empty(0, device=device)) or width not in table.get(entry, ()):
        pytest.skip("no entry for this GPU, dtype and width")
    monkeypatch.setattr(kernels, "tuning", lambda *_: table[entry][width])
    BS = min(128, 2**15 // (width * size))
    sizes = dict(B=1, T=500, H=2, HKV=1, K=width, V=width)
    for QS in (128, 16):
        hold(draw(**sizes, QS=QS, BS=BS, dtype=dtype, device=device), -3.0, QS, BS)
