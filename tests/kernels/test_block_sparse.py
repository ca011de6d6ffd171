"""Block-sparse kernels against eager torch: hostile blocks and sets, packed sequences, every tuning."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.kernels import block_sparse as kernels  # noqa: E402
from effattn_lite.kernels.common import launch  # noqa: E402
from effattn_lite.kernels.common.softmax_tuning import candidates  # noqa: E402
from effattn_lite.ops import block_sparse_attention  # noqa: E402
from effattn_lite.ops.engines.block_sparse import Blocks  # noqa: E402
from effattn_lite.testing import budget, max_error  # noqa: E402

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
# B, T, H, HKV, K, V, query_block_size, block_size, causal
SHAPES = (
    (2, 63, 4, 2, 16, 24, 16, 16, True),
    (1, 130, 2, 1, 33, 17, 32, 16, True),
    (1, 130, 2, 2, 64, 64, 16, 64, True),
    (1, 100, 3, 1, 20, 20, 128, 128, True),
    (1, 90, 7, 1, 16, 16, 20, 24, False),
    (1, 1, 2, 1, 8, 8, 16, 16, True),
)

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(shape, dtype, device, *, heads=None, share=0.4, seed=0):
    """q, k, v and a mask of chosen blocks, one row of it empty; `heads` sets, default one a key head."""
    B, T, H, HKV, K, V, QS, BS, _ = shape
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(s, generator=g) for s in ((B, T, H, K), (B, T, HKV, K), (B, T, HKV, V))]
    mask = torch.rand(B, heads or HKV, -(-T // QS), -(-T // BS), generator=g) < share
    if mask.shape[2] > 2:
        mask[:, :, 2] = False
    return [t.to(dtype).to(device).requires_grad_() for t in x], mask.to(device)


def numbers(mask):
    """The mask as block numbers [B, NQ, heads, n], from the last to the first, some of them twice."""
    NK = mask.shape[-1]
    index = torch.where(mask, torch.arange(NK, device=mask.device), -1).flip(-1).transpose(1, 2)
    return torch.cat((index, index[..., : NK // 2]), -1).contiguous()


def both(x, sets, impl, dtype=None, device=None, **options):
    """o, lse, dq, dk, dv from fixed cotangents; lse counts where it is finite."""
    x = [t.detach().to(dtype or t.dtype).to(device or t.device).requires_grad_() for t in x]
    sets = {n: s.to(device or s.device) for n, s in sets.items()}
    if options.get("cu_seqlens") is not None:
        options["cu_seqlens"] = options["cu_seqlens"].to(device or x[0].device)
    o, lse = block_sparse_attention(*x, **sets, **options, return_lse=True, impl=impl)
    g = torch.Generator().manual_seed(1)
    do, dlse = (((torch.randn(y.shape, generator=g) * 8).round() / 8).to(y) for y in (o, lse))
    seen = torch.where(lse.isfinite(), lse, 0.0)
    return o, lse, *torch.autograd.grad([o, seen], x, [do, dlse])


def hold(x, sets, launches, **options):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    want = both(x, sets, "torch", torch.float64, "cpu", **options)
    plain = both(x, sets, "torch", **options)
    assert not launches
    got = both(x, sets, "triton", **options)
    assert launches, "no kernel was launched"
    terms = max(x[0].shape[3], x[2].shape[3])
    # where a score is differentiated, numbers as large as the largest gradient are subtracted
    largest = max(max_error(w, 0 * w) for w in want[2:])
    for name, g, w, p in zip(("o", "lse", "dq", "dk", "dv"), got, want, plain, strict=True):
        assert torch.equal(g.isfinite().cpu(), w.isfinite()), f"{name}: other rows are empty"
        g, w, p = (torch.where(t.isfinite(), t, 0.0).detach() for t in (g, w, p))
        size = dict(factor=3.0, magnitude=largest) if name in ("dq", "dk") else dict(factor=3.0)
        limit = budget(w, p, str(x[0].dtype).removeprefix("torch."), terms=terms, **size)
        error = max_error(g, w)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, dtype, device, launches):
    """A mask for every key head, and block numbers, unsorted and repeated, for every query head."""
    options = dict(query_block_size=shape[6], block_size=shape[7], causal=shape[8])
    x, mask = draw(shape, dtype, device)
    got = hold(x, dict(block_mask=mask), launches, **options)
    if mask.shape[2] > 2:
        assert (got[1] == -torch.inf).any(), "some row must see nothing"
    launches.clear()
    x, mask = draw(shape, dtype, device, heads=shape[2])
    hold(x, dict(block_indices=numbers(mask)), launches, **options)


def test_mask_and_numbers_give_the_same_bits(device):
    shape = SHAPES[1]
    options = dict(query_block_size=shape[6], block_size=shape[7])
    x, mask = draw(shape, torch.float32, device)
    by_mask = both(x, dict(block_mask=mask), "triton", **options)
    by_numbers = both(x, dict(block_indices=numbers(mask)), "triton", **options)
    again = both(x, dict(block_mask=mask), "triton", **options)
    for a, b, c in zip(by_mask, by_numbers, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("QS, BS", ((16, 16), (32, 24)))
def test_packed_sequences(QS, BS, device, launches):
    """Sequences laid end to end, empty ones among them, one longer than a block."""
    edges = torch.tensor([0, 0, 50, 51, 51, 90], dtype=torch.int32)
    x, _ = draw((1, 90, 2, 1, 16, 16, QS, BS, True), torch.float32, device)
    g = torch.Generator().manual_seed(2)
    rows = int((-(-edges.diff() // QS)).sum())
    mask = torch.rand(1, 1, rows, -(-50 // BS), generator=g) < 0.7
    hold(x, dict(block_mask=mask.to(device)), launches, query_block_size=QS, block_size=BS, cu_seqlens=edges)


def test_a_key_that_all_queries_see(device, launches):
    """The list of the first block of keys is cut among programs, and its parts are summed."""
    T, QS = (2100, 16) if not CUDA else (40_000, 16)
    x, mask = draw((1, T, 1, 1, 16, 16, QS, 128, True), torch.float32, device, share=0.02)
    mask[..., 0] = True
    hold(x, dict(block_mask=mask), launches, query_block_size=QS, block_size=128)


def test_strides(device):
    """Views that are not contiguous give what their copies give."""
    x, mask = draw(SHAPES[0], torch.float32, device)
    views = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    options = dict(block_mask=mask, query_block_size=16, block_size=16, impl="triton")
    copies = [t.detach() for t in x]
    assert torch.equal(block_sparse_attention(*views, **options), block_sparse_attention(*copies, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("width", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tuning(dtype, width, device):
    """All tiles of the table, forward and backward, for blocks of 128 and of 64."""
    for QS, BS in ((128, 128), (64, 64)):
        x, mask = draw((1, 500, 4, 2, width, width, QS, BS, True), dtype, device)
        want = both(
            x, dict(block_mask=mask), "torch", torch.float64, "cpu", query_block_size=QS, block_size=BS
        )
        plain = both(x, dict(block_mask=mask), "torch", query_block_size=QS, block_size=BS)
        blocks = Blocks(BS, QS, True, width**-0.5)
        q, k, v = (t.detach() for t in x)
        g = torch.Generator().manual_seed(1)
        do, dlse = (((torch.randn(y.shape, generator=g) * 8).round() / 8).to(y) for y in plain[:2])
        dlse = torch.where(plain[1].isfinite(), dlse, 0.0)
        name, size = str(dtype).removeprefix("torch."), q.element_size()
        largest = max(max_error(w, 0 * w) for w in want[2:])
        where = launch.capability(q)
        for tuning in candidates("fwd", where, width, size):
            o, lse = kernels.forward(q, k, v, None, mask, None, blocks, tuning=tuning)
            assert max_error(o, want[0]) <= budget(want[0], plain[0], name, terms=width), tuning
        tunings = [candidates(kernel, where, width, size) for kernel in ("dq", "dkdv")]
        for i in range(max(map(len, tunings))):
            pair = [each[min(i, len(each) - 1)] for each in tunings]
            grads = kernels.backward(do, dlse, q, k, v, o, lse, None, mask, None, blocks, tuning=pair)
            for g, w, p in zip(grads, want[2:], plain[2:], strict=True):
                limit = budget(w, p, name, factor=3.0, magnitude=largest, terms=width)
                assert max_error(g, w) <= limit, pair
