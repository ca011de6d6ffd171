"""The engine's blocks alone against NumPy, then the kernels on hostile shapes and with every tuning."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
import triton.language as tl  # noqa: E402

from effattn_lite.kernels import softmax_attention as kernels  # noqa: E402
from effattn_lite.kernels.common import launch  # noqa: E402
from effattn_lite.kernels.common.softmax import capped, key_blocks, online_step, query_blocks, visible  # noqa: E402
from effattn_lite.kernels.common.tile import edge_block, load_tile, store_tile  # noqa: E402
from effattn_lite.ops.engines.softmax_attention import Pattern, attend  # noqa: E402
from effattn_lite.testing import budget, max_error, relative_error  # noqa: E402

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
# causal, window, sinks, grain: 0 is no window
PATTERNS = [
    (True, 0, 0, 1),
    (False, 0, 0, 1),
    (True, 11, 0, 1),
    (True, 24, 19, 8),
    (False, 9, 3, 1),
    (False, 5, 20, 1),
    (True, 1, 40, 1),
]


@triton.jit
def ranges_kernel(
    out, see, first, last, T, Tk, window, sinks, BLOCK: tl.constexpr, KEYS: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """a, b, c, d, the number of blocks before a, the edge blocks in the order of the loop; and the mask."""
    first += tl.program_id(0) * 0
    last += tl.program_id(0) * 0
    if KEYS:
        a, b, c, d, before = key_blocks(first, last, Tk, window, sinks, BLOCK, CAUSAL, WINDOW, SINKS, GRAIN)
    else:
        a, b, c, d = query_blocks(first, last, T, Tk, window, sinks, BLOCK, CAUSAL, WINDOW, SINKS, GRAIN)
        before = a * 0
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    tl.store(out + 3, d)
    tl.store(out + 4, before)
    for n in range(0, before + b - a + d - c):
        tl.store(out + 5 + n, edge_block(n, before, a, b, c))
    o = tl.arange(0, N)
    b_see = visible(o[:, None] + Tk - T, o[None, :], Tk, window, sinks, CAUSAL, WINDOW, SINKS, GRAIN)
    tl.store(see + o[:, None] * N + o[None, :], b_see.to(tl.int8))


def mask(T, Tk, causal, window, sinks, grain):
    """[T, Tk] of bool, by the definition."""
    t, j = np.arange(Tk - T, Tk)[:, None], np.arange(Tk)
    see = np.ones((T, Tk), bool)
    if window:
        see = (j >= (t // grain + 1) * grain - window) & (j < t + window) | (j < sinks)
    return see & (j <= t) if causal else see


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("T, Tk", ((61, 61), (23, 61), (61, 23)))
def test_only_blocks_that_are_seen_are_visited(pattern, T, Tk, device):
    """A block with a visible pair is visited once, one without is not; the unmasked are wholly visible."""
    causal, window, sinks, grain = pattern
    if T > Tk and grain > 1:
        pytest.skip("a block of queries before the first key has no place in a pattern of blocks")
    want = mask(T, Tk, *pattern)
    flags = dict(CAUSAL=causal, WINDOW=window > 0, SINKS=sinks > 0 and window > 0, GRAIN=grain)
    for keys, BM, BN in ((True, 16, 8), (True, 7, 16), (False, 8, 16), (False, 16, 8)):
        rows, BLOCK = (T, BN) if keys else (Tk, BM)
        tile = BM if keys else BN
        for i in range(0, rows, tile):
            out = torch.full((64,), -1, dtype=torch.int32, device=device)
            see = torch.zeros(64, 64, dtype=torch.int8, device=device)
            shift = Tk - T if keys else 0
            first, last = i + shift, min(i + tile, rows) - 1 + shift
            ranges_kernel[(1,)](out, see, first, last, T, Tk, window, sinks, BLOCK, keys, 64, **flags)
            assert (see.cpu().numpy()[:T, :Tk] == want).all()
            a, b, c, d, _, *edges = out.tolist()
            part = want[i : i + tile] if keys else want[:, i : i + tile].T
            blocks = [part[:, n : n + BLOCK] for n in range(0, part.shape[1], BLOCK)]
            visited = [n for n in edges if n >= 0]
            assert len(set(visited)) == len(visited) and not set(visited) & set(range(b, c))
            assert all(blocks[n].all() and blocks[n].shape[1] == BLOCK for n in range(b, c))
            needed = {n for n, block in enumerate(blocks) if block.any()}
            assert needed <= {*visited, *range(b, c)}
            if T <= Tk:
                # between the last sink and the window's first query there may be a gap
                gap = 0 if keys or not sinks else len(blocks)
                assert len(visited) + c - b <= len(needed) + gap


@triton.jit
def online_kernel(s, v, o, m, l, scale, GUARD: tl.constexpr, SOFTCAP: tl.constexpr):
    """Three blocks of 16 keys on 16 rows."""
    r = tl.arange(0, 16)
    b_o, b_l = tl.zeros([16, 16], tl.float32), tl.zeros([16], tl.float32)
    b_m = tl.full([16], float("-inf"), tl.float32)
    for i in range(0, 3):
        b_s = capped(tl.load(s + r[:, None] * 48 + i * 16 + r[None, :]), 0.5, 2.0, SOFTCAP)
        b_v = tl.load(v + (i * 16 + r[:, None]) * 16 + r[None, :])
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, scale, GUARD)
    tl.store(o + r[:, None] * 16 + r[None, :], b_o)
    tl.store(m + r, b_m)
    tl.store(l + r, b_l)


@pytest.mark.parametrize("guard, softcap", ((True, False), (False, False), (False, True)))
def test_online_step(guard, softcap, device):
    rng = np.random.default_rng(0)
    s, v = 3 * rng.normal(size=(16, 48)), rng.normal(size=(48, 16))
    if guard:  # rows that see nothing at first, and one that never sees anything
        s[:8, :20], s[3] = -np.inf, -np.inf
    s_, v_ = (torch.tensor(x, dtype=torch.float32, device=device) for x in (s, v))
    o, m, l = (torch.empty(shape, device=device) for shape in ((16, 16), 16, 16))
    online_kernel[(1,)](s_, v_, o, m, l, 0.7, guard, softcap)
    s = 2 * np.tanh(0.25 * s) if softcap else s
    top = 0.7 * s.max(1)
    p = np.exp2(0.7 * s - np.where(top == -np.inf, 0, top)[:, None])
    assert relative_error((o, l), (p @ v, p.sum(1))) < 1e-5
    assert max_error(m, top) < 1e-5


@triton.jit
def copy_kernel(x, y, rows, stride, COLS: tl.constexpr, CUT: tl.constexpr):
    store_tile(y, load_tile(x, stride, rows, COLS, 16, 32, CUT), COLS, rows, COLS, 16, 32)


@pytest.mark.parametrize(
    "rows, cols, cut", ((16, 32, False), (16, 19, False), (5, 32, True), (1, 1, True), (0, 7, True))
)
def test_tiles_stay_inside(rows, cols, cut, device):
    """Nothing outside is read (it is NaN) or written."""
    x = torch.full((18, 40), float("nan"), device=device)
    x[:rows, :cols] = torch.randn(rows, cols)
    y = torch.full((20 * cols,), 7.0, device=device)
    copy_kernel[(1,)](x, y, rows, 40, cols, cut)
    assert max_error(y[: rows * cols].view(rows, cols), x[:rows, :cols]) == 0
    assert (y[rows * cols :] == 7).all()


@pytest.mark.parametrize("edges", ([0, 5], [0, 0], [0, 0, 16, 17, 17, 64, 64], list(range(40))))
@pytest.mark.parametrize("block", (1, 16))
def test_tile_table(edges, block, device):
    table = launch.tile_table(
        torch.tensor(edges, dtype=torch.int32, device=device), edges[-1], block
    ).tolist()
    want = [
        [n, i]
        for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
        for i in range(-(-(b - a) // block))
    ]
    assert [row for row in table if row[0] >= 0] == want == table[: len(want)]


def draw(B, T, Tk, H, HKV, K, V, dtype, device):
    g = torch.Generator().manual_seed(0)
    shapes = (B, T, H, K), (B, Tk, HKV, K), (B, Tk, HKV, V), (B, T, H, V), (B, T, H)
    q, k, v, do, dlse = (torch.randn(s, generator=g).to(dtype).to(device) for s in shapes)
    return (q, k, v), (do, dlse.float())


def hold(got, want, plain, dtype):
    """The law's budget for (o, lse, dq, dk, dv)."""
    name = str(dtype).removeprefix("torch.")
    terms = max(want[2].shape[-1], want[4].shape[-1])
    # the gradient of a score is a difference of two products, each as large as the largest gradient
    cancels = max(float(x.abs().max()) if x.numel() else 0.0 for x in want[2:])
    for what, g, w, p, factor in zip(
        ("o", "lse", "dq", "dk", "dv"), got, want, plain, (2, 2, 3, 3, 3), strict=True
    ):
        magnitude = cancels if what in ("dq", "dk") else 0.0
        error, limit = max_error(g, w), budget(w, p, name, factor=factor, magnitude=magnitude, terms=terms)
        assert error <= limit, f"{what}: error {error:.2e}, budget {limit:.2e}"


