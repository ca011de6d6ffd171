"""Attention of one new token: hostile sizes, all groups of heads, empty lists, any cut, the same bits."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")

from effattn_lite.ops.engines import decode as engine  # noqa: E402
from effattn_lite.testing import budget, max_error, relative_error  # noqa: E402

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if CUDA else ()))
SIZES = (
    dict(B=2, T=1, Tk=1, H=1, HKV=1, K=1, V=1),
    dict(B=1, T=3, Tk=70, H=6, HKV=2, K=20, V=36),
    dict(B=2, T=1, Tk=100, H=7, HKV=1, K=64, V=100),
    dict(B=1, T=1, Tk=130, H=16, HKV=1, K=100, V=64),
    dict(B=1, T=1, Tk=65, H=80, HKV=2, K=16, V=17),
    dict(B=1, T=2, Tk=50, H=2, HKV=2, K=256, V=256),
)
# page size, None for the whole cache; pages in a list; whether each query head has a list of its own
LISTS = ((None, 0, False), (1, 40, True), (16, 3, False), (7, 6, True))

pytestmark = pytest.mark.usefixtures("nan_empty")


def draw(B, T, Tk, H, HKV, K, V, *, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    shapes = (B, T, H, K), (B, Tk, HKV, K), (B, Tk, HKV, V)
    return [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]


def draw_pages(q, k, size, n, own):
    """Lists of different pages in any order, some of them of none; the first list is all of none."""
    (B, T, H, _), (_, Tk, HKV, _) = q.shape, k.shape
    if size is None:
        return None
    g, HS, P = torch.Generator().manual_seed(1), H if own else HKV, -(-Tk // size)
    pages = torch.stack([torch.randperm(P, generator=g)[:n] for _ in range(B * T * HS)])
    pages[torch.rand(pages.shape, generator=g) < 0.2] = -1
    pages[0] = -1
    return pages.view(B, T, HS, -1).to(q.device, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("size, n, own", LISTS)
def test_attend(sizes, size, n, own, dtype, device, launches):
    """Kernel against float64, within twice what plain torch loses; and the same bits again."""
    q, k, v = draw(**sizes, dtype=dtype, device=device)
    pages, options = draw_pages(q, k, size, n, own), dict(page_size=size or 1, scale=0.3)
    host = None if pages is None else pages.cpu()
    want = engine.attend(*(x.double().cpu() for x in (q, k, v)), host, impl="torch", **options)
    plain = engine.attend(q, k, v, pages, impl="torch", **options)
    assert not launches
    got, again = (engine.attend(q, k, v, pages, impl="triton", **options) for _ in range(2))
    assert launches and got[0].dtype == dtype and got[1].dtype == torch.float32
    if pages is not None:
        assert (got[0][0, 0, 0] == 0).all() and got[1][0, 0, 0] == float("-inf")
    name = str(dtype).removeprefix("torch.")
    for g, a, w, p in zip(got, again, want, plain, strict=True):
        assert torch.equal(g, a)
        assert max_error(g, w) <= budget(w, p, name, terms=max(sizes["K"], sizes["V"]))


@pytest.mark.parametrize("size, n, own", LISTS)
@pytest.mark.parametrize("parts", (2, 3, 64))
def test_any_cut_gives_the_same(size, n, own, parts, device, launches):
    """A list in parts, some without a key, joins to what it gives in one piece."""
    from effattn_lite.kernels import decode as kernels

    q, k, v = draw(B=1, T=1, Tk=200, H=6, HKV=2, K=20, V=36, device=device)
    pages = draw_pages(q, k, size, 3 * n, own)
    if pages is not None:
        pages[:, :, 1, pages.shape[3] // 3 :] = -1
    whole = kernels.forward(q, k, v, pages, size or 1, 0.3, parts=1)
    assert launches == ["decode_fwd_kernel"]
    got, again = (kernels.forward(q, k, v, pages, size or 1, 0.3, parts=parts) for _ in range(2))
    if size != 16:  # 9 pages of 16, or 13 in all, are more than a tile too
        assert launches.count("decode_merge_kernel") == 2
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert relative_error(got, whole) < 1e-5


@pytest.mark.parametrize("N, rows, processors", ((0, 8, 100), (1, 1, 1), (32768, 32, 132), (10**9, 1, 132)))
@pytest.mark.parametrize("BN", (16, 64))
def test_parts_cover_a_list(N, rows, processors, BN):
    from effattn_lite.kernels import decode as kernels

    parts, length = kernels._cut(N, BN, rows, processors)
    assert 1 <= parts <= kernels.PARTS and length % BN == 0
    assert parts * length >= N and (parts - 1) * length < max(N, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, P, HS, HKV, F",
    (
        (1, 1, 1, 1, 1, 1),
        (2, 1, 70, 3, 3, 40),
        (2, 9, 130, 6, 2, 5),
        (1, 1, 65, 16, 1, 256),
        (1, 80, 3, 2, 2, 9),
    ),
)
def test_page_scores(B, T, P, HS, HKV, F, dtype, device, launches):
    g = torch.Generator().manual_seed(0)
    a, w = (torch.randn(s, generator=g).to(dtype).to(device) for s in ((B, T, HS, F), (B, P, HKV, F)))
    if HS == HKV:  # as the mean of a group is
        a = a.float()
    want = torch.einsum("bthgf,bphf->bthgp", a.double().unflatten(2, (HKV, -1)), w.double()).flatten(2, 3)
    from effattn_lite.kernels import decode as kernels

    for dot in (None, T * HS > HKV):
        got, again = (kernels.page_scores(a, w, dot=dot) for _ in range(2))
        assert launches and torch.equal(got, again) and got.dtype == torch.float32
        assert max_error(got, want) <= budget(want, want.float(), "float32", terms=F)


@pytest.mark.parametrize("T, G", ((1, 1), (1, 3), (5, 2)))
def test_equal_pages_tie(T, G, device):
    """The same vector at every place has the same score to the last bit."""
    a, w = torch.randn(1, T, G, 100, device=device), torch.randn(1, 1, 1, 100, device=device)
    s = torch.ops.effattn_lite.page_scores(a, w.expand(1, 300, 1, 100), "triton")
    assert (s == s[..., :1]).all()


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_order_of_choice(impl, device):
    """The best first, of equals the lowest, none of those to come, and no number for what is not there."""
    w = torch.tensor([1.0, 3, -2, 3, 0, -0.0, 9], device=device).view(1, 7, 1, 1)
    a = torch.ones(1, 3, 1, 1, device=device)
    past = torch.tensor([6, 3, 0], device=device)
    assert engine.choose(a, w, past, 9, impl)[0, :, 0].tolist() == [
        [1, 3, 0, 4, 5, 2, -1],
        [1, 0, 2, -1, -1, -1, -1],
        [-1] * 7,
    ]
    assert engine.choose(-a, w, past, 2, impl)[0, :, 0].tolist() == [[2, 4], [2, 0], [-1, -1]]
    assert engine.choose(a, w, past, 0, impl).shape == (1, 3, 1, 0)


def test_queries_in_tiles(monkeypatch, device):
    q, k, v = draw(B=1, T=50, Tk=50, H=2, HKV=1, K=8, V=8, device=device)
    features, past = engine.bounds(k.unflatten(1, (10, 5))), torch.arange(50, device=device) // 5
    pages = engine.choose(engine.ends(q), features, past, 4, "torch")
    whole = engine.attend(q, k, v, pages, page_size=5, impl="torch")
    monkeypatch.setattr(engine, "QUERY_TILE", 7)
    monkeypatch.setattr(engine, "GATHERED", 2000)
    assert torch.equal(engine.choose(engine.ends(q), features, past, 4, "torch"), pages)
    assert relative_error(engine.attend(q, k, v, pages, page_size=5, impl="torch"), whole) < 1e-6


def test_what_is_not_listed_is_not_read(device):
    """NaN behind the last token, and in pages that no list names."""
    q, k, v = draw(B=1, T=1, Tk=60, H=4, HKV=2, K=16, V=16, device=device)
    pages = torch.tensor([0, 3, -1], dtype=torch.int32, device=device).expand(1, 1, 2, 3)
    want = engine.attend(q, k, v, pages, page_size=16, impl="triton")
    k[:, 16:48], v[:, 16:48] = torch.nan, torch.nan
    room = [torch.full((1, 90, 2, 16), torch.nan, device=device) for _ in range(2)]
    for x, y in zip(room, (k, v), strict=True):
        x[:, :60] = y
    got = engine.attend(q, *(x[:, :60] for x in room), pages, page_size=16, impl="triton")
    assert all(torch.equal(g, w) and g.isfinite().all() for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("scale", (1e3, 0.0, -0.5))
def test_scales(scale, device):
    """Scores of some thousands, no scores, and a scale that turns the order round."""
    q, k, v = draw(B=1, T=1, Tk=70, H=3, HKV=1, K=16, V=16, device=device)
    want = engine.attend(*(x.double().cpu() for x in (q, k, v)), None, scale=scale, impl="torch")
    got = engine.attend(q, k, v, None, scale=scale, impl="triton")
    # an exponent of some thousands is itself rounded by float32
    assert relative_error(got, want) < (1e-3 if scale == 1e3 else 1e-5)


def test_operators_are_whole(device):
    """Fake functions, shapes and strides agree with what runs, as torch.compile needs it."""
    q, k, v = draw(B=2, T=1, Tk=20, H=4, HKV=2, K=8, V=8, device=device)
    pages = draw_pages(q, k, 4, 3, True)
    checks = ("test_schema", "test_faketensor")
    for impl in ("torch", "triton"):
        args = q, k, v, pages, 4, 0.3, impl
        torch.library.opcheck(torch.ops.effattn_lite.decode.default, args, test_utils=checks)
        args = engine.ends(q), engine.bounds(k.unflatten(1, (5, 4))), impl
        torch.library.opcheck(torch.ops.effattn_lite.page_scores.default, args, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("size", (None, 1, 16))
def test_more_than_int32_elements(size):
    """2^31 elements and more in k and v: the last head of the last row is what it is alone."""
    q, k, v = (
        torch.randn(2, t, h, 128, device="cuda", dtype=torch.bfloat16)
        for t, h in ((1, 64), (2**18 + 77, 32), (2**18 + 77, 32))
    )
    n = None if size is None else (2**18 + 77) // size
    pages = None
    if size is not None:
        pages = torch.arange(n - 50, n, device="cuda", dtype=torch.int32).expand(2, 1, 64, 50).contiguous()
    got = engine.attend(q, k, v, pages, page_size=size or 1, impl="triton")
    alone = [x[1:, :, -h:].clone() for x, h in ((q, 2), (k, 1), (v, 1))]
    mine = None if pages is None else pages[1:, :, -2:].contiguous()
    want = engine.attend(*alone, mine, page_size=size or 1, impl="triton")
    # parts of another length sum up in another order
    assert max_error(got[0][1:, :, -2:], want[0]) <= 2 * 2.0**-8 * float(want[0].abs().max())
    assert relative_error(got[1][1:, :, -2:], want[1]) < 1e-5
