"""Kernels for a set of blocks a token against eager torch: groups, tiles, decoding, packed sequences."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.kernels import block_sparse_launch  # noqa: E402
from effattn_lite.kernels import token_sparse as kernels  # noqa: E402
from effattn_lite.kernels.common import launch  # noqa: E402
from effattn_lite.kernels.common.softmax_tuning import candidates  # noqa: E402
from effattn_lite.ops import block_sparse_attention  # noqa: E402
from effattn_lite.ops.engines import token_sparse  # noqa: E402
from effattn_lite.testing import budget, max_error  # noqa: E402

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
# B, T, Tk, H, HKV, K, V, block_size, causal
SHAPES = (
    (2, 37, 37, 4, 2, 16, 24, 8, True),
    (1, 90, 90, 3, 1, 33, 17, 20, True),
    (1, 21, 21, 16, 1, 20, 20, 16, True),
    (1, 7, 40, 20, 1, 16, 16, 16, True),
    (1, 70, 90, 2, 2, 16, 16, 24, False),
    (1, 1, 1, 2, 1, 8, 8, 16, True),
)

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(shape, dtype, device, *, heads=None, share=0.4, seed=0):
    """q, k, v and a mask of chosen blocks, one row of it empty; `heads` sets, default one a key head."""
    B, T, Tk, H, HKV, K, V, BS, _ = shape
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(s, generator=g) for s in ((B, T, H, K), (B, Tk, HKV, K), (B, Tk, HKV, V))]
    mask = torch.rand(B, heads or HKV, T, -(-Tk // BS), generator=g) < share
    if T > 2:
        mask[:, :, 2] = False
    return [t.to(dtype).to(device).requires_grad_() for t in x], mask.to(device)


def numbers(mask):
    """The mask as block numbers [B, T, heads, n], from the last to the first, some of them twice."""
    NK = mask.shape[-1]
    index = torch.where(mask, torch.arange(NK, device=mask.device), -1).flip(-1).transpose(1, 2)
    return torch.cat((index, index[..., : NK // 2]), -1).contiguous()


def both(x, sets, impl, dtype=None, device=None, **options):
    """o, lse, dq, dk, dv from fixed cotangents; lse counts where it is finite."""
    x = [t.detach().to(dtype or t.dtype).to(device or t.device).requires_grad_() for t in x]
    sets = {n: s.to(device or s.device) for n, s in sets.items()}
    if options.get("cu_seqlens") is not None:
        options["cu_seqlens"] = options["cu_seqlens"].to(device or x[0].device)
    o, lse = token_sparse.attend(*x, **sets, **options, impl=impl)
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
    within_budget(got, want, plain, x)
    return got


def within_budget(got, want, plain, x, *, note=""):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, dtype, device, launches):
    """A mask for every key head, and block numbers, unsorted and repeated, for every query head."""
    options = dict(block_size=shape[7], causal=shape[8])
    x, mask = draw(shape, dtype, device)
    got = hold(x, dict(block_mask=mask), launches, **options)
    if shape[1] > 2:
        assert (got[1] == -torch.inf).any(), "some row must see nothing"
    launches.clear()
    x, mask = draw(shape, dtype, device, heads=shape[3])
    hold(x, dict(block_indices=numbers(mask)), launches, **options)


def test_all_blocks_are_softmax_attention(device):
    """Every token has chosen every block, twice: nothing is left out, nothing counts twice."""
    x, _ = draw(SHAPES[0], torch.float32, device)
    every = torch.arange(5, device=device).repeat(2).expand(2, 37, 2, 10)
    got = token_sparse.attend(*x, block_indices=every, block_size=8, impl="triton")[0]
    q, k, v = (t.transpose(1, 2).double() for t in x)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert max_error(got.detach(), want.transpose(1, 2).detach()) < 1e-5


def test_mask_and_numbers_give_the_same_bits(device):
    shape = SHAPES[1]
    x, mask = draw(shape, torch.float32, device)
    by_mask = both(x, dict(block_mask=mask), "triton", block_size=shape[7])
    by_numbers = both(x, dict(block_indices=numbers(mask)), "triton", block_size=shape[7])
    again = both(x, dict(block_mask=mask), "triton", block_size=shape[7])
    for a, b, c in zip(by_mask, by_numbers, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("H", (2, 16))
def test_numbers_of_no_block(H, device, launches):
    """Numbers behind the last block, where another token's row of the mask begins, add nothing."""
    x, mask = draw((2, 21, 21, H, 1, 16, 16, 8, True), torch.float32, device, share=0.3)
    index = numbers(mask)
    more = torch.tensor([3, -7, 4, 999], device=device).expand(*index.shape[:3], 4)
    got = hold(x, dict(block_indices=torch.cat((index, more), -1)), launches, block_size=8)
    for a, b in zip(got, both(x, dict(block_mask=mask), "triton", block_size=8), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("H, heads", ((2, 1), (2, 2), (16, 1)))
def test_packed_sequences(H, heads, device, launches):
    """Sequences laid end to end, empty ones among them, one longer than a tile of tokens."""
    edges = torch.tensor([0, 0, 50, 51, 51, 90], dtype=torch.int32)
    x, _ = draw((1, 90, 90, H, 1, 16, 16, 12, True), torch.float32, device)
    g = torch.Generator().manual_seed(2)
    mask = (torch.rand(1, heads, 90, -(-50 // 12), generator=g) < 0.6).to(device)
    hold(x, dict(block_mask=mask), launches, block_size=12, cu_seqlens=edges)
    launches.clear()
    hold(x, dict(block_indices=numbers(mask)), launches, block_size=12, cu_seqlens=edges)


def test_a_block_that_all_tokens_chose(device, launches, monkeypatch):
    """The list of the first block of keys is cut among programs, and its parts are summed."""
    monkeypatch.setattr(block_sparse_launch, "LEAST", 32)
    x, mask = draw((1, 200, 200, 2, 1, 16, 16, 40, True), torch.float32, device, share=0.1)
    mask[..., 0] = True
    hold(x, dict(block_mask=mask), launches, block_size=40)
    assert "block_sparse_bwd_sum_kernel" in launches


def test_strides(device):
    """Views that are not contiguous give what their copies give."""
    x, mask = draw(SHAPES[0], torch.float32, device)
    options = dict(block_mask=mask, query_block_size=1, block_size=8, impl="triton")
    views = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    copies = [t.detach() for t in x]
    assert torch.equal(block_sparse_attention(*views, **options), block_sparse_attention(*copies, **options))


@pytest.mark.parametrize("scale", (0.0, -0.3))
def test_scales(scale, device, launches):
    x, mask = draw(SHAPES[0], torch.float32, device)
    hold(x, dict(block_mask=mask), launches, block_size=8, scale=scale)


@pytest.mark.gpu
@pytest.mark.parametrize("width", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tuning(dtype, width, device):
    """All tiles of the table, forward and backward, for tokens that share a tile and tokens alone in one."""
    for H, HKV, BS in ((4, 2, 128), (32, 1, 64), (2, 2, 512)):
        x, mask = draw((1, 500, 500, H, HKV, width, width, BS, True), dtype, device)
        sets = dict(block_mask=mask)
        want = both(x, sets, "torch", torch.float64, "cpu", block_size=BS)
        plain = both(x, sets, "torch", block_size=BS)
        blocks = token_sparse.Blocks(BS, True, width**-0.5)
        q, k, v = (t.detach() for t in x)
        g = torch.Generator().manual_seed(1)
        do, dlse = (((torch.randn(y.shape, generator=g) * 8).round() / 8).to(y) for y in plain[:2])
        dlse = torch.where(plain[1].isfinite(), dlse, 0.0)
        tunings = [
            candidates(kernel, launch.capability(q), width, q.element_size())
            for kernel in ("fwd", "dq", "dkdv")
        ]
        for i in range(max(map(len, tunings))):
            fwd, *pair = (each[min(i, len(each) - 1)] for each in tunings)
            out = kernels.forward(q, k, v, None, mask, None, blocks, tuning=fwd)
            grads = kernels.backward(do, dlse, q, k, v, *out, None, mask, None, blocks, tuning=pair)
            within_budget((*out, *grads), want, plain, x, note=f"{H}/{HKV} heads, {fwd}, {pair}")