def everything(x, grads, dtype, impl, **options):
    x = [t.detach().to(dtype).requires_grad_() for t in x]
    out = attend(*x, impl=impl, **options)
    # lse is -inf where nothing is seen: its gradient there means nothing
    dlse = torch.where(out[1].isfinite(), grads[1].to(out[1]), 0)
    return (*out, *torch.autograd.grad(out, x, (grads[0].to(dtype), dlse)))


HOSTILE = [
    (dict(B=1, T=1, Tk=1, H=1, HKV=1, K=1, V=1), dict(causal=False)),
    (dict(B=2, T=17, Tk=17, H=3, HKV=1, K=100, V=7), dict()),
    (dict(B=1, T=33, Tk=97, H=2, HKV=2, K=7, V=129), dict(window=40, sinks=5)),
    (dict(B=1, T=70, Tk=30, H=1, HKV=1, K=16, V=16), dict()),
    (dict(B=1, T=40, Tk=0, H=2, HKV=1, K=16, V=16), dict(causal=False)),
    (dict(B=1, T=65, Tk=65, H=6, HKV=2, K=256, V=256), dict(window=3)),
    (dict(B=1, T=95, Tk=95, H=2, HKV=1, K=60, V=16), dict(window=48, sinks=24, grain=24)),
    (dict(B=1, T=50, Tk=50, H=2, HKV=1, K=16, V=16), dict(softcap=1.5, window=9)),
    (dict(B=1, T=80, Tk=80, H=1, HKV=1, K=16, V=16), dict(window=17, sinks=40, causal=False)),
]  # fmt: skip


@pytest.mark.parametrize("sizes, options", HOSTILE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("nan_empty")
def test_hostile_shapes(sizes, options, dtype, device):
    x, grads = draw(**sizes, dtype=dtype, device=device)
    runs = ((dtype, "triton"), (torch.float64, "torch"), (dtype, "torch"))
    hold(*(everything(x, grads, kind, impl, **options) for kind, impl in runs), dtype)


@pytest.mark.parametrize(
    "edges",
    ([0, 0, 0, 90], [0, 1, 2, 3, 34, 34, 90], [0, 89, 90], [*range(0, 31, 2)]),
    ids=lambda e: str(e[:5]),
)
@pytest.mark.usefixtures("nan_empty")
def test_packed_sequences(edges, device):
    T = edges[-1]
    x, grads = draw(1, T, T, 2, 1, 36, 20, torch.float32, device)
    options = dict(window=13, sinks=2, cu_seqlens=torch.tensor(edges, dtype=torch.int32, device=device))
    runs = ((torch.float32, "triton"), (torch.float64, "torch"), (torch.float32, "torch"))
    hold(*(everything(x, grads, kind, impl, **options) for kind, impl in runs), torch.float32)


@pytest.mark.parametrize("T, sinks", ((150, 5), (150, 40), (20, 33)))
@pytest.mark.usefixtures("nan_empty")
def test_sinks_split_among_programs(T, sinks, device, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_RANGE", 1)
    x, grads = draw(2, T, T, 2, 1, 20, 36, torch.float32, device)
    runs = ((torch.float32, "triton"), (torch.float64, "torch"), (torch.float32, "torch"))
    for window, causal in ((9, True), (30, False)):
        hold(
            *(everything(x, grads, *run, window=window, sinks=sinks, causal=causal) for run in runs),
            torch.float32,
        )


def tunings():
    """Entries of the tables: all that this GPU may use; in the interpreter the narrow ones of one GPU."""
    capability = launch.capability(torch.empty(0, device="cuda")) if CUDA else 90
    for dtype in DTYPES if CUDA else (torch.float16,):
        for width in (64, 128, 256) if CUDA else (128,):
            size = torch.empty(0, dtype=dtype).element_size()
            found = [kernels.candidates(name, capability, width, size) for name in ("fwd", "dq", "dkdv")]
            for i in range(max(map(len, found))):
                chosen = [c[min(i, len(c) - 1)] for c in found]
                yield pytest.param(dtype, width, chosen, id=f"{dtype}-{width}-{chosen}")


@pytest.mark.parametrize("dtype, width, chosen", tunings())
@pytest.mark.usefixtures("nan_empty")
def test_every_tuning(dtype, width, chosen, device):
    sizes = dict(B=1, T=400, Tk=400, H=2, HKV=1, K=width, V=width)
    if not CUDA:
        sizes |= dict(T=200, Tk=200, K=16, V=16)
    x, (do, dlse) = draw(**sizes, dtype=dtype, device=device)
    for options in (
        (dict(), dict(window=150, sinks=5), dict(causal=False)) if CUDA else (dict(window=90, sinks=5),)
    ):
        pattern = Pattern(
            options.get("causal", True), options.get("window", 0), options.get("sinks", 0), 1, 0.0, 0.1
        )
        o, lse = kernels.forward(*x, None, None, pattern, tuning=chosen[0])
        grads = kernels.backward(do, dlse, *x, o, lse, None, pattern, tuning=chosen[1:])
        runs = ((torch.float64, "torch"), (dtype, "torch"))
        want = (everything(x, (do, dlse), kind, impl, scale=0.1, **options) for kind, impl in runs)
        hold((o, lse, *grads[:3]), *want, dtype)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_int32_elements():
    """2^31 elements and more in q, k, v and o: the last rows are those of the tail alone."""
    T, H, K = 2**17 + 77, 128, 128
    x = [torch.randn(1, T, H, K, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    tail = [t[:, -500:].detach().clone().requires_grad_() for t in x]
    do = torch.randn(1, 200, H, K, device="cuda", dtype=torch.bfloat16)
    outputs = []
    for t in (x, tail):
        o = attend(*t, window=64, impl="triton")[0][:, -200:]
        outputs.append((o, *(g[:, -200:] for g in torch.autograd.grad(o, t, do))))
    # the tiles of the two calls begin at other tokens, so sums are taken in another order
    assert all(relative_error(a, b) < 0.02 for a, b in zip(*outputs, strict=True))
